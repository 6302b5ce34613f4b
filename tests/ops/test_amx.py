"""AMX's tiles: every way to cut rows, columns and inputs into them, and every way out of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.nn import LowRankLinear
from tautorch.ops.int8_conv2d import int8_conv2d
from tautorch.ops.int8_linear import int8_linear

KERNEL, BESIDE = "amx", "avx512vnni"
pytestmark = pytest.mark.skipif(not _C.isas().get(KERNEL, False), reason=f"this CPU cannot run {KERNEL}")

# Around where tiles begin (5), tiles of 16 rows, pairs of them, and blocks of 192.
ROWS = (4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 191, 193, 400)
# Parts of a group of 4, of a step of 64, steps, and more than 16 of them: sums then leave meanwhile.
INPUTS = (1, 3, 4, 60, 63, 64, 65, 127, 128, 200, 1023, 1024, 1100)
OUTPUTS = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 128, 200)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> Iterator[None]:
    torch.set_num_threads(2)
    yield


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + 1000 * n + k)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    return x, w


def sums(x: Tensor, w: Tensor) -> Tensor:
    with dispatch.force("int8_linear", KERNEL):
        scale = torch.ones(len(w))
        return int8_linear(x, w, scale, x_scale=torch.tensor([1.0]), out_dtype=torch.int32)


def check_sums(m: int, n: int, k: int) -> None:
    x, w = operands(m, n, k)
    assert torch.equal(sums(x, w), (x.double() @ w.double().T).to(torch.int32)), (m, n, k)


@pytest.mark.parametrize("m", ROWS)
def test_rows(m: int) -> None:
    for n, k in ((64, 64), (97, 130), (200, 1030)):
        check_sums(m, n, k)


@pytest.mark.parametrize("k", INPUTS)
def test_inputs(k: int) -> None:
    for m, n in ((7, 70), (40, 33), (77, 128)):
        check_sums(m, n, k)


@pytest.mark.parametrize("n", OUTPUTS)
def test_outputs(n: int) -> None:
    for m, k in ((5, 68), (16, 64), (50, 1090)):
        check_sums(m, n, k)


@settings(deadline=None)
@given(st.integers(1, 130), st.integers(1, 150), st.integers(1, 1300))
def test_any_size(m: int, n: int, k: int) -> None:
    check_sums(m, n, k)


def test_the_largest_sums() -> None:
    x, w = torch.full((40, 66_000), -128, dtype=torch.int8), torch.full((33, 66_000), -127, dtype=torch.int8)
    assert torch.equal(sums(x, w), torch.full((40, 33), 128 * 127 * 66_000, dtype=torch.int32))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ways_out(dtype: torch.dtype, activation: str) -> None:
    """The bits of the vectors' kernel, whose arithmetic is the same, NaN rows included."""
    shapes = [(6, 64, 64), (16, 96, 1100), (45, 200, 256), (61, 33, 1024), (200, 130, 100)]
    shapes += [(6, 16, 64), (16, 48, 1100), (17, 80, 64), (45, 112, 1100)]  # 1 and 3 tiles of columns, whole
    for m, n, k in shapes:
        x, w = operands(m, n, k)
        real = x.float()
        real[m // 2, k // 2] = float("nan")
        how: dict[str, Tensor] = {}
        if dtype == torch.int8:
            how = {"out_scale": torch.tensor([30.0]), "out_zero_point": torch.tensor([-7], dtype=torch.int32)}
        outputs = []
        for kernel, bias in itertools.product((KERNEL, BESIDE), (None, torch.linspace(-9, 9, n))):
            with dispatch.force("int8_linear", kernel):
                y = int8_linear(
                    real.to(torch.float32 if dtype == torch.int8 else dtype), w, torch.linspace(0.01, 0.2, n),
                    bias, activation=activation, **how,
                )  # fmt: skip
            outputs.append(y.view(torch.uint8))
            assert y.dtype == dtype
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


# Layer and image: rows that lie at one distance and rows that are copied, padding, strides, groups, and
# filters whose window is one row of weights.
CONVOLUTIONS = [
    ((40, 64, 1, 1), (2, 9, 13), {}),
    ((70, 20, 3, 3), (1, 12, 17), {"padding": 1}),
    ((64, 64, 3, 3), (2, 7, 7), {"padding": 1, "stride": 2}),
    ((33, 16, 3, 3), (1, 15, 11), {"padding": 2, "dilation": 2}),
    ((48, 24, 1, 1), (1, 20, 11), {"stride": 2}),
    ((64, 3, 7, 7), (1, 40, 33), {"padding": 3, "stride": 2}),
    ((80, 33, 5, 2), (3, 9, 10), {"padding": 2}),
    ((96, 40, 3, 3), (1, 30, 31), {"padding": 1, "groups": 2}),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "image", "how"), CONVOLUTIONS)
def test_convolutions(
    shape: tuple[int, ...], image: tuple[int, int, int], how: dict[str, int], channels_last: bool
) -> None:
    outputs, per_group, _, _ = shape
    w = torch.randint(-127, 128, shape, dtype=torch.int8)
    channels = per_group * how.get("groups", 1)
    x = torch.randint(-128, 128, (image[0], channels, *image[1:]), dtype=torch.int8)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for zero in (0, -128, 5):
        point = torch.tensor([zero], dtype=torch.int32)
        with dispatch.force("int8_conv2d", KERNEL):
            y = int8_conv2d(
                x, w, torch.ones(outputs), x_scale=torch.tensor([1.0]), x_zero_point=point,
                out_dtype=torch.int32, **how,
            )  # fmt: skip
        want = torch.nn.functional.conv2d(x.double() - zero, w.double(), **how)
        assert torch.equal(y, want.to(torch.int32)), zero


def images(
    x: Tensor, w: Tensor, dtype: torch.dtype, activation: str = "none", **how: int
) -> tuple[Tensor, Tensor]:
    """Bits of both kernels' outputs."""
    options: dict[str, Tensor] = {}
    if dtype == torch.int8:
        options = {"out_scale": torch.tensor([30.0]), "out_zero_point": torch.tensor([9], dtype=torch.int32)}
    outputs = []
    for kernel in (KERNEL, BESIDE):
        with dispatch.force("int8_conv2d", kernel):
            y = int8_conv2d(
                x, w, torch.linspace(0.01, 0.2, len(w)), torch.linspace(-9, 9, len(w)),
                x_scale=torch.tensor([0.1]), x_zero_point=torch.tensor([3], dtype=torch.int32),
                activation=activation, out_dtype=None if options else dtype, **options, **how,
            )  # fmt: skip
        assert y.dtype == dtype
        outputs.append(y.contiguous().view(torch.uint8))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "image", "how"), CONVOLUTIONS)
def test_ways_out_of_convolutions(
    shape: tuple[int, ...], image: tuple[int, int, int], how: dict[str, int], dtype: torch.dtype
) -> None:
    w = torch.randint(-127, 128, shape, dtype=torch.int8)
    x = torch.randint(
        -128, 128, (image[0], shape[1] * how.get("groups", 1), *image[1:]), dtype=torch.int8
    ).to(memory_format=torch.channels_last)
    for activation in ("relu", "gelu") if dtype != torch.int8 else ("none", "relu", "silu"):
        assert torch.equal(*images(x, w, dtype, activation, **how)), activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [4, 64, 68, 100, 1028])
def test_int8_rows_as_they_are(channels: int, dtype: torch.dtype) -> None:
    """int8 pixels of 1x1 layers, channels last: signed products for every panel, turned ones for gelu."""
    for outputs in (40, 130, 600):
        w = torch.randint(-127, 128, (outputs, channels, 1, 1), dtype=torch.int8)
        for size in ((1, 3), (1, 7), (4, 4), (5, 10), (7, 29)):
            x = torch.randint(-128, 128, (1, channels, *size), dtype=torch.int8)
            x = x.to(memory_format=torch.channels_last)
            for activation in ("none", "relu", "gelu"):
                assert torch.equal(*images(x, w, dtype, activation)), (outputs, size, activation)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("k", [64, 68, 130, 256])
def test_many_panels_of_few_inputs(k: int, activation: str) -> None:
    """Rows that take all panels before the next begin."""
    for m, n in itertools.product((5, 63, 64, 65, 95, 96, 192), (192, 320, 576, 700)):
        x, w = operands(m, n, k)
        outputs = []
        for kernel in (KERNEL, BESIDE):
            with dispatch.force("int8_linear", kernel):
                outputs.append(
                    int8_linear(
                        x, w, torch.linspace(0.01, 0.2, n), torch.linspace(-9, 9, n), activation=activation,
                        x_scale=torch.rand(m, generator=torch.Generator().manual_seed(m)),
                    )
                )  # fmt: skip
        assert torch.equal(*outputs), (m, n)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_addends(dtype: torch.dtype) -> None:
    """Low rank and a dense residual: sums leave on top of floats."""
    for m, n, k, rank in ((5, 64, 64, 16), (33, 112, 130, 64), (100, 200, 256, 70)):
        layer = nn.Linear(k, n)
        low = LowRankLinear.from_float(layer, rank=rank, weight_dtype=torch.int8, residual="int8").to(dtype)
        x = torch.randn(m, k, dtype=dtype)
        x[m // 2, 1] = float("nan")
        outputs = []
        for kernel in (KERNEL, BESIDE):
            with dispatch.force("lowrank_linear", kernel), torch.inference_mode():
                outputs.append(low(x).view(torch.uint8))
        assert torch.equal(*outputs), (m, n, k)

"""The ends of the ranges: sizes of 0 and 1, filters larger than a tile or the image, every half float."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from tautorch import _C, dispatch, ops
from tautorch.reference import int8_linear as reference
from tautorch.reference.common import apply_activation
from tautorch.testing.cases import MODES, conv_case, linear_case
from tautorch.testing.values import int8_values

from .agreement import agree
from .suite import PATTERNS

KERNELS = [name for name, available in _C.isas().items() if available]
LINEAR = ("int8_linear", "sparse_linear", "lowrank_linear")
CONV = ("int8_conv2d", "sparse_conv2d", "lowrank_conv2d")


def identity(x: torch.Tensor, kernel: str, **kwargs: object) -> torch.Tensor:
    """x [M] through a weight of 1 that is not quantised: the conversions and the epilogue alone."""
    one = torch.ones(1, 1, dtype=torch.int8)
    with dispatch.force("int8_linear", kernel):
        return ops.int8_linear(x[:, None], one, torch.ones(1), weight_only=True, **kwargs)[:, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_of_extreme_values(activation: str, kernel: str) -> None:
    sizes = [1e-45, 1e-39, 1e-30, 1e-3, 1.0, 5.0, 20.0, 87.3, 88.7, 89.5, 104.0, 1e5, 1e12, 1e30, 3e38]
    x = torch.tensor([s * v for s in (-1, 1) for v in sizes] + [0.0, -0.0])
    y = identity(x, kernel, activation=activation)
    torch.testing.assert_close(y, apply_activation(x, activation), rtol=1e-6, atol=1e-6)
    ends = identity(torch.tensor([float("inf"), -float("inf"), float("nan")]), kernel, activation=activation)
    assert ends[0] == float("inf") and bool(ends[2].isnan())
    assert bool(ends[1].isnan()) or activation == "relu"  # -Inf * 0, as torch's
    assert activation != "relu" or ends[1] == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_float(dtype: torch.dtype, kernel: str) -> None:
    """In: exact. Out: rounded to even, also to subnormals, to Inf, and between all neighbours."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = x.float()
    read = identity(x, kernel, out_dtype=torch.float32)
    assert torch.equal(read.nan_to_num(7e8, 7e9, -7e9), wide.nan_to_num(7e8, 7e9, -7e9))
    finite = wide[wide.isfinite()].sort().values
    middle = finite[:-1] + (finite[1:] - finite[:-1]) / 2
    for values in (wide, middle, middle.nextafter(finite[1:]), middle.nextafter(finite[:-1]), finite * 1.01):
        written = identity(values, kernel, out_dtype=dtype)
        expected = values.to(dtype)
        assert torch.equal(written.isnan(), expected.isnan())
        assert torch.equal(written[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", LINEAR)
def test_sizes_of_nothing_and_one(op: str, kernel: str) -> None:
    variants = [{"pattern": p} for p in PATTERNS] if op == "sparse_linear" else [{}]
    sizes = [(0, 5, 7), (1, 1, 1), (2, 1, 65), (65, 1, 1), (1, 67, 1), (3, 17, 3)]
    with dispatch.force(op, kernel):
        for (m, n, k), mode, variant in itertools.product(sizes, MODES[op], variants):
            agree(linear_case(op, m, n, k, mode=mode, rank=1, **variant), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_inputs_and_no_outputs(kernel: str) -> None:
    with dispatch.force("int8_linear", kernel):
        for weight_only in (False, True):
            for m, n, k in ((3, 5, 0), (3, 0, 5), (0, 5, 0), (200, 70, 0)):
                x, w, bias = torch.randn(m, k), int8_values((n, k), low=-127), torch.randn(n)
                y = ops.int8_linear(x, w, torch.ones(n), bias, weight_only=weight_only)
                assert y.shape == (m, n) and (k or torch.equal(y, bias.expand(m, n)))
    with dispatch.force("lowrank_linear", kernel):  # rank 0
        down, up, bias = torch.empty(0, 6), torch.empty(5, 0), torch.randn(5)
        assert torch.equal(ops.lowrank_linear(torch.randn(4, 6), down, up, bias), bias.expand(4, 5))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", CONV)
def test_filters_of_every_size(op: str, kernel: str) -> None:
    """One tap; more taps than a tile holds; filters larger than the image; pixels that are all padding."""
    variants = [{"pattern": p} for p in ("unstructured", "16x16")] if op == "sparse_conv2d" else [{}]
    shapes = [
        ((1, 3, 1, 1), (5, 3, 1, 1), {}),
        ((2, 3, 9, 11), (6, 3, 9, 9), {"padding": 1}),
        ((1, 18, 9, 9), (18, 1, 9, 9), {"groups": 18, "padding": 4}),
        ((1, 67, 1, 70), (67, 1, 1, 66), {"groups": 67, "padding": (0, 2)}),
        ((1, 2, 2, 1), (3, 2, 5, 4), {"padding": (3, 3)}),
        ((1, 2, 1, 1), (3, 1, 1, 1), {"padding": 3, "stride": 2, "groups": 1}),
        ((1, 4, 2, 2), (4, 2, 3, 3), {"padding": 6, "dilation": 4, "groups": 2}),
    ]
    with dispatch.force(op, kernel):
        for (x, w, geometry), mode, variant in itertools.product(shapes, MODES[op], variants):
            if x[1] != w[1] * int(geometry.get("groups", 1)):  # type: ignore[call-overload]
                w = (w[0], x[1], *w[2:])
            agree(conv_case(op, x, w, mode=mode, rank=1, **geometry, **variant), kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
def test_depthwise_agrees_with_torch(kernel: str) -> None:
    x, w = int8_values((1, 20, 11, 12), low=-127), int8_values((20, 1, 9, 9), low=-127)
    with dispatch.force("int8_conv2d", kernel):
        y = ops.int8_conv2d(
            x, w, torch.ones(20), groups=20, padding=2, x_scale=torch.ones(1), out_dtype=torch.int32
        )
    assert torch.equal(y.double(), F.conv2d(x.double(), w.double(), groups=20, padding=2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_row_quantiser_at_its_ends(kernel: str) -> None:
    """amax around 2^-100 and at the largest float; inputs that round to ties."""
    tiny = 2.0**-100
    rows = torch.tensor(
        [
            [tiny, -tiny, tiny / 2, 0.0],
            [tiny * (1 - 2**-24), tiny / 2, 0.0, 0.0],
            [3.4028234e38, -3.4028234e38, 1.7014117e38, 1e38],
            [127.0, 0.5, 1.5, 2.5],
            [-127.0, -0.5, -1.5, -2.5],
            [1e-45, -1e-45, 0.0, -0.0],
        ]
    )
    w = torch.eye(4, dtype=torch.int8)
    with dispatch.force("int8_linear", kernel):
        q = ops.int8_linear(rows, w, torch.ones(4), out_dtype=torch.int32)
        y = ops.int8_linear(rows, w, torch.ones(4))
    assert q.tolist() == [
        [127, -127, 64, 0],
        [0, 0, 0, 0],
        [127, -127, 64, 37],
        [127, 0, 2, 2],
        [-127, 0, -2, -2],
        [0, 0, 0, 0],
    ]
    assert torch.equal(y, reference.int8_linear(rows, w, torch.ones(4)))


# Sizes that are cut along rows, along outputs (few rows, many weights), or not at all.
CUT_LINEAR = [
    (4, 700, 900),
    (1, 1500, 1300),
    (47, 260, 300),
    (144, 130, 600),
    (200, 130, 300),
    (400, 65, 210),
]
CUT_CONV = [
    ((1, 256, 4, 4), (130, 256, 3, 3), {"padding": 1}),
    ((2, 16, 49, 48), (24, 16, 3, 3), {"stride": 2}),
    ((3, 64, 33, 32), (64, 1, 3, 3), {"groups": 64, "padding": 1}),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", LINEAR + CONV)
def test_every_way_to_cut_work_among_threads(op: str, kernel: str) -> None:
    """The same bits from 1 to 5 threads, and the reference's."""
    variants = [{"pattern": p} for p in ("unstructured", "4x1")] if op.startswith("sparse") else [{}]
    threads = torch.get_num_threads()
    try:
        with dispatch.force(op, kernel):
            for mode, variant in itertools.product(MODES[op], variants):
                cases = (
                    [linear_case(op, m, n, k, mode=mode, rank=300, **variant) for m, n, k in CUT_LINEAR]
                    if op in LINEAR
                    else [conv_case(op, x, w, mode=mode, rank=40, **g, **variant) for x, w, g in CUT_CONV]  # type: ignore[arg-type]
                )
                for case in cases:
                    results = []
                    for count in (1, 2, 5):
                        torch.set_num_threads(count)
                        results.append(case(getattr(ops, op)))
                    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
                    agree(case, kernel)
    finally:
        torch.set_num_threads(threads)

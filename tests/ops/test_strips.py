"""The forms that run by strips of outputs: cells (whole blocks) and 2:4."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tautorch import _C, dispatch, prune
from tautorch.ops import packing
from tautorch.ops import sparse_entries as entries
from tautorch.ops.sparse_linear import sparse_linear
from tautorch.reference.layouts import encode
from tautorch.testing.values import sparse_mask

KERNEL = "avx512vnni"
pytestmark = pytest.mark.skipif(not _C.isas().get(KERNEL, False), reason=f"this CPU cannot run {KERNEL}")

# Around the rows of a tile (12, 16), two and three of them, and those of a block (192).
ROWS = (1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 17, 24, 25, 33, 47, 48, 49, 97, 192, 193, 413)
# Around cells of 16 inputs by 16 or 32 outputs, and the 32 x 32 of 2:4.
SIZES = (
    (1, 1), (3, 15), (15, 16), (16, 17), (17, 31), (31, 33), (32, 32), (33, 64), (48, 63), (64, 65),
    (65, 257), (129, 96), (130, 1031),
)  # fmt: skip


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> Iterator[None]:
    torch.set_num_threads(2)
    yield


def weight(n: int, k: int, pattern: str, keep: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """int8 weight with extreme values, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = sparse_mask((n, k), pattern, keep, seed=seed)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    w[torch.rand(n, k, generator=generator) < 0.1] = -127
    w[torch.rand(n, k, generator=generator) < 0.1] = 0  # kept zeros stay entries
    return w * mask, mask


def pack(w: Tensor, mask: Tensor | None, pattern: str, form: int = entries.CELLS) -> Tensor:
    return entries.pack(
        *encode(w, mask, pattern, 1), pattern, tuple(w.shape), kernel=KERNEL, op="test", form=form
    )


def pairs(w: Tensor) -> Tensor:
    """A 2:4 pack, whether it pays or not."""
    n, k = w.shape
    return packing.dense_pack(KERNEL, packing.PAIRS_I8, w.contiguous(), 1, n, k, 1, (k, 1, 1))


def run(x: Tensor, packed: Tensor, pattern: str, n: int, **how: object) -> Tensor:
    options: dict[str, object] = {"out_dtype": torch.int32, **how}
    with dispatch.force("sparse_linear", KERNEL):
        return sparse_linear(
            x, packed, None, None, torch.linspace(0.5, 2, n), pattern=pattern, out_features=n,
            x_scale=torch.tensor([0.01]), **options,  # type: ignore[arg-type]
        )  # fmt: skip


def check_products(w: Tensor, packed: Tensor, pattern: str, rows: tuple[int, ...] = ROWS) -> None:
    n, k = w.shape
    for m in rows:
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        want = (x.double() @ w.double().T).to(torch.int32)
        assert torch.equal(run(x, packed, pattern, n), want), (m, n, k)


@pytest.mark.parametrize("keep", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("pattern", ["16x16", "32x32", "64x64"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_cells(n: int, k: int, pattern: str, keep: float) -> None:
    w, mask = weight(n, k, pattern, keep, seed=n + k)
    packed = pack(w, mask, pattern)
    info = packing.pack_info(packed)
    assert (int(info["cells"]) > 0) == bool(mask.any())
    if int(info["cells"]) > 0:
        assert info["entries"] == info["slots"] == info["blocks"] == 0
    for got, want in zip(entries.unpack(packed, pattern, (n, k)), encode(w, mask, pattern, 1), strict=True):
        assert got is not None and want is not None and torch.equal(got.long(), want.long())
    assert torch.equal(entries.unpack_dense(packed, (n, k)), w)
    check_products(w, packed, pattern)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_pairs(n: int, k: int) -> None:
    w, _ = weight(n, k, "2:4", 0.5, seed=n * k)
    packed = pairs(w)
    assert torch.equal(entries.unpack_dense(packed, (n, k)), w)
    assert torch.equal(entries.repack(packed, "scalar", "2:4", (n, k), 1, op="test"), pack_scalar(w))
    check_products(w, packed, "2:4")


def pack_scalar(w: Tensor) -> Tensor:
    return entries.pack(*encode(w, None, "2:4", 1), "2:4", tuple(w.shape), kernel="scalar", op="test")


def test_every_place_of_a_quad() -> None:
    """All pairs of places, in every quad of a step, with the largest values."""
    w = torch.zeros(36, 64, dtype=torch.int8)
    choices = [(i, j) for i in range(4) for j in range(i, 4)]
    for n in range(36):
        for q in range(16):
            i, j = choices[(n + q) % len(choices)]
            w[n, 4 * q + i], w[n, 4 * q + j] = 127, -127
    packed = pairs(w)
    assert torch.equal(entries.unpack_dense(packed, (36, 64)), w)
    for value in (-128, 127):
        x = torch.full((14, 64), value, dtype=torch.int8)
        assert torch.equal(run(x, packed, "2:4", 36), x.int() @ w.int().T)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["16x16", "32x32", "2:4"])
def test_threads_by_rows_and_by_outputs(pattern: str, threads: int) -> None:
    torch.set_num_threads(threads)
    w, mask = weight(1025, 1040, pattern, 0.4)
    packed = pairs(w) if pattern == "2:4" else pack(w, mask, pattern)
    check_products(w, packed, pattern, (1, 3, 30, 64, 75, 450))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("pattern", ["16x16", "32x32", "2:4"])
def test_outputs(pattern: str, out_dtype: torch.dtype, activation: str) -> None:
    """As the form that these weights had before: lists, or dense."""
    n, k = 331, 130  # more strips than a tile of rows takes at once
    w, mask = weight(n, k, pattern, 0.4)
    ours = pairs(w) if pattern == "2:4" else pack(w, mask, pattern)
    other = packing.dense_pack(KERNEL, packing.DENSE_I8, w, 1, n, k, 1, (k, 1, 1))
    if pattern != "2:4":
        other = pack(w, mask, pattern, entries.LISTS)
    how: dict[str, object] = {"activation": activation, "bias": torch.randn(n), "out_dtype": None}
    if out_dtype == torch.int8:
        how |= {"out_scale": torch.tensor([0.5]), "out_zero_point": torch.tensor([3], dtype=torch.int32)}
    else:
        how["out_dtype"] = out_dtype
    for m in (1, 5, 16, 29):
        x = torch.randn(m, k) * 3
        got, want = run(x, ours, pattern, n, **how), run(x, other, pattern, n, **how)
        assert got.dtype == out_dtype and bool(got.any())
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["16x16", "2:4"])
def test_rows_with_nan(pattern: str, dtype: torch.dtype) -> None:
    w, mask = weight(70, 64, pattern, 0.5)
    packed = pairs(w) if pattern == "2:4" else pack(w, mask, pattern)
    x = torch.randn(20, 64, dtype=dtype)
    x[7, 5] = torch.nan
    with dispatch.force("sparse_linear", KERNEL):
        y = sparse_linear(x, packed, None, None, torch.ones(70), pattern=pattern, out_features=70)
    assert torch.equal(y.isnan().any(1), y.isnan().all(1)) and y.isnan().any(1).nonzero().tolist() == [[7]]


def test_what_is_not_in_whole_cells_is_not_in_cells() -> None:
    w = torch.ones(32, 64, dtype=torch.int8)
    for hole in ((slice(0, 4), slice(5, 6)), (slice(8, 12), slice(63, 64)), (slice(0, 4), slice(16, 32))):
        mask = torch.ones(32, 64) > 0
        mask[hole] = False
        packed = pack(w * mask, mask, "4x1")
        assert int(packing.pack_info(packed)["cells"]) == 0  # nor where they are asked for
        check_products(w * mask, packed, "4x1", (1, 20))


def test_automatic_choice() -> None:
    for pattern, outputs in (("16x16", 16), ("32x32", 32), ("64x64", 32), ("4x1", 0), ("unstructured", 0)):
        w, mask = weight(256, 512, pattern, 0.3)
        assert packing.pack_info(pack(w, mask, pattern, 0))["cell_outputs"] == outputs
    for n, kind in ((64, packing.PAIRS_I8), (16, packing.DENSE_I8)):  # half of a strip would be empty
        w, _ = weight(n, 512, "2:4", 0.5)
        assert packing.pack_info(pack(w, None, "2:4", 0))["kind"] == kind
        assert packing.pack_info(pack_scalar(w))["kind"] == packing.DENSE_I8
    w, _ = weight(64, 512, "2:4", 0.5)
    assert pack(w, None, "2:4", 0).numel() < 0.66 * w.numel()


def refused(packed: Tensor, byte: int, value: int) -> None:
    broken = packed.clone()
    assert broken[byte] != value
    broken[byte] = value
    with pytest.raises(ValueError, match="inputs they do not have"):
        run(torch.zeros(1, 200, dtype=torch.int8), broken, "16x16", 40)
    with pytest.raises(ValueError, match="inputs they do not have"):
        entries.unpack(broken, "16x16", (40, 200))


def test_tampered_cells_are_refused() -> None:
    w, mask = weight(40, 200, "16x16", 1.0)
    packed = pack(w, mask, "16x16")
    at, strips = int(packing.pack_info(packed)["cell_offset"]), 3
    places = at + 4 * (strips + 1)
    refused(packed, at, 1)  # the first start
    refused(packed, at + 4 + 3, 0xFF)  # another
    refused(packed, at + 4 * strips, 0)  # the last
    refused(packed, places, 3)  # of the first strip: places do not ascend
    refused(packed, places + 1, 0xFF)
    refused(packed, places + 2 * 12, 13)  # inputs 208 to 223 of 200


def test_weights_that_are_not_2_4_are_refused() -> None:
    w = torch.zeros(64, 64, dtype=torch.int8)
    w[63, 60:63] = 1
    with pytest.raises(ValueError, match="at most two of each four"):
        pairs(w)
    with pytest.raises(ValueError, match="no dense kind"):
        _C.dense_pack_bytes(KERNEL, packing.PAIRS_I8, 2, 64, 64, 1)
    with pytest.raises(ValueError, match="has no 2:4 form"):
        _C.dense_pack_bytes("scalar", packing.PAIRS_I8, 1, 64, 64, 1)


def test_other_operators_refuse_pairs() -> None:
    packed = pairs(weight(64, 64, "2:4", 0.5)[0])
    with pytest.raises(ValueError, match="another shape or kind"):
        _C.int8_linear_plan(packed.data_ptr(), packed.numel(), 64, {})
    geometry = (64, 1, 1, 1, 1, 0, 0, 1, 1)
    for plan in (_C.int8_conv2d_plan, _C.sparse_conv2d_plan):
        with pytest.raises(ValueError, match="another kind"):
            plan(packed.data_ptr(), packed.numel(), geometry, {})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 70), st.integers(1, 150), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99),
    st.sampled_from(["16x16", "32x32", "64x64", "2:4"]),
)  # fmt: skip
def test_any_size(n: int, k: int, m: int, keep: float, seed: int, pattern: str) -> None:
    w, mask = weight(n, k, pattern, keep, seed)
    packed = pairs(w) if pattern == "2:4" else pack(w, mask, pattern)
    assert torch.equal(entries.unpack_dense(packed, (n, k)), w)
    check_products(w, packed, pattern, (m,))


def test_pruned_layers_take_these_forms() -> None:
    """What prune's masks keep is in whole blocks."""
    mask = prune.make_mask(torch.rand(96, 160), "32x32", 0.7)
    info = packing.pack_info(pack(mask.to(torch.int8), mask, "32x32", 0))
    assert int(info["cells"]) == int(mask.sum()) // 512

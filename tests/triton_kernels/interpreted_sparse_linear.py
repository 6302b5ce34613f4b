"""sparse_linear in Triton's interpreter, against the reference. Run by test_sparse_linear.py."""

from __future__ import annotations

import pytest
import torch
from tests.triton_kernels import interpreting

from tautorch.reference.layouts import decode
from tautorch.reference.sparse_linear import sparse_linear as reference
from tautorch.testing.cases import Case, linear_case
from tautorch.testing.tolerances import assert_close
from tautorch.triton_kernels import sparse_linear as tk
from tautorch.triton_kernels._device import ACTIVATIONS

interpreting.let_scalars_be_indices()

# exp and huge inputs overflow on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
OP = "sparse_linear"
MODES = ["float", "dynamic", "static", "int8", "weight_only"]


def check(case: Case, config: tk.Config | None) -> None:
    kwargs = case.kwargs
    weight = decode(*case.args[1:4], kwargs["pattern"], (kwargs["out_features"], case.k))
    sums = weight.sum(1, dtype=torch.int32) if case.exact else None
    kernel = case.but(config=config, row_sums=sums)
    kind = "integer" if case.exact else "float"
    expected = case(reference)
    assert_close(kernel(tk.sparse_linear), expected, magnitude=case.magnitude(reference), kind=kind, k=case.k)
    if case.exact:
        assert torch.equal(kernel.raw()(tk.sparse_linear), case.raw()(reference))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", tk.BLOCKS)
@pytest.mark.parametrize("grow", [(-1, -1, -1), (0, 0, 0), (1, 1, 1)])
def test_around_the_tile(block: int, mode: str, grow: tuple[int, int, int]) -> None:
    m, n, k = (a + b for a, b in zip((16, block, 3 * block), grow, strict=True))
    case = linear_case(OP, m, n, k, mode=mode, pattern=f"{block}x{block}", keep=0.6)
    check(case, tk.Config(16, 2, 4, 2, group_m=2))


@pytest.mark.parametrize("mode", ["float", "static"])
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (2, 131, 67), (37, 17, 257)])
def test_chosen_tiles(mode: str, m: int, n: int, k: int) -> None:
    for pattern in ("16x16", "64x64"):
        check(linear_case(OP, m, n, k, mode=mode, pattern=pattern), None)


@pytest.mark.parametrize("chunk", [1, 2, 8])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_any_number_of_blocks_in_a_row(chunk: int, keep: float) -> None:
    for mode in ("float", "int8"):
        case = linear_case(OP, 5, 40, 130, mode=mode, pattern="16x16", keep=keep)
        check(case, tk.Config(16, chunk, 4, 2))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(out_dtype: torch.dtype, activation: str) -> None:
    case = linear_case(OP, 17, 33, 48, pattern="16x16").but(activation=activation)
    if out_dtype == torch.int8:
        zero_point = torch.tensor([-7], dtype=torch.int32)
        case = case.but(out_scale=torch.tensor([0.03]), out_zero_point=zero_point)
    else:
        case = case.but(out_dtype=out_dtype)
    actual, expected = case(tk.sparse_linear), case(reference)
    if out_dtype == torch.int8:
        apart = (actual.int() - expected.int()).abs().max()
        assert apart <= (0 if activation in ("none", "relu") else 1) and expected.unique().numel() > 10
        return
    kind = "integer" if activation in ("none", "relu") else "activation"
    assert_close(actual, expected, magnitude=case.magnitude(reference), kind=kind)


def test_what_is_dropped_does_not_matter() -> None:
    case = linear_case(OP, 4, 32, 64, mode="float", pattern="16x16", keep=0.5)
    x = case.x.clone()
    x[1, 20], x[2, 3], x[3, 63] = float("nan"), float("inf"), -float("inf")
    case = case.with_x(x)
    got, want = case(tk.sparse_linear), case(reference)
    assert torch.equal(torch.isfinite(got), torch.isfinite(want)) and torch.isfinite(want[1:]).any()
    assert not torch.isfinite(want).all()


def test_special_rows_and_strides() -> None:
    case = linear_case(OP, 9, 33, 40, pattern="16x16")
    x = case.x.clone()
    x[0], x[1] = 0, 2.0**-120
    x[2, 3], x[3, 39] = float("nan"), float("inf")
    got, want = case.with_x(x)(tk.sparse_linear), case.with_x(x)(reference)
    assert_close(got, want, magnitude=want.abs().nan_to_num(1.0) + case.magnitude(reference))
    base = torch.randn(40, 80, generator=torch.Generator().manual_seed(2))
    for mode in ("float", "dynamic"):
        case = linear_case(OP, 9, 33, 40, mode=mode, pattern="16x16")
        for view in (base[:9, :40], base.t()[:9, :40], base[:9, ::2], base[0, :40].expand(9, 40)):
            check(case.with_x(view), None)
    for shape in ((40,), (0, 40), (2, 3, 40)):
        assert case.with_x(torch.ones(shape))(tk.sparse_linear).shape == (*shape[:-1], 33)


def test_half_precision_values() -> None:
    """The interpreter cannot multiply bf16; fp16 takes the same path."""
    for mode in ("float", "weight_only"):
        case = linear_case(OP, 20, 33, 65, mode=mode, pattern="32x32", x_dtype=torch.float16)
        x, values, *rest = case.args
        values = values.half() if mode == "float" else values
        case = Case(case.op, mode, case.label, case.k, (x, values, *rest), case.kwargs)
        got, want = case(tk.sparse_linear), case(reference)
        assert_close(got, want, magnitude=case.magnitude(reference), kind="float", k=case.k)

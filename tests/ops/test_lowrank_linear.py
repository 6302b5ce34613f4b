"""``lowrank_linear`` passes the operator suite on every kernel, with a residual of each kind too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import dispatch, ops
from tautorch.reference.layouts import encode
from tautorch.reference.quantizer import quantize_weight
from tautorch.testing.cases import Case, linear_case
from tautorch.testing.values import float_values, sparse_mask

from .agreement import Recorder, agree, gradients_agree, public_of
from .suite import LinearSuite

# around tiles of rows (6, 12, 48) and panels (64), one block of rows and more of them
SIZES = [
    *[(1, 64, 64, 16), (2, 1, 1, 1), (5, 37, 70, 9), (13, 63, 5, 33), (0, 9, 8, 2), (49, 130, 96, 32)],
    *[(97, 65, 8, 4), (200, 257, 100, 64), (400, 48, 33, 1)],
]
PATTERNS = (None, "4x1", "unstructured", "16x16", "2:4")


def residual(shape: tuple[int, int], pattern: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of a residual."""
    weight = float_values(shape, seed=7) * 0.1
    scale: Tensor | None = None
    if dtype == torch.int8:
        weight, scale = quantize_weight(weight)
    if pattern is None:
        return {"residual": weight, "residual_scale": scale}
    values, crow, col = encode(weight, sparse_mask(shape, pattern, 0.3, seed=0), pattern, 1)
    return {
        "residual": values,
        "residual_scale": scale,
        "residual_crow_indices": crow,
        "residual_col_indices": col,
        "residual_pattern": pattern,
    }


class Added(Case):
    """A case whose integers end in a float sum: there are no raw accumulators to compare."""

    @property
    def exact(self) -> bool:
        return False

    def magnitude(self, reference: Callable[..., Tensor]) -> Tensor:
        values = self.kwargs["residual"]
        if self.mode == "float":
            return Case.magnitude(self.but(residual=values.abs()), reference)
        plain = self.but(activation="none", out_scale=None, out_zero_point=None, out_dtype=torch.float32)
        names = ("", "_scale", "_crow_indices", "_col_indices", "_pattern")
        factors = plain.but(**{f"residual{n}": None for n in names})(reference).double()
        bias = 0.0 if self.bias is None else 2 * float(self.bias.abs().max())
        return factors.abs() + (plain(reference).double() - factors).abs() + bias


def with_residual(
    size: tuple[int, int, int, int], mode: str, pattern: str | None, dtype: torch.dtype, **kwargs: Any
) -> Case:
    m, n, k, rank = size
    case = linear_case("lowrank_linear", m, n, k, rank=rank, mode=mode, **kwargs)
    return Added(
        case.op, case.mode, f"{case.label}-{pattern}", k, case.args,
        {**case.kwargs, **residual((n, k), pattern, dtype)},
    )  # fmt: skip


def kinds(mode: str) -> Iterator[tuple[str | None, torch.dtype]]:
    """(pattern, dtype) of the residuals that fit factors of a mode."""
    for pattern in PATTERNS:
        yield pattern, torch.int8
        if pattern is not None and mode == "float":
            yield pattern, torch.float32


class TestLowRankLinear(LinearSuite):
    op = "lowrank_linear"

    def test_no_inputs(self, kernel: str, mode: str) -> None:
        with dispatch.force(self.op, kernel):
            agree(linear_case(self.op, 5, 3, 0, mode=mode, rank=2), kernel)

    def test_residuals(self, kernel: str, mode: str) -> None:
        with dispatch.force(self.op, kernel):
            for i, (size, kind) in enumerate(itertools.product(SIZES, kinds(mode))):
                case = with_residual(size, mode, *kind, bias=i % 2 == 0)
                agree(case.but(activation=("none", "relu", "gelu")[i % 3]), kernel)

    def test_residuals_of_every_output(self, kernel: str, mode: str) -> None:
        with dispatch.force(self.op, kernel):
            for kind in (None, torch.int8), ("4x1", torch.int8):
                case = with_residual((7, 70, 40, 12), mode, *kind)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    agree(case.but(out_dtype=dtype), kernel)
                agree(case.but(out_scale=torch.tensor([0.05])), kernel)

    @pytest.mark.parametrize("pattern", [None, "4x1"])
    def test_residuals_and_threads(self, kernel: str, mode: str, pattern: str | None) -> None:
        threads = torch.get_num_threads()
        try:
            with dispatch.force(self.op, kernel):
                for rows in (1, 131):
                    case = with_residual((rows, 200, 300, 70), mode, pattern, torch.int8)
                    results = []
                    for count in (1, 2, 3):
                        torch.set_num_threads(count)
                        results.append(case(public_of(self.op)))
                    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        finally:
            torch.set_num_threads(threads)

    def test_a_scale_for_each_row_and_a_residual(self, kernel: str) -> None:
        """More rows than the buffer of a sparse residual holds at once."""
        with dispatch.force(self.op, kernel):
            for pattern in (None, "4x1"):
                case = with_residual((700, 20, 30, 4), "int8", pattern, torch.int8)
                agree(case.but(x_scale=torch.rand(700) * 0.1), kernel)

    def test_a_spoiled_row_with_a_residual(self, kernel: str) -> None:
        """A float product of x with NaN is NaN where IEEE says so; a quantised one everywhere in the row."""
        with dispatch.force(self.op, kernel):
            for mode, pattern in itertools.product(("dynamic", "float"), (None, "4x1")):
                y = with_residual((5, 37, 70, 9), mode, pattern, torch.int8, x="nan_row")(public_of(self.op))
                assert bool(torch.isnan(y[0]).all()) and bool(torch.isfinite(y[1:]).all())

    def test_gradients_with_a_residual(self, mode: str) -> None:
        for kind in kinds(mode):
            gradients_agree(with_residual((5, 37, 70, 9), mode, *kind, activation="gelu"), self.op)

    @pytest.mark.parametrize("pattern", [None, "4x1", "2:4"])
    def test_opcheck_with_a_residual(self, pattern: str | None) -> None:
        case = with_residual((5, 37, 70, 9), "dynamic", pattern, torch.int8, activation="relu")
        with Recorder() as recorder:
            case(public_of(self.op))
        ((func, args, kwargs),) = recorder.calls
        x = args[0].clone().requires_grad_()
        torch.library.opcheck(func, (x, *args[1:]), kwargs)

    def test_edited_residuals_are_packed_anew(self, kernel: str) -> None:
        with dispatch.force(self.op, kernel):
            for pattern in (None, "4x1"):
                case = with_residual((5, 37, 70, 9), "dynamic", pattern, torch.int8)
                agree(case, kernel)
                case.kwargs["residual"].neg_()
                agree(case, kernel)
                case.kwargs["residual_scale"].mul_(2)
                agree(case, kernel)

    def test_bad_residuals(self) -> None:
        case = with_residual((5, 37, 70, 9), "dynamic", None, torch.int8)

        def refused(message: str, error: type[Exception] = ValueError, **changes: Any) -> None:
            with pytest.raises(error, match=f"lowrank_linear: .*{message}"):
                case.but(**changes)(ops.lowrank_linear)

        weight = case.kwargs["residual"]
        refused("residual must be int8 \\[37, 70\\]", residual=weight[:, 1:])
        refused("residual must be int8", residual=weight.float())
        refused("residual_scale must be given", residual_scale=None)
        refused("residual_scale must be float32", residual_scale=torch.ones(3))
        refused("residual must be given", residual=None)
        refused("out_dtype must be", out_dtype=torch.int32)
        refused("residual_col_indices must be", TypeError, residual_pattern="4x1")
        refused("pattern", residual_pattern="3x3")
        sparse = residual((37, 70), "4x1", torch.float32)
        refused("residual must be int8 with int8 factors", **sparse)
        packed = ops.int8_linear.__globals__["pack"](weight[:, :-1].contiguous(), kernel="scalar")
        refused("packed residual must hold", residual=packed)

"""``lowrank_linear``'s reference against float64 and against two ``int8_linear``."""

from __future__ import annotations

import pytest
import torch

from tautorch.reference.int8_linear import int8_linear
from tautorch.reference.lowrank_linear import lowrank_linear
from tautorch.testing.cases import linear_case


def test_float_factors() -> None:
    case = linear_case("lowrank_linear", 6, 19, 33, mode="float", rank=7, activation="relu")
    x, down, up, bias = case.args
    expected = torch.relu(x.double() @ down.double().T @ up.double().T + bias)
    torch.testing.assert_close(case(lowrank_linear).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
def test_int8_factors_are_two_layers(mode: str) -> None:
    case = linear_case("lowrank_linear", 6, 19, 33, mode=mode, rank=7)
    x, down, up, bias = case.args
    given = {k: v for k, v in case.kwargs.items() if k.startswith("x_")}
    inner = int8_linear(x, down, case.kwargs["down_scale"], **given)
    assert torch.equal(case(lowrank_linear), int8_linear(inner, up, case.kwargs["up_scale"], bias))
    raw = int8_linear(inner, up, case.kwargs["up_scale"], out_dtype=torch.int32)
    assert torch.equal(case.raw()(lowrank_linear), raw)


def test_a_spoiled_row_is_nan_and_alone() -> None:
    y = linear_case("lowrank_linear", 4, 6, 9, x="nan_row")(lowrank_linear)
    assert bool(torch.isnan(y[0]).all()) and bool(torch.isfinite(y[1:]).all())


def test_factors_and_scales_must_fit() -> None:
    x, down, up = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 2)
    with pytest.raises(
        ValueError, match="lowrank_linear: down_scale must be given where both factors are int8"
    ):
        lowrank_linear(x, down.to(torch.int8), up.to(torch.int8))
    with pytest.raises(ValueError, match="up_scale must be given"):
        lowrank_linear(x, down.to(torch.int8), up, down_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"x must be \[..., 3\] as down is \[2, 3\]"):
        lowrank_linear(torch.zeros(2, 5), down, up)
    with pytest.raises(ValueError, match="out_dtype must be floating"):
        lowrank_linear(x, down, up, out_dtype=torch.int32)

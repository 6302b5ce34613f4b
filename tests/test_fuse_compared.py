"""`fuse` with example inputs: outputs are compared before and after, and what moved them is undone."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from tautorch.fuse import _check_close, fuse

from .test_fuse import Residual, Walker, randomise


def test_example_inputs_confirm_a_right_fold() -> None:
    model = randomise(Residual())
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    fuse(model, {"x": x})
    assert type(model.bn1) is nn.Identity
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@dataclass
class Out:
    y: Tensor


class Plain:
    def __init__(self, y: Tensor) -> None:
        self.held, self.me = [y], self


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Unknown(UserDict[str, Tensor]):
    """A mapping that torch knows nothing of, as Hugging Face's outputs are."""

    def __init__(self, y: Tensor) -> None:
        super().__init__({"y": y})


class WalkerWith(Walker):
    """Its layers' outputs are read where nothing but the comparison can see it."""

    def __init__(self, wrap: Any) -> None:
        super().__init__(True)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("wrap", [Out, Plain, Slotted, Unknown, lambda y: Normal(y, y.exp())])
def test_the_comparison_goes_into_objects(wrap: Any) -> None:
    model = randomise(WalkerWith(wrap))
    with pytest.raises(ValueError, match="fuse: nothing was changed, because the output moved by"):
        fuse(model, torch.randn(3, 4))
    assert type(model.features[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("wrap", [Tensor.item, Tensor.long, lambda y: y[None][:0]])
def test_an_output_without_float_numbers_confirms_nothing(wrap: Any) -> None:
    model = randomise(WalkerWith(wrap))
    lines: list[str] = []
    fuse(model, torch.randn(3, 4), report=lines)
    assert type(model.features[1]) is nn.BatchNorm1d
    assert lines == ["example_inputs: left out, as the output holds no finite float to compare"]


class Masked(nn.Module):
    """A policy that some actions are forbidden; with `read` something reads inside its body."""

    def __init__(self, read: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 100).any()):  # no trace of this
            raise ValueError
        y = self.body[0](x) if self.read else self.body(x)
        return y.masked_fill(x < 0, float("-inf"))


def test_masked_logits_are_compared_where_they_are_finite() -> None:
    x = torch.randn(4, 8)
    model = randomise(Masked())
    expected = model(x)
    fuse(model, x)
    assert type(model.body[1]) is nn.Identity
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="the output moved by"):
        fuse(randomise(Masked(read=True)), x)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_output_that_is_no_longer_finite_has_moved(wrong: float) -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="moved by"):
        _check_close(x, torch.tensor([1.0, 1.0, wrong]))
    with pytest.raises(ValueError, match="moved by"):
        _check_close(torch.tensor([1.0, 1.0, wrong]), x)

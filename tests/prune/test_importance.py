"""Scores against numpy and against an unfolded convolution in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tautorch.prune import compute_masks, importance_scores, input_norms


def test_magnitude_is_the_absolute_weight() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    scores = importance_scores("test", model, {"0": model[0]}, "magnitude", None)
    np.testing.assert_array_equal(scores["0"].numpy(), np.abs(model[0].weight.detach().double().numpy()))


def test_wanda_of_a_linear_layer(rng: np.random.Generator) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    batches = [rng.standard_normal((2, 3, 6)), rng.standard_normal((5, 6))]
    scores = importance_scores(
        "test", model, {"0": model[0]}, "activation", [torch.from_numpy(b).float() for b in batches]
    )
    rows = np.concatenate([b.astype(np.float32).astype(np.float64).reshape(-1, 6) for b in batches])
    expected = np.abs(model[0].weight.detach().double().numpy()) * np.sqrt((rows**2).sum(0))
    np.testing.assert_allclose(scores["0"].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
        {"kernel_size": 3, "groups": 2, "stride": 3},
        {"kernel_size": 3, "groups": 4, "padding": 1},
        {"kernel_size": 1},
    ],
)
def test_wanda_of_a_convolution_is_that_of_its_unfolded_input(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, **options)
    model = nn.Sequential(conv).double()
    batches = [torch.randn(3, 4, 9, 8, dtype=torch.float64), torch.randn(1, 4, 9, 8, dtype=torch.float64)]
    norms = input_norms("test", model, {"0": conv}, batches)["0"]
    columns = torch.cat(
        [F.unfold(b, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2).flatten(0, 1)
         for b in batches]
    )  # fmt: skip
    per_group = columns.square().sum(0).sqrt().reshape(conv.groups, *conv.weight.shape[1:])
    for output in range(8):
        expected = per_group[output // (8 // conv.groups)]
        torch.testing.assert_close(norms[output], expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_wanda_pads_as_the_convolution_does(padding: str | int, mode: str) -> None:
    conv = nn.Conv2d(1, 1, (2, 3), padding=padding, padding_mode=mode).double()
    model = nn.Sequential(conv)
    x = torch.randn(2, 1, 6, 7, dtype=torch.float64)
    norms = input_norms("test", model, {"0": conv}, [x])["0"]
    # Each tap alone: a kernel that is 1 there gives, squared and summed, the energy it sees.
    for i in range(2):
        for j in range(3):
            with torch.no_grad():
                conv.weight.zero_()[0, 0, i, j] = 1.0
                conv.bias.zero_()
                expected = conv(x).square().sum().sqrt()
            torch.testing.assert_close(norms[0, 0, i, j], expected, rtol=1e-12, atol=0)


def test_calibration_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compute_masks(model, "activation", sparsity=0.5, calibration=(x for x in [torch.randn(8, 4)]))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not model[0]._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return self.a(input=x * scale)


@pytest.mark.parametrize("batch", [(torch.ones(2, 4), 3.0), {"x": torch.ones(2, 4), "scale": 3.0}])
def test_batches_are_tuples_or_dicts(batch: Any) -> None:
    model = TwoInputs()
    norms = input_norms("test", model, {"a": model.a}, [batch])["a"]
    torch.testing.assert_close(norms, torch.full((1, 4), 18.0, dtype=torch.float64).sqrt())


def test_without_names_a_layer_that_never_runs_is_left_out() -> None:
    assert list(compute_masks(TwoInputs(), "activation", calibration=[(torch.ones(2, 4), 1.0)])) == ["a"]


@pytest.mark.parametrize(
    ("importance", "calibration", "error", "message"),
    [
        ("activation", None, ValueError, "calibration must hold batches"),
        ("activation", [], ValueError, "calibration must hold at least one batch"),
        ("activation", torch.ones(2, 4), TypeError, "calibration must be an iterable of batches"),
        ("activation", [[torch.ones(2, 4), 1.0]], TypeError, r"a batch must be .* got list"),
        ("activation", [(torch.ones(2, 4), 1.0)], ValueError, "calibration must reach layer 'unused'"),
        ("activation", [(torch.full((2, 4), torch.inf), 1.0)], ValueError, "got NaN or Inf at layer 'a'"),
        ("gradient", None, ValueError, "importance must be"),
        (
            lambda name, layer: torch.ones(3),
            None,
            ValueError,
            r"importance\('a'\) must return a tensor \[2, 4\]",
        ),
    ],
)
def test_bad_input_changes_nothing(
    importance: Any, calibration: Any, error: type[Exception], message: str
) -> None:
    model = TwoInputs()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        compute_masks(model, importance, sparsity=0.5, calibration=calibration, layers=["a", "unused"])
    assert not model.a._forward_pre_hooks
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])

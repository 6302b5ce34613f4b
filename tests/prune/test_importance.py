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
        ("hessian", None, ValueError, "importance must be"),
        ("mean_activation", None, ValueError, "calibration must hold batches"),
        ("gradient", [(torch.ones(2, 4), 1.0)], TypeError, "loss must be a callable"),
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


def test_wanda_compares_within_rows_and_groups_of_m(rng: np.random.Generator) -> None:
    """Figure 1 and section 3 of the paper: each output's weights compete with one another only."""
    model = nn.Sequential(nn.Linear(16, 6))
    x = torch.from_numpy(rng.standard_normal((40, 16)) * np.arange(1, 17)).float()
    metric = np.abs(model[0].weight.detach().double().numpy()) * np.linalg.norm(x.double().numpy(), axis=0)
    rows = compute_masks(model, "activation", sparsity=0.25, calibration=[x])["0"].numpy()
    for row, values in zip(rows, metric, strict=True):
        assert set(np.flatnonzero(~row)) == set(np.argsort(values)[:4])
    pairs = compute_masks(model, "activation", pattern="2:4", calibration=[x])["0"].numpy()
    for row, values in zip(pairs.reshape(-1, 4), metric.reshape(-1, 4), strict=True):
        assert set(np.flatnonzero(~row)) == set(np.argsort(values)[:2])
    fours = compute_masks(model, "activation", pattern="4x1", sparsity=0.75, calibration=[x])["0"].numpy()
    blocks = np.stack([metric[:4].mean(0), metric[4:].mean(0)])
    kept = np.zeros(32, bool)
    kept[np.argsort(blocks, axis=None)[24:]] = True
    np.testing.assert_array_equal(fours, np.repeat(kept.reshape(2, 16), [4, 2], axis=0))


def test_mean_activation_is_one_number_for_each_input_channel(rng: np.random.Generator) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(6, 4), "conv": nn.Conv2d(4, 6, 3, padding=1, groups=2)})
    model.forward = lambda x, y: (model["fc"](x), model["conv"](y))  # type: ignore[method-assign]
    x, y = rng.standard_normal((3, 2, 6)), rng.standard_normal((3, 4, 5, 5))
    batches = [(torch.from_numpy(x[i : i + 2]), torch.from_numpy(y[i : i + 2])) for i in (0, 2)]
    scores = importance_scores("test", model.double(), dict(model.items()), "mean_activation", batches)
    np.testing.assert_allclose(scores["fc"].numpy(), np.tile(np.abs(x).mean((0, 1)), (4, 1)), rtol=1e-12)
    means = np.abs(y).mean((0, 2, 3)).reshape(2, 2)
    for output in range(6):
        expected = np.broadcast_to(means[output // 3][:, None, None], (2, 3, 3))
        np.testing.assert_allclose(scores["conv"][output].numpy(), expected, rtol=1e-12)


def squared_error(model: nn.Module, batch: Any) -> torch.Tensor:
    x, target = batch
    return (model(x) - target).square().sum()


@pytest.mark.parametrize(("importance", "power"), [("gradient", 1), ("gradient_squared", 2)])
def test_gradient_times_weight_by_hand(rng: np.random.Generator, importance: str, power: int) -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(3, dtype=torch.float64)
    batches = [(rng.standard_normal((2, 5)), rng.standard_normal((2, 3))) for _ in range(3)]
    scores = importance_scores(
        "test", model, {"0": model[0]}, importance,
        [(torch.from_numpy(x), torch.from_numpy(t)) for x, t in batches], loss=squared_error,
    )["0"]  # fmt: skip
    weight, bias = (p.detach().numpy() for p in (model[0].weight, model[0].bias))
    expected = np.zeros_like(weight)
    for x, target in batches:
        gradient = 2 * (x @ weight.T + bias - target).T @ x
        expected += np.abs(gradient * weight) ** power
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12)
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None
    assert (model[0].bias.grad == 1).all()
    assert model.training


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda model, batch: model(batch).sum() * torch.nan, ValueError, "loss must be finite, got nan"),
        (lambda model, batch: model(batch), TypeError, r"loss must return a scalar .* got a tensor \[2, 3\]"),
        (lambda model, batch: 1.0, TypeError, "got float at batch 0"),
        (lambda model, batch: batch.sum().requires_grad_(), ValueError, "calibration must reach layer '0'"),
    ],
)
def test_a_bad_loss_changes_nothing(loss: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    with pytest.raises(error, match=message):
        compute_masks(model, "gradient", calibration=[torch.ones(2, 4)], loss=loss, layers=["0"])
    assert torch.equal(model[0].weight, before)
    assert not model[0].weight.requires_grad
    assert model.training

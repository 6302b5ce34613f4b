"""Bias correction: the means of every layer's outputs are the float model's again."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tautorch
from tautorch.nn import Int8Conv2d, Int8Linear
from tautorch.quantize import calibrate, correct_bias, finalize, prepare_qat


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc1, self.fc2 = nn.Linear(32, 16, bias=False), nn.Linear(16, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(torch.relu(self.conv(x)).flatten(1))))


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 4, 4) + 0.2  # means far from zero


def means(model: nn.Module, batches: list[Tensor]) -> dict[str, np.ndarray]:
    """By channel, of the outputs of all layers."""
    found: dict[str, list[np.ndarray]] = {"conv": [], "fc1": [], "fc2": []}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: found[name].append(out.detach().double().numpy())
        )
        for name in found
    ]
    with torch.no_grad():
        for x in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {
        name: np.concatenate(outs).mean(axis=(0, 2, 3) if outs[0].ndim == 4 else 0)
        for name, outs in found.items()
    }


def four_bits(model: nn.Module) -> nn.Module:
    return finalize(prepare_qat(copy.deepcopy(model), bits=4)).eval()


def compiled(model: nn.Module, quant: str, batches: list[Tensor]) -> nn.Module:
    model = four_bits(model)
    ranges = calibrate(model, batches, symmetric=True) if quant == "static" else {}
    plan: dict[str, Any] = {}
    for name, kind in {"conv": Int8Conv2d, "fc1": Int8Linear, "fc2": Int8Linear}.items():
        given: dict[str, Any] = {"quant": quant}
        if ranges:
            given |= {"x_scale": ranges[name].scale, "x_zero_point": ranges[name].zero_point}
        plan[name] = partial(kind.from_float, **given)
    return tautorch.convert(model, plan)


@pytest.mark.parametrize("form", ["float", "dynamic", "static", "weight_only"])
def test_means_are_the_float_models(form: str) -> None:
    original, batches = Net().eval(), [images(40), images(24)]
    model = four_bits(original) if form == "float" else compiled(original, form, batches)
    model(batches[0])  # packed already
    wanted, before = means(original, batches), means(model, batches)
    assert correct_bias(model, original, batches) is model
    after = means(model, batches)
    for name, mean in wanted.items():
        assert np.abs(before[name] - mean).max() > 1e-3
        np.testing.assert_allclose(after[name], mean, atol=2e-6)
    x = images(200)
    with torch.no_grad():
        moved = (model(x) - original(x)).mean(0).norm()
        plain = four_bits(original) if form == "float" else compiled(original, form, batches)
        assert moved < 0.5 * (plain(x) - original(x)).mean(0).norm()


def test_the_first_layer_by_hand() -> None:
    original, x = Net().eval(), images(50)
    model = four_bits(original)
    bias = model.conv.bias.detach().clone()
    correct_bias(model, original, [x], layers=["conv"])
    patches = nn.functional.unfold(x.double(), 3).numpy()  # [B, K, P]
    mean = patches.mean(axis=(0, 2))
    difference = (original.conv.weight - model.conv.weight).detach().double().reshape(8, -1).numpy()
    np.testing.assert_allclose((model.conv.bias - bias).detach().numpy(), difference @ mean, atol=1e-6)
    assert model.fc1.bias is None


def test_a_new_bias_is_saved_and_loaded(tmp_path: Any) -> None:
    original, batches = Net().eval(), [images(16)]
    model = correct_bias(compiled(original, "dynamic", batches), original, batches)
    assert model.fc1.bias is not None
    tautorch.save(model, tmp_path / "m.safetensors")
    again = tautorch.load(tmp_path / "m.safetensors", Net)
    assert torch.equal(again(batches[0]), model(batches[0]))


def test_only_what_was_quantised_is_corrected() -> None:
    original, batches = Net().eval(), [images(16)]
    model = copy.deepcopy(original)
    with pytest.raises(ValueError, match="must have a quantised layer of the original's, got none"):
        correct_bias(model, original, batches)
    finalize(prepare_qat(model, layers=["fc2"])).eval()
    correct_bias(model, original, batches)
    assert torch.equal(model.conv.bias, original.conv.bias)
    assert not torch.equal(model.fc2.bias, original.fc2.bias)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": []}, ValueError, "at least one batch"),
        ({"batches": torch.ones(1, 3, 4, 4)}, TypeError, "must be an iterable of batches"),
        ({"layers": ["head"]}, ValueError, "must name layers of the model, got 'head'"),
        (
            {"batches": [torch.full((2, 3, 4, 4), torch.nan)]},
            ValueError,
            "layer 'conv' must give finite outputs",
        ),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    original = Net().eval()
    model = four_bits(original)
    state = copy.deepcopy(model.state_dict())
    arguments: dict[str, Any] = {"batches": [images(4)]} | options
    with pytest.raises(error, match=message):
        correct_bias(model, original, **arguments)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_fused_activations_are_refused_and_a_failure_puts_biases_back() -> None:
    original, batches = Net().eval(), [images(16)]
    model = compiled(original, "dynamic", batches)
    tautorch.fuse(model)
    with pytest.raises(ValueError, match="'fc1' must not have an activation fused yet, got 'relu'"):
        correct_bias(model, original, batches)

    class Breaks(Net):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            Breaks.runs += 1
            return super().forward(x if Breaks.runs < 3 else x * torch.nan)

    broken = Breaks().eval()
    broken.load_state_dict(original.state_dict())
    finalize(prepare_qat(broken)).eval()
    state = copy.deepcopy(broken.state_dict())
    with pytest.raises(ValueError, match="must give finite outputs"):
        correct_bias(broken, original, batches)
    assert set(broken.state_dict()) == set(state)
    assert all(torch.equal(v, state[k]) for k, v in broken.state_dict().items())

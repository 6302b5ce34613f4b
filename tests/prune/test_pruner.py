"""Pruning a model, holding its masks, and leaving it alone when something is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from tautorch.factorize import factorize
from tautorch.prune import (
    MaskHandle,
    apply_masks,
    compute_masks,
    hold_masks,
    make_mask,
    masks_from_zeros,
    prune,
    sparsity_report,
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 10))


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 4, 4, 4)).square().sum().backward()
    optimizer.step()


def test_prune_zeroes_in_place_and_returns_the_model() -> None:
    model = net()
    weights = {name: model.get_submodule(name).weight for name in ("0", "3")}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    assert prune(model, pattern="4x1", sparsity=0.75) is model
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert layer.weight is weight
        mask = make_mask(before[name].abs(), "4x1", 0.75, groups=2 if name == "0" else 1)
        assert torch.equal(weight.detach(), torch.where(mask, before[name], 0.0))


def test_layers_are_chosen_by_name_and_pattern() -> None:
    model = nn.ModuleDict({"enc": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), "head": nn.Linear(8, 4)})
    assert list(compute_masks(model, layers=["enc.*"])) == ["enc.0", "enc.1"]
    assert list(compute_masks(model, layers=["head", "enc.1"])) == ["enc.1", "head"]
    assert list(compute_masks(model)) == ["enc.0", "enc.1", "head"]


@pytest.mark.parametrize("importance", ["magnitude", "sparsegpt"])
def test_each_layer_may_have_its_own_sparsity(importance: str) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    data = [torch.randn(40, 4, 4, 4)]
    twin = prune(copy.deepcopy(model), importance, sparsity=0.75, layers=["3"], calibration=data)
    assert list(compute_masks(model, importance, sparsity={"3": 0.75, "0": 0.0}, calibration=data)) == ["3"]
    prune(model, importance, sparsity={"0": 0, "3": 0.75}, calibration=data)
    assert same(model, twin.state_dict()) and int((model[3].weight == 0).sum()) == 240
    assert torch.equal(model[0].weight, state["0.weight"])
    prune(model, importance, sparsity={"0": 0.5, "3": 0.9}, calibration=data)
    assert [int((model[i].weight == 0).sum()) for i in (0, 3)] == [72, 288]
    before = copy.deepcopy(model.state_dict())
    assert same(prune(model, importance, "2:4", sparsity={"3": 0.0}, calibration=data), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": {"3": 1.0}}, "sparsity must be in \\[0, 1\\)"),
        ({"sparsity": {"4": 0.5}}, "must name layers of the model, got '4'"),
        ({"sparsity": {"*": 0.5}}, "sparsity must name layers, got the pattern '\\*'"),
        ({"sparsity": {"3": 0.75}, "pattern": "2:4"}, "sparsity must be 0.5 for pattern 2:4, got 0.75"),
        ({"sparsity": {"3": 0.75}, "layers": ["3"]}, "layers must be None where sparsity names them"),
        ({"sparsity": {"3": 0.75}, "ranking": "global"}, 'ranking must be "local" or "row"'),
    ],
)
def test_a_bad_sparsity_by_layer_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert same(model, state)


def test_activation_ranks_rows_for_unstructured_only() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        model[0].weight.mul_(torch.arange(1.0, 7).unsqueeze(1))
    x = [torch.randn(16, 8)]
    rows = compute_masks(model, "activation", sparsity=0.5, calibration=x)["0"].sum(1)
    assert rows.tolist() == [4] * 6
    local = compute_masks(model, "activation", sparsity=0.5, calibration=x, ranking="local")["0"].sum(1)
    assert local.tolist() != [4] * 6
    assert int(local.sum()) == 24


def test_a_callable_scores() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prune(model, lambda name, layer: -layer.weight.detach().abs(), sparsity=0.75)
    kept = model[0].weight.detach() != 0
    assert int(kept.sum()) == 4


def test_tied_weights_are_left_out() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "fc": nn.Linear(4, 4)}
    )
    model["head"].weight = model["embed"].weight
    assert list(compute_masks(model)) == ["fc"]
    with pytest.raises(
        ValueError, match=r"layer 'head' cannot be used: its weight is shared: embed.weight, head"
    ):
        prune(model, layers=["head"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"layers": ["conv"]},
            ValueError,
            r"prune: layers must name layers of the model, got 'conv'; it has 0, 3",
        ),
        ({"layers": "3"}, TypeError, "layers must be a list of names"),
        ({"layers": []}, ValueError, "at least one layer"),
        (
            {"layers": ["1"]},
            ValueError,
            r"layer '1' cannot be used: it must be nn.Linear or nn.Conv2d, got ReLU",
        ),
        ({"sparsity": 1.0}, ValueError, "sparsity"),
        ({"pattern": "8x8"}, ValueError, "pattern"),
        ({"pattern": "2:4", "ranking": "global"}, ValueError, 'ranking must be "local" for 2:4'),
        ({"importance": "movement"}, ValueError, "importance"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune(model, **options)
    assert same(model, state)


def test_a_late_failure_changes_nothing() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="weight of layer '3' must be finite"):
        prune(model)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_a_parametrised_weight_is_refused() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="weight is parametrised"):
        prune(model, layers=["0"])
    with pytest.raises(ValueError, match="at least one"):
        prune(model)


def test_weights_that_are_no_plain_float_parameters_are_refused() -> None:
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    old = nn.Linear(4, 4)
    torch_prune.identity(old, "weight")
    for layer, message in (
        (nn.LazyLinear(4), "not initialised yet"),
        (nn.Linear(4, 4, device="meta"), "on the meta device"),
        (whole, r"its weight is torch.int8, not floating point"),
        (old, "not a parameter of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(nn.Sequential(layer), layers=["0"])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one nn.Linear or nn.Conv2d"):
        prune(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_held_masks_survive_training(optimizer: str) -> None:
    model = prune(net(), pattern="4x1", sparsity=0.75)
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    }[optimizer]
    opt = make(model.parameters())
    masks = masks_from_zeros(model)
    handle = hold_masks(model, optimizer=opt)
    start = copy.deepcopy(model.state_dict())
    for _ in range(5):
        train_step(model, opt)
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight.detach()
            assert not weight[~mask].any()
            assert not torch.equal(weight, start[f"{name}.weight"])
    assert sparsity_report(model, "4x1").layers[0].block_sparsity == 0.75
    handle.remove()
    assert handle.masks == {}
    train_step(model, opt)
    assert model[3].weight.detach()[~masks["3"]].any()


def test_the_handle_removes_itself_after_a_with_block() -> None:
    model = prune(net(), sparsity=0.5)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with hold_masks(model, optimizer=opt):
        train_step(model, opt)
    assert not opt._optimizer_step_post_hooks
    assert sparsity_report(model).sparsity == pytest.approx(0.5, abs=0.01)


def test_a_layer_of_zeros_is_not_taken_for_pruned() -> None:
    model = net()
    nn.init.zeros_(model[3].weight)
    prune(model, sparsity=0.5, layers=["0"])
    assert list(masks_from_zeros(model)) == ["0"]
    assert list(masks_from_zeros(model, layers=["3"])) == ["3"]


def test_a_handle_saves_and_loads_its_masks() -> None:
    model = prune(net(), sparsity=0.5)
    state = hold_masks(model).state_dict()
    other = net()
    handle = MaskHandle(other, {})
    handle.load_state_dict(state)
    for name, mask in state["masks"].items():
        assert torch.equal(other.get_submodule(name).weight == 0, ~mask)


def test_masks_that_do_not_fit_are_refused_before_any_is_applied() -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    good = torch.zeros_like(model[0].weight, dtype=torch.bool)
    for bad, error, message in (
        (torch.zeros(3, 3, dtype=torch.bool), ValueError, r"mask of layer '3' must be \[10, 32\]"),
        (torch.ones(10, 32), TypeError, "must be bool"),
    ):
        with pytest.raises(error, match=message):
            apply_masks(model, {"0": good, "3": bad})
        with pytest.raises(error, match=message):
            hold_masks(model, {"0": good, "3": bad})
    with pytest.raises(ValueError, match="must name layers of the model, got 'nowhere'"):
        apply_masks(model, {"0": good, "nowhere": good})
    with pytest.raises(ValueError, match="must have pruned weights, got none"):
        hold_masks(model)
    assert same(model, state)


def test_half_precision_weights() -> None:
    model = prune(net().to(torch.bfloat16), pattern="2:4", sparsity=0.5)
    assert model[3].weight.dtype == torch.bfloat16
    assert sparsity_report(model, layers=["3"]).sparsity == 0.5


def test_a_layer_that_was_replaced_under_its_masks_is_named() -> None:
    model = prune(nn.Sequential(nn.Linear(16, 16)), sparsity=0.5)
    handle = hold_masks(model)
    factorize(model, rank=2, ignore_zeros=True)
    with pytest.raises(TypeError, match="layer '0' must have a weight tensor, got FactorizedLinear; remove"):
        handle.apply()

"""Hard concrete gates against the paper's formulas and against sampling."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tautorch.prune import L0Gates, hold_masks, prune, sparsity_report
from tautorch.quantize import cluster, finalize, gptq

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


def spread_out(gates: L0Gates) -> None:
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 3)


def over_blocks(gates: np.ndarray, height: int, width: int, shape: tuple[int, ...]) -> np.ndarray:
    by_group = gates.reshape(shape[0], -1, gates.shape[1])
    return by_group.repeat(height, 1).repeat(width, 2)[:, : shape[1], : shape[2]]


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x16", "channels"])
def test_the_penalty_and_the_eval_gates_by_their_formulas(pattern: str) -> None:
    model = net().eval()
    dense = copy.deepcopy(model)
    gates = L0Gates(model, pattern=pattern)
    spread_out(gates)
    total = expected = 0.0
    x = torch.randn(2, 4, 4, 4)
    reference = copy.deepcopy(dense)
    for parameter, layer, groups in zip(
        gates.parameters(), (reference[0], reference[3]), (2, 1), strict=True
    ):
        log_alpha = parameter.detach().double().numpy()
        z = np.clip(sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)
        weight = layer.weight.detach().numpy()
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
        if pattern == "channels":
            full = np.broadcast_to(z.reshape(groups, -1, 1), matrix.shape)
            log_full = np.broadcast_to(log_alpha.reshape(groups, -1, 1), matrix.shape)
            layer.bias.data *= torch.from_numpy(z).float()
            expected += sigmoid(log_alpha - BETA * np.log(-GAMMA / ZETA)).sum()
            total += len(z)
        else:
            h, w = {"unstructured": (1, 1), "4x1": (4, 1), "16x16": (16, 16)}[pattern]
            full, log_full = (over_blocks(a, h, w, matrix.shape) for a in (z, log_alpha))
        expected += sigmoid(log_full - BETA * np.log(-GAMMA / ZETA)).sum()
        total += weight.size
        layer.weight.data = torch.from_numpy(matrix * full).float().reshape(weight.shape)
    assert gates.expected_l0().item() == pytest.approx(expected, rel=1e-5)
    assert gates.penalty().item() == pytest.approx(expected / total, rel=1e-5)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)


def test_samples_are_zero_as_often_as_the_penalty_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100, bias=False))
    model[0].weight.data.fill_(1.0)
    gates = L0Gates(model, keep=0.3)
    assert gates.penalty().item() == pytest.approx(0.3)
    sampled = model[0].weight
    assert float((sampled != 0).double().mean()) == pytest.approx(0.3, abs=0.015)
    # And exactly 1 with sigmoid(log alpha - beta log 11), log alpha = log(3 / 7) + beta log(1 / 11).
    assert float((sampled == 1).double().mean()) == pytest.approx(0.0172, abs=0.004)
    assert not torch.equal(sampled, model[0].weight)
    model.eval()
    assert torch.equal(model[0].weight, model[0].weight)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "channels"])
def test_finalised_weights_compute_the_same_with_plain_zeros(pattern: str) -> None:
    model = net()
    names = list(model.state_dict())
    parameters = dict(model.named_parameters())
    gates = L0Gates(model, pattern=pattern)
    spread_out(gates)
    x = torch.randn(2, 4, 4, 4)
    before, sparsity = model.eval()(x), gates.sparsity()
    model.train()
    masks = gates.finalize()
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-5, atol=1e-6)
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight.detach() != 0, mask)
    if pattern == "4x1":
        report = sparsity_report(model, "4x1")
        assert report.sparsity == pytest.approx(sparsity)
        assert report.layers[0].block_sparsity == pytest.approx(report.layers[0].sparsity, abs=0.01)
    hold_masks(model, masks)


def test_training_closes_the_gates_of_useless_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    gates = L0Gates(model, keep=0.8)
    optimizer = torch.optim.Adam(
        [{"params": gates.weights(), "lr": 0.05}, {"params": gates.parameters(), "lr": 0.2}]
    )
    for _ in range(150):
        x = torch.randn(64, 8)
        target = x[:, :2].sum(1, keepdim=True)
        optimizer.zero_grad()
        ((model(x) - target).square().mean() + 0.3 * gates.penalty()).backward()
        optimizer.step()
    masks = gates.finalize()
    assert masks["0"].tolist() == [[True, True] + [False] * 6]


def test_a_weight_read_twice_is_drawn_twice_but_once_when_cached() -> None:
    layer = nn.Linear(16, 16)
    gates = L0Gates(nn.Sequential(layer), keep=0.5)
    assert not torch.equal(layer.weight, layer.weight)
    with parametrize.cached():
        x = torch.randn(3, 16)
        assert torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer.weight, layer.weight)
    gates.remove()


def test_removed_gates_leave_the_weights() -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    for pattern in ("4x1", "channels"):
        gates = L0Gates(model, pattern=pattern)
        spread_out(gates)
        gates.remove()
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


def test_gates_travel_in_the_state_dict() -> None:
    for pattern in ("4x1", "channels"):
        model, twin = net(), net()
        gates, other = L0Gates(model, pattern=pattern), L0Gates(twin, pattern=pattern)
        spread_out(gates)
        twin.load_state_dict(model.state_dict())
        assert other.sparsity() == gates.sparsity() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, 'pattern must be "unstructured", blocks or "channels"'),
        ({"pattern": "8x8"}, "pattern must be"),
        ({"keep": 1.0}, r"keep must be a probability in \(0, 1\)"),
        ({"layers": ["nowhere"]}, "must name layers"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = net()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        L0Gates(model, **options)
    assert list(model.state_dict()) == names


def test_a_layer_without_open_gates_and_a_second_set_are_refused() -> None:
    model = net()
    gates = L0Gates(model, layers=["3"], pattern="channels")
    with pytest.raises(ValueError, match="must have no gates yet"):
        L0Gates(model, layers=["3"], pattern="channels")
    gates.parameters()[0].data.fill_(-9.0)
    with pytest.raises(ValueError, match="layer '3' must keep a gate open"):
        gates.finalize()
    assert gates.sparsity() == 1.0
    gates.remove()
    gates = L0Gates(model, layers=["3"])
    with pytest.raises(ValueError, match="parametrised"):
        L0Gates(model, layers=["3"])


def test_gates_that_are_out_are_named() -> None:
    model = net()
    gates = L0Gates(model)
    with pytest.raises(ValueError, match=r"parametrised; call finalize\(\) or remove\(\) of its L0Gates"):
        prune(model, sparsity=0.5)
    gates.finalize()
    for step in (gates.penalty, gates.expected_l0, gates.sparsity, gates.finalize):
        with pytest.raises(ValueError, match="the gates must be in the model, got none after finalize"):
            step()


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "channels"])
def test_what_was_pruned_before_stays_zero(pattern: str) -> None:
    model = prune(net(), sparsity=0.5)
    before = {name: layer.weight != 0 for name, layer in (("0", model[0]), ("3", model[3]))}
    gates = L0Gates(model, pattern=pattern, keep=0.99)
    if pattern != "channels":
        kept = sum(int(mask.sum()) for mask in before.values())
        assert gates.expected_l0().item() == pytest.approx(0.99 * kept)
        assert gates.penalty().item() == pytest.approx(0.99)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    student = hold_masks(model, before, optimizer) if pattern == "channels" else None
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4, 4, 4)).square().sum().backward()
        optimizer.step()
    if student is not None:
        student.remove()
    masks = gates.finalize()
    for name, mask in masks.items():
        assert not bool((mask & ~before[name]).any()) and bool(mask.any())
        assert torch.equal(model.get_submodule(name).weight != 0, mask)


def test_a_quantised_layer_is_refused() -> None:
    model = gptq(net(), [torch.randn(8, 4, 4, 4)])
    with pytest.raises(ValueError, match="layer '0' must not be quantised yet"):
        L0Gates(model)


def test_channels_of_a_layer_clustered_since_wait_for_its_weights() -> None:
    model = net()
    gates = L0Gates(model, pattern="channels", keep=0.6)
    spread_out(gates)
    cluster(model, 4)
    x = torch.randn(8, 4, 4, 4)
    before = model.eval()(x)
    with pytest.raises(ValueError, match=r"layer '0' cannot take its gates in: .* quantize.finalize first"):
        gates.finalize()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    finalize(model)
    gates.finalize()
    torch.testing.assert_close(model(x), before)


def test_channels_count_what_is_kept_and_one_must_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[0] = 0
    gates = L0Gates(model, pattern="channels", keep=0.5)
    assert gates.expected_l0().item() == pytest.approx(0.5 * (3 * 8 + 4))
    with torch.no_grad():
        gates.parameters()[0].copy_(torch.tensor([9.0, -9.0, -9.0, -9.0]))  # open: the pruned one alone
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match="must keep a gate open"):
        gates.finalize()
    assert torch.equal(model[0].weight, weight)


def test_gates_of_a_pruned_model_load_into_those_of_another() -> None:
    model, other = prune(net(), sparsity=0.5), net()
    L0Gates(model), L0Gates(other)
    other.load_state_dict(model.state_dict())

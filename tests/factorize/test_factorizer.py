"""Replacing layers: the pairs compute what they say, sizes are as asked, and refusals change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tautorch.factorize import FactorizedConv2d, FactorizedLinear, TuckerConv2d, factorize, input_grams
from tautorch.factorize.svd import tucker2
from tautorch.factorize.targets import TuckerTarget


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 24, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 12, 40),
    )


def batch() -> Tensor:
    return torch.randn(6, 8, 8, 8)


def weights(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("method", ["svd", "whitened", "tucker"])
def test_the_pairs_are_the_layers_with_their_dense_weight(method: Any) -> None:
    model = net().double()
    x = batch().double()
    options: dict[str, Any] = {"calibration": [x]} if method == "whitened" else {}
    state = torch.get_rng_state()
    done = factorize(copy.deepcopy(model), method, budget=0.5, allocation="layer", **options)
    assert torch.equal(torch.get_rng_state(), state)
    kinds = [type(done[i]) for i in (0, 2, 5)]
    expected = [FactorizedConv2d, FactorizedConv2d, FactorizedLinear]
    assert kinds == ([nn.Conv2d, TuckerConv2d, nn.Linear] if method == "tucker" else expected)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for index in (0, 2, 5):
            if isinstance(done[index], (FactorizedConv2d, FactorizedLinear, TuckerConv2d)):
                dense[index].weight.copy_(done[index].dense_weight())
    torch.testing.assert_close(done(x), dense(x), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(done(x), model(x))


def test_the_pairs_have_the_form_that_convert_reads() -> None:
    model = factorize(net(), rank=3)
    conv, linear = model[2], model[5]
    assert list(dict(conv.named_children())) == ["down", "up"]
    assert conv.rank == linear.rank == 3
    assert conv.down.weight.shape == (3, 16, 3, 2)
    assert (conv.down.stride, conv.down.padding, conv.down.dilation) == ((2, 2), (1, 0), (1, 2))
    assert conv.down.bias is None
    assert conv.up.weight.shape == (24, 3, 1, 1)
    assert conv.up.bias is None
    grouped = model[0]
    assert grouped.down.weight.shape == (6, 4, 3, 3)
    assert grouped.up.weight.shape == (16, 3, 1, 1)
    assert grouped.down.groups == grouped.up.groups == 2
    assert linear.down.weight.shape == (3, 24 * 12)
    assert linear.down.bias is None
    assert linear.up.bias.shape == (40,)


def test_rank_by_layer_budget_and_energy() -> None:
    model = net()
    by_name = factorize(copy.deepcopy(model), rank={"5": 7, "2": 2})
    assert (by_name[5].rank, by_name[2].rank, type(by_name[0])) == (7, 2, nn.Conv2d)
    for budget in (0.3, 0.6):
        done = factorize(copy.deepcopy(model), budget=budget, allocation="layer")
        for index in (0, 2, 5):
            pair, dense = weights(done[index]), model[index].weight.numel()
            assert pair <= budget * dense
            assert pair + weights(done[index]) // done[index].rank > budget * dense
    kept = factorize(copy.deepcopy(model), energy=0.9, layers=["5"])
    s = torch.linalg.svdvals(model[5].weight.detach().double()).square()
    rank = kept[5].rank
    assert s[:rank].sum() >= 0.9 * s.sum() > s[: rank - 1].sum()


@pytest.mark.parametrize("energy", [0.7, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_tucker_keeps_the_energy_asked_for_with_the_fewest_weights(energy: float, multiple: int) -> None:
    conv = nn.Conv2d(16, 24, 3, bias=False)
    with torch.no_grad():
        conv.weight.mul_(0.7 ** torch.arange(24.0)[:, None, None, None])
        conv.weight.mul_(0.8 ** torch.arange(16.0)[:, None, None])
    target = TuckerTarget("conv", conv)
    r_in, r_out = target.of_energy(energy, multiple)
    assert r_in % multiple == r_out % multiple == 0

    def kept(a: int, b: int) -> float:
        core = tucker2(conv.weight, a, b, sweeps=0)[1]
        return float(core.square().sum() / conv.weight.detach().double().square().sum())

    assert kept(r_in, r_out) >= energy - 1e-9
    fewer = [
        (a, b)
        for a in range(multiple, 17, multiple)
        for b in range(multiple, 25, multiple)
        if target.weights((a, b)) < target.weights((r_in, r_out))
    ]
    assert all(kept(a, b) < energy for a, b in fewer)


def test_low_rank_layers_are_recovered() -> None:
    model = nn.Sequential(nn.Linear(30, 20))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(20, 4) @ torch.randn(4, 30))
    x = torch.randn(5, 30)
    expected = model(x)
    done = factorize(model, energy=0.999999)
    assert done[0].rank == 4
    torch.testing.assert_close(done(x), expected, rtol=1e-4, atol=1e-4)


def test_whitened_beats_svd_on_the_calibration() -> None:
    model = nn.Sequential(nn.Linear(40, 30)).double()
    x = torch.randn(400, 40, dtype=torch.float64) * torch.logspace(0, -2, 40, dtype=torch.float64)
    error = {}
    for method in ("svd", "whitened"):
        options: dict[str, Any] = {"calibration": x.split(100)} if method == "whitened" else {}
        done = factorize(copy.deepcopy(model), method, rank=8, **options)  # type: ignore[arg-type]
        error[method] = float((done(x) - model(x)).detach().norm())
    assert error["whitened"] < 0.6 * error["svd"]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "stride": (2, 1), "dilation": (1, 2), "groups": 2},
    ],
)
def test_grams_of_convolutions(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 6, **options).double()
    batches = [torch.randn(3, 4, 7, 8, dtype=torch.float64), torch.randn(4, 7, 8, dtype=torch.float64)]
    gram = input_grams("test", nn.Sequential(conv), {"0": conv}, batches)["0"]
    columns = torch.cat(
        [
            F.unfold(
                b if b.dim() == 4 else b[None], conv.kernel_size, conv.dilation, conv.padding, conv.stride
            )
            .transpose(1, 2)
            .flatten(0, 1)
            for b in batches
        ]
    )
    for group, part in enumerate(columns.chunk(conv.groups, 1)):
        torch.testing.assert_close(gram[group], part.T @ part, rtol=1e-11, atol=1e-11)


def test_types_modes_and_gradients_are_kept() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(torch.bfloat16)
    model[0].eval()
    model[1].weight.requires_grad_(False)
    factorize(model, rank=2)
    assert model[0].down.weight.dtype == torch.bfloat16
    assert not model[0].down.training
    assert model[1].up.training
    assert model[0].up.weight.requires_grad
    assert not model[1].up.weight.requires_grad
    assert model[1].up.bias.requires_grad


def test_a_second_call_leaves_factors_alone() -> None:
    model = factorize(net(), rank=2)
    with pytest.raises(ValueError, match="at least one layer must get smaller"):
        factorize(model, rank=1)
    with pytest.raises(ValueError, match=r"layer '5.down' must be replaceable, got one where it is a factor"):
        factorize(model, rank=1, layers=["5.down"])


def test_layers_that_would_grow_are_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2), nn.Conv2d(4, 4, 3, groups=4))
    factorize(model, rank=4)
    assert [type(m) for m in model] == [FactorizedLinear, nn.Linear, nn.Conv2d]


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


@pytest.mark.parametrize(
    ("make", "layer", "message"),
    [
        (Reader, "fc", "reads fc.weight directly"),
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", "reads out_proj.weight"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8))), "0", "parametrised"),
        (lambda: nn.Sequential(*[nn.Linear(8, 8)] * 2), "0", "also used as"),
        (lambda: nn.Linear(8, 8), "", "it is the whole model"),
    ],
)
def test_layers_somebody_else_reads_are_refused(make: Any, layer: str, message: str) -> None:
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        factorize(model, rank=1, layers=[layer])
    with pytest.raises(ValueError, match="at least one"):
        factorize(model, rank=1)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of rank, energy, budget and speedup must be given, got none"),
        ({"rank": 2, "energy": 0.5}, "one of .*, got rank=2, energy=0.5"),
        ({"rank": 0}, "rank must be an int >= 1"),
        ({"rank": 2.5}, "rank must be an int >= 1"),
        ({"rank": True}, "rank must be an int >= 1"),
        ({"rank": (2, 2)}, "rank must be an int >= 1"),
        ({"energy": 0.0}, r"energy must be a number in \(0, 1\]"),
        ({"energy": 1.1}, "energy must be"),
        ({"budget": 1.0}, r"budget must be a number in \(0, 1\)"),
        ({"budget": "half"}, "budget must be"),
        ({"speedup": -1.0, "calibration": [batch()]}, r"speedup must be a number in \(0, inf\)"),
        ({"speedup": 1.2}, "calibration must hold batches for speedup"),
        ({"rank": 2, "allocation": "model"}, 'allocation "model" shares out a budget'),
        ({"budget": 0.5, "allocation": "both"}, 'allocation must be "layer" or "model"'),
        ({"budget": 0.5, "multiple": 0}, "multiple must be an int >= 1, got 0"),
        ({"budget": 0.01, "allocation": "model"}, r"budget must be at least 0\.\d+ for ranks of 1, got 0.01"),
        ({"speedup": 1e6, "calibration": [batch()], "multiple": 16}, "must get faster, got none"),
        ({"rank": 2, "method": "cp"}, "method must be one of"),
        ({"rank": 2, "method": "whitened"}, "calibration must hold batches"),
        ({"rank": 2, "method": "whitened", "calibration": []}, "at least one batch"),
        ({"rank": 2, "layers": ["nope"]}, "must name layers of the model"),
        ({"rank": {"nope": 2}}, "must name layers of the model"),
        ({"rank": {"5": 2}, "layers": ["2", "5"]}, "rank must name each layer, got none for '2'"),
        ({"rank": 36, "layers": ["5"]}, r"rank of layer '5' must be in \[1, 35\] to make it smaller, got 36"),
        (
            {"budget": 1e-4, "layers": ["5"], "allocation": "layer"},
            r"must be in \[1, 35\] to make it smaller, got 0",
        ),
        ({"rank": 1000}, "at least one layer must get smaller"),
        ({"rank": 2, "method": "tucker", "layers": ["5"]}, "tucker does not apply"),
        ({"rank": (2, 30), "method": "tucker", "layers": ["2"]}, r"ranks of layer '2' must be in \[1, 16\]"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = net()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        factorize(model, **options)
    assert dict(model.named_modules()) == before


def test_a_late_failure_changes_nothing() -> None:
    model = net()
    before = dict(model.named_modules())
    with torch.no_grad():
        model[5].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="weight of layer '5' must be finite"):
        factorize(model, rank=2)
    model[5].weight.detach().zero_()
    with pytest.raises(ValueError, match="got NaN or Inf at layer '0'"):
        factorize(model, "whitened", rank=2, calibration=[batch(), batch() * torch.nan])
    assert dict(model.named_modules()) == before
    assert not model[0]._forward_pre_hooks


class LoRALinear(nn.Linear):
    """Computes more than its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


def test_a_subclass_that_computes_more_is_left() -> None:
    model = nn.Sequential(LoRALinear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"layer '0' .*LoRALinear has a forward of its own"):
        factorize(model, rank=2, layers=["0"])
    factorize(model, rank=2)
    assert [type(layer) for layer in model] == [LoRALinear, FactorizedLinear]


def test_tucker_of_nothing_but_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    nn.init.zeros_(model[0].weight)
    x = torch.randn(1, 16, 6, 6)
    expected = model(x)
    done = factorize(model, method="tucker", energy=0.9)
    assert isinstance(done[0], TuckerConv2d) and torch.equal(done(x), expected)


@pytest.mark.parametrize("rank", [(16, 1), (1, 16)])
def test_tucker_ranks_beyond_what_the_core_can_use(rank: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3))
    weight = model[0].weight.detach().clone()
    done = factorize(model, method="tucker", rank=rank)[0]
    assert isinstance(done, TuckerConv2d) and done.ranks == rank
    one = torch.linalg.svdvals(weight.transpose(0, int(rank[0] == 1)).flatten(1))[0]
    assert (done.dense_weight() - weight).square().sum() < weight.square().sum() - 0.99 * one.square()


@pytest.mark.parametrize("channels", [(256, 8), (8, 256)])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_budget_gives_tucker_no_rank_that_the_core_cannot_use(
    channels: tuple[int, int], multiple: int
) -> None:
    conv = nn.Conv2d(*channels, 3)
    for r_in, r_out in TuckerTarget("conv", conv).ranks(multiple):  # type: ignore[misc]
        assert r_in < 9 * r_out + multiple and r_out < 9 * r_in + multiple
    for budget in (0.2, 0.3, 0.5):
        model = nn.Sequential(copy.deepcopy(conv))
        assert isinstance(factorize(model, "tucker", budget=budget, multiple=multiple)[0], TuckerConv2d)

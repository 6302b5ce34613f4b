"""Ranks by multiples, by a budget of the whole model, and by measured time."""

from __future__ import annotations

import copy
import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tautorch.capture import Call
from tautorch.factorize import (
    FactorizedConv2d,
    FactorizedLinear,
    PairTarget,
    TuckerConv2d,
    TuckerTarget,
    allocate,
    factorize,
)
from tautorch.factorize import ranks as ranks_module
from tautorch.factorize.ranks import compiled_pair, fast_rank
from tautorch.nn import LowRankConv2d, LowRankLinear


def decaying(outputs: int, inputs: int, rate: float, seed: int) -> nn.Linear:
    """A layer whose singular values are rate ** i."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(outputs, outputs, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64))[0]
    n = min(outputs, inputs)
    layer = nn.Linear(inputs, outputs, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(u[:, :n] @ torch.diag(rate ** torch.arange(n, dtype=torch.float64)) @ v[:n])
    return layer


def model_of_three() -> nn.Sequential:
    return nn.Sequential(decaying(12, 16, 0.5, 1), decaying(10, 12, 0.95, 2), decaying(14, 10, 0.8, 3))


def kept_by_hand(layer: nn.Linear, rank: int) -> float:
    s = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False) ** 2
    return float(s[:rank].sum() / s.sum())


@pytest.mark.parametrize("cells", [1 << 12, 20])
def test_allocation_is_the_best_of_all(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every combination of ranks: the best product of kept energies, near it in few cells."""
    monkeypatch.setattr(ranks_module, "_CELLS", cells)
    model = model_of_three()
    targets = [PairTarget(str(i), layer) for i, layer in enumerate(model)]
    total = sum(t.dense for t in targets)
    for budget in (0.2, 0.4, 0.6, 0.9):
        ranks = allocate(targets, budget, 1)
        choices = [[*t.ranks(), None] for t in targets]

        def weights(pick: tuple[Any, ...], targets: list[PairTarget] = targets) -> int:
            return sum(t.dense if r is None else t.weights(r) for t, r in zip(targets, pick, strict=True))

        def product(pick: tuple[Any, ...]) -> float:
            return math.prod(
                1.0 if r is None else kept_by_hand(layer, r) for layer, r in zip(model, pick, strict=True)
            )

        got = tuple(ranks.get(t.name) for t in targets)
        best = max(product(p) for p in itertools.product(*choices) if weights(p) <= budget * total)
        assert weights(got) <= budget * total
        assert product(got) >= (0.999999 if cells == 1 << 12 else 0.8) * best


def test_allocation_gives_more_where_more_is_needed() -> None:
    model = model_of_three()
    even = factorize(copy.deepcopy(model), budget=0.5, allocation="layer")
    shared = factorize(copy.deepcopy(model), budget=0.5)
    x = torch.randn(64, 16, dtype=torch.float64)
    ranks = [getattr(layer, "rank", None) for layer in shared]
    assert ranks[0] is not None and ranks[0] < even[0].rank  # half of its energy is in one direction
    error = [float((m(x) - model(x)).detach().norm()) for m in (even, shared)]
    assert error[1] < 0.9 * error[0]


def test_allocation_by_whitened_energies() -> None:
    """A layer whose inputs span few directions gives its weights up, whatever its own spectrum."""
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)).double()
    x = torch.randn(300, 2, dtype=torch.float64) @ torch.randn(2, 40, dtype=torch.float64)
    before = copy.deepcopy(model)
    even = factorize(copy.deepcopy(model), budget=0.5, allocation="model")
    assert not torch.allclose(even(x), model(x), atol=1e-1)
    done = factorize(model, "whitened", budget=0.5, allocation="model", calibration=[x])
    assert torch.allclose(done(x), before(x), atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "tucker"])
def test_ranks_are_multiples(method: Any) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3))

    for options in ({"budget": 0.5}, {"energy": 0.6}, {"budget": 0.5, "allocation": "model"}):
        done = factorize(net(), method, multiple=8, **options)
        for layer in done:
            if isinstance(layer, FactorizedConv2d):
                assert layer.rank % 8 == 0
            if isinstance(layer, TuckerConv2d):
                assert layer.ranks[0] % 8 == 0 and layer.ranks[1] % 8 == 0
    exact = factorize(net(), energy=0.6)[0].rank
    assert factorize(net(), energy=0.6, multiple=8)[0].rank == math.ceil(exact / 8) * 8


def test_kept_energy_by_hand() -> None:
    conv = nn.Conv2d(6, 8, 3).double()
    weight = conv.weight.detach()
    target = TuckerTarget("c", conv)
    u_out = np.linalg.svd(weight.flatten(1).numpy(), full_matrices=False)[0]
    u_in = np.linalg.svd(weight.transpose(0, 1).flatten(1).numpy(), full_matrices=False)[0]
    for r_in, r_out in ((1, 1), (3, 5), (6, 8)):
        core = np.einsum("oihw,ob,ia->bahw", weight.numpy(), u_out[:, :r_out], u_in[:, :r_in])
        assert math.isclose(target.kept((r_in, r_out)), float((core**2).sum() / (weight.numpy() ** 2).sum()))
        built = target.build((r_in, r_out)).dense_weight().detach()
        lost = float((built - weight).square().sum() / weight.square().sum())
        assert 1 - lost >= target.kept((r_in, r_out)) - 1e-12  # iterated: no worse than the truncation
    pair = PairTarget("l", decaying(9, 7, 0.6, 5))
    for rank in (1, 2, 3):
        assert math.isclose(pair.kept(rank), kept_by_hand(pair.layer, rank))


class Costly(nn.Module):
    """Takes as long as it is told, whatever it computes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return x


def test_the_largest_fast_rank_is_found() -> None:
    """Times grow with the rank by a known law: 20 us + 10 us a rank against 200 us."""
    target = PairTarget("l", nn.Linear(40, 40))
    call = Call((torch.zeros(1),), {})
    found = fast_rank(
        target,
        [call],
        speedup=2.0,
        multiple=1,
        compiled=lambda pair: Costly(20e-6 + 10e-6 * pair.rank),
        baseline=lambda layer: Costly(200e-6),
        seconds=0.02,
    )
    assert isinstance(found, int) and 3 <= found <= 8  # the limit is 8, noise may cost some
    assert fast_rank(target, [call], 2.0, 1, lambda _: Costly(300e-6), lambda _: Costly(100e-6), 0.01) is None


def test_layers_that_no_rank_makes_faster_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from tautorch.factorize import factorizer

    asked: list[tuple[str, list[tuple[int, ...]]]] = []

    def fake(target: PairTarget, calls: list[Call], *_: Any) -> int | None:
        asked.append((target.name, [tuple(c.first.shape) for c in calls if c.first is not None]))
        return 3 if target.name == "0" else None

    monkeypatch.setattr(factorizer, "fast_rank", fake)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)).train()
    batches = iter([torch.randn(4, 20), torch.randn(4, 20), torch.randn(1, 20)])
    done = factorize(model, speedup=1.5, layers=["0", "1"], calibration=batches)
    assert [type(layer) for layer in done] == [FactorizedLinear, nn.Linear, nn.Linear]
    assert done[0].rank == 3 and done.training
    assert asked == [("0", [(4, 20), (1, 20)]), ("1", [(4, 20), (1, 20)])]


def test_what_is_timed_by_default() -> None:
    linear = PairTarget("l", nn.Linear(20, 20)).build(3)
    conv = PairTarget("c", nn.Conv2d(8, 8, 3, padding=1)).build(3)
    odd = PairTarget("c", nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")).build(3)
    assert isinstance(compiled_pair(linear), LowRankLinear)
    assert isinstance(compiled_pair(conv), LowRankConv2d)
    assert compiled_pair(odd) is odd
    half = PairTarget("l", nn.Linear(20, 20).bfloat16()).build(3)
    assert compiled_pair(half) is half

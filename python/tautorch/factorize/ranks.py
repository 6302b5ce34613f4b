"""Choosing ranks: as given, by energy, by a layer's or the model's budget, by measured latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tautorch.capture import Call
from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear
from tautorch.factorize.svd import largest
from tautorch.factorize.targets import Rank, Target
from tautorch.nn import LowRankConv2d, LowRankLinear
from tautorch.timing import decisive

Allocation = Literal["layer", "model"]
#: Makes of a layer, or of the pair that replaces it, the module that will run.
Compiler = Callable[[Any], nn.Module]
_CELLS = 4096  # of a budget


@dataclass(frozen=True)
class Size:
    """How the ranks are asked for: exactly one of the first four."""

    rank: Rank | Mapping[str, Rank] | Literal["vbmf"] | None
    energy: float | None
    budget: float | None
    speedup: float | None
    allocation: Allocation = "layer"
    multiple: int = 1

    def check(self, method: str) -> None:
        """ValueError for what no method could do."""
        given = {n: getattr(self, n) for n in ("rank", "energy", "budget", "speedup")}
        if sum(value is not None for value in given.values()) != 1:
            told = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            raise ValueError(
                f"factorize: one of rank, energy, budget and speedup must be given, got {told or 'none'}"
            )
        if self.rank == "vbmf":
            if method == "whitened":
                raise ValueError(
                    'factorize: rank "vbmf" looks for noise in the weight itself; use "svd" or "tucker"'
                )
        else:
            for value in self.rank.values() if isinstance(self.rank, Mapping) else (self.rank,):
                if value is not None:
                    _check_rank(value, method)
        _check_number("energy", self.energy, 1, closed=True)
        _check_number("budget", self.budget, 1)
        _check_number("speedup", self.speedup, math.inf)
        if self.allocation not in get_args(Allocation):
            raise ValueError(f'factorize: allocation must be "layer" or "model", got {self.allocation!r}')
        if self.allocation == "model" and self.budget is None:
            raise ValueError('factorize: allocation "model" shares out a budget; give budget=')
        if isinstance(self.multiple, bool) or not isinstance(self.multiple, int) or self.multiple < 1:
            raise ValueError(f"factorize: multiple must be an int >= 1, got {self.multiple!r}")

    def rank_of(self, target: Target) -> Rank | None:
        """The rank of a layer by itself; None if its budget does not reach for the least."""
        if self.energy is not None:
            return target.of_energy(self.energy, self.multiple)
        if self.budget is not None:
            ranks, most = target.ranks(self.multiple), self.budget * target.dense
            fitting = largest(len(ranks), lambda n: target.weights(ranks[n - 1]) <= most)
            return ranks[fitting - 1] if fitting else None
        if self.rank == "vbmf":
            return target.of_noise(self.multiple)
        if not isinstance(self.rank, Mapping):
            return self.rank
        if target.name not in self.rank:
            raise ValueError(f"factorize: rank must name each layer, got none for {target.name!r}")
        return self.rank[target.name]


def _check_rank(value: Rank, method: str) -> None:
    parts = value if isinstance(value, tuple) and len(value) == 2 and method == "tucker" else (value,)
    if any(isinstance(part, bool) or not isinstance(part, int) or part < 1 for part in parts):
        raise ValueError(f"factorize: rank must be an int >= 1 (or two for tucker), got {value!r}")


def _check_number(name: str, value: float | None, high: float, closed: bool = False) -> None:
    if value is None:
        return
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= high
    if not valid or (value == high and not closed):
        raise ValueError(
            f"factorize: {name} must be a number in (0, {high:g}{']' if closed else ')'}, got {value!r}"
        )


def allocate(targets: Sequence[Target], budget: float, multiple: int) -> dict[str, Rank]:
    """Ranks that share `budget` of all the layers' weights out, by layer name; a layer not named stays dense.

    The product of the layers' kept energies is made as large as can be, as in Efficient Neural Network
    Compression (Kim et al. 2019, arXiv:1811.12781): exactly, but for weights being counted in cells of
    1 / 4096 of the budget; what that leaves over goes to whatever larger rank still fits and gains most.
    """
    sizes = [_Sizes.of(t, multiple) for t in targets]
    total, least = sum(t.dense for t in targets), sum(s.weights[0] for s in sizes)
    most = math.floor(budget * total + 1e-9)
    if least > most:
        raise ValueError(
            f"factorize: budget must be at least {least / total:.3f} for ranks of {multiple}, got {budget}"
        )
    at = _best_within(sizes, most)
    while True:
        left = most - sum(int(s.weights[n]) for s, n in zip(sizes, at, strict=True))
        gains = [
            s.gains[n + 1 :][s.weights[n + 1 :] <= s.weights[n] + left] - s.gains[n]
            for s, n in zip(sizes, at, strict=True)
        ]
        best = max(range(len(at)), key=lambda i: gains[i].max(initial=-1.0))
        if gains[best].max(initial=0.0) <= 0:
            break
        at[best] += 1 + int(gains[best].argmax())
    chosen = {t.name: s.ranks[n] for t, s, n in zip(targets, sizes, at, strict=True)}
    return {name: rank for name, rank in chosen.items() if rank is not None}


@dataclass(frozen=True)
class _Sizes:
    """A layer's possible sizes, growing; the last is the dense layer (rank None)."""

    ranks: list[Rank | None]
    weights: NDArray[np.int64]
    gains: NDArray[np.float64]  # log of the kept energy

    @classmethod
    def of(cls, target: Target, multiple: int) -> _Sizes:
        ranks = target.ranks(multiple)
        weights = [*(target.weights(r) for r in ranks), target.dense]
        gains = [*(math.log(max(target.kept(r), 1e-12)) for r in ranks), 0.0]
        return cls([*ranks, None], np.array(weights), np.array(gains))


def _best_within(sizes: Sequence[_Sizes], most: int) -> list[int]:
    """The size of each layer, by dynamic programming over the cells of the budget."""
    cell = max(1, -(-most // _CELLS))
    cells = most // cell
    total = np.zeros(cells + 1)  # the best sum of gains within so many cells
    picks: list[NDArray[np.int64]] = []
    for size in sizes:
        costs = -(-size.weights // cell)
        options = np.full((len(costs), cells + 1), -np.inf)
        for n, cost in enumerate(costs):
            if cost <= cells:
                options[n, cost:] = total[: cells + 1 - cost] + size.gains[n]
        picks.append(options.argmax(0))
        total = options.max(0)
    if np.isneginf(total[-1]):  # fits exactly, but not in whole cells
        return [0] * len(sizes)
    at, left = [], cells
    for size, pick in zip(reversed(sizes), reversed(picks), strict=True):
        at.append(int(pick[left]))
        left -= int(-(-size.weights[at[-1]] // cell))
    return at[::-1]


def fast_rank(
    target: Target,
    calls: Sequence[Call],
    speedup: float,
    multiple: int,
    compiled: Compiler | None,
    baseline: Compiler | None,
    seconds: float = 0.1,
) -> Rank | None:
    """The largest rank whose compiled module is `speedup` times as fast as the dense one at every call.

    Bisected over the target's ranks: time grows with the rank. A rank counts as fast enough where the lower
    end of the 95 % interval of the time ratio is; the one that is found is timed again, longer, and gives way
    to the next smaller one while it is not confirmed. None where no rank is fast enough.
    """
    ranks = target.ranks(multiple)
    dense = baseline(target.layer) if baseline is not None else target.layer

    def fast(n: int, seconds: float) -> bool:
        pair = target.build(ranks[n - 1])
        module = (compiled or compiled_pair)(pair)
        for part in (module, dense):
            part.eval()
        with torch.no_grad():
            return all(_ratio(dense, module, call, speedup, seconds) >= speedup for call in calls)

    found = largest(len(ranks), lambda n: fast(n, seconds))
    while found and not fast(found, 3 * seconds):
        found -= 1
    return ranks[found - 1] if found else None


def compiled_pair(pair: nn.Module) -> nn.Module:
    """The compiled float32 layer of a pair of float32 factors; any other module as it is."""
    if next(pair.parameters()).dtype != torch.float32:
        return pair
    if isinstance(pair, FactorizedLinear):
        return LowRankLinear.from_float(pair)
    if isinstance(pair, FactorizedConv2d) and pair.down.padding_mode == "zeros":
        return LowRankConv2d.from_float(pair)
    return pair


def _ratio(dense: nn.Module, module: nn.Module, call: Call, speedup: float, seconds: float) -> float:
    device = call.first.device if call.first is not None else None
    found = decisive(lambda: call.run(dense), lambda: call.run(module), speedup, seconds, device=device)
    return found.ratio_low

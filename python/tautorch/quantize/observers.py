"""Observers: watch the values of a tensor, batch by batch, and choose the range to quantise.

All but `MinMax` keep a histogram whose bin width is a power of two, so that a wider range merges bins exactly
and the result does not depend on the order of the batches. Exact zeros are counted apart: they always
quantise without error, and after a ReLU they would otherwise bias the bin next to zero.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from tautorch import distributed
from tautorch.quantize.qparams import QParams, qparams_of_range

# Bins over [-2^k, 2^k): at least 8 for each of 256 quantisation steps of a one-sided range.
_BINS = 8192
# Ranges tried along each side; the finest resolves 1/128 of it.
_CUTS = 128
# Thresholds that `Kl` tries, about.
_THRESHOLDS = 512


class Observer(Protocol):
    """Sees tensors, then gives their parameters."""

    def observe(self, x: Tensor) -> None:
        """Take in the values of x: finite, at least one."""

    def all_reduce(self) -> None:
        """Take in what the other ranks' observers saw, if anything; called on each rank, before `qparams`."""

    def qparams(self, symmetric: bool = False) -> QParams:
        """The parameters for what was seen; ValueError if nothing was."""


class MinMax:
    """The whole range seen: nothing clips."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def observe(self, x: Tensor) -> None:
        """Widen the range to that of x."""
        low, high = torch.aminmax(x.detach().float())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def all_reduce(self) -> None:
        """The range of all ranks."""
        self.low = float(distributed.all_reduce(torch.tensor(self.low, dtype=torch.float64), "min"))
        self.high = float(distributed.all_reduce(torch.tensor(self.high, dtype=torch.float64), "max"))

    def qparams(self, symmetric: bool = False) -> QParams:
        """The parameters of [min, max]."""
        if self.low > self.high:
            raise ValueError(f"{type(self).__name__}: observe must be called before qparams")
        return qparams_of_range(self.low, self.high, symmetric)


class Histogram(MinMax):
    """The range, and float64 counts of the values other than zero on `_BINS` bins of width 2^k."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros = 0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self._exponent: int | None = None

    def observe(self, x: Tensor) -> None:
        """Count the values of x."""
        super().observe(x)
        values = x.detach().double().flatten()
        values = values[values != 0]
        self.zeros += x.numel() - values.numel()
        if values.numel() == 0:
            return
        top = float(values.abs().max())
        self._grow(math.frexp(top)[1])
        index = (values / self.width).floor_().long() + _BINS // 2
        # frexp puts top below 2^exponent, so only -2^exponent itself is at the edge, and it is inside.
        self.counts += torch.bincount(index, minlength=_BINS).double().cpu()

    def all_reduce(self) -> None:
        """The range and counts of all ranks, as one observer of all their values would have them."""
        super().all_reduce()
        exponents = [exponent for exponent in distributed.all_gather(self._exponent) if exponent is not None]
        if exponents:
            self._grow(max(exponents))
        self.counts = distributed.all_reduce(self.counts)
        self.zeros = int(distributed.all_reduce(torch.tensor(self.zeros)))

    @property
    def width(self) -> float:
        """Of one bin."""
        return 2.0 ** ((self._exponent or 0) + 1) / _BINS

    @property
    def centres(self) -> Tensor:
        """float64 [_BINS], the middle of each bin."""
        return (torch.arange(_BINS, dtype=torch.float64) - _BINS // 2 + 0.5) * self.width

    def _grow(self, exponent: int) -> None:
        """Cover [-2^exponent, 2^exponent): each doubling merges the bins two by two, away from the middle."""
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[_BINS // 4 : _BINS // 4 + _BINS // 2] = merged
            self._exponent += 1


class Percentile(Histogram):
    """The range without the share (100 - percentile) % of the values at each end.

    Wu et al. 2020, "Integer Quantization for Deep Learning Inference", arXiv:2004.09602, section 5.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 50 < percentile <= 100:
            raise ValueError(f"Percentile: percentile must be in (50, 100], got {percentile}")
        self.percentile = percentile

    def qparams(self, symmetric: bool = False) -> QParams:
        """The parameters of the range between the percentiles, to within a bin."""
        if self.low > self.high:
            raise ValueError("Percentile: observe must be called before qparams")
        total = float(self.counts.sum()) + self.zeros
        allowed = total * (1 - self.percentile / 100)
        middle = _BINS // 2
        # Values outside each candidate end, walking inwards from the far end to zero.
        above = self.counts[middle:].flip(0).cumsum(0).flip(0)
        below = self.counts[:middle].cumsum(0)
        high = float((above > allowed + 1e-9).sum()) * self.width
        low = -float((below > allowed + 1e-9).sum()) * self.width
        return qparams_of_range(max(low, min(self.low, 0.0)), min(high, max(self.high, 0.0)), symmetric)


class Mse(Histogram):
    """The range with the least expected squared error of rounding and clipping together.

    Each end is searched in turn over cuts of 1/128, from the full range (Nagel et al. 2021, "A White Paper on
    Neural Network Quantization", arXiv:2106.08295, section 3.1).
    """

    def qparams(self, symmetric: bool = False) -> QParams:
        """The parameters with the least error on the histogram."""
        best = super().qparams(symmetric)
        filled = self.counts > 0
        if not bool(filled.any()):
            return best
        centres, counts = self.centres[filled], self.counts[filled]
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        cut_low = cut_high = 0
        for side in ("both",) if symmetric else ("high", "low", "high", "low"):
            trials = [
                (cut if side != "high" else cut_low, cut if side != "low" else cut_high)
                for cut in range(_CUTS)
            ]
            params = [
                qparams_of_range(low * (1 - a / _CUTS), high * (1 - b / _CUTS), symmetric) for a, b in trials
            ]
            winner = int(_errors(params, centres, counts).argmin())
            best, (cut_low, cut_high) = params[winner], trials[winner]
        return best


class Kl(Histogram):
    """The range cut at the threshold whose quantised distribution says most of the values' own.

    The threshold t on |x| with the least Kullback-Leibler divergence KL(P || Q), as TensorRT's entropy
    calibrator does it (Migacz 2017, "8-bit Inference with TensorRT"; Wu et al. 2020, arXiv:2004.09602,
    section 5): P is the histogram of |x| up to t, what lies above counted at t; Q is the same without the
    clipped values, brought to the levels that int8 has there (128 for two signs, 256 for one) and spread back
    evenly over the bins that are not empty. Exact zeros are left out.
    """

    def qparams(self, symmetric: bool = False) -> QParams:
        """The parameters of the range cut at the best threshold."""
        full = super().qparams(symmetric)
        middle = _BINS // 2
        magnitudes = self.counts[middle:] + self.counts[:middle].flip(0)
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if float(magnitudes.sum()) == 0:
            return full
        levels = 256 if not symmetric and (low == 0 or high == 0) else 128
        top = int(magnitudes.nonzero().max()) + 1
        trials = range(levels, top + 1, max(1, (top - levels) // _THRESHOLDS))
        best = min(trials, key=lambda bins: _divergence(magnitudes, bins, levels), default=top)
        cut = best * self.width if best < top else math.inf
        return qparams_of_range(max(low, -cut), min(high, cut), symmetric)


def _divergence(magnitudes: Tensor, bins: int, levels: int) -> float:
    """KL(P || Q) of a cut after `bins`."""
    inside = magnitudes[:bins]
    p = inside.clone()
    p[-1] += magnitudes[bins:].sum()
    level = torch.arange(bins) * levels // bins
    filled = (inside > 0).double()
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    size = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    q = (total / size.clamp(min=1))[level] * filled
    if float(q.sum()) == 0:
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    # A bin that is empty but for what was clipped into it: Q is given the least weight, not none.
    q = torch.where((p > 0) & (q == 0), torch.full_like(q, 1e-12), q)
    held = p > 0
    return float((p[held] * (p[held] / q[held]).log()).sum())


def _errors(params: list[QParams], centres: Tensor, counts: Tensor) -> Tensor:
    """Sum of squared errors of each of `params` on a histogram, float64 [len(params)]."""
    scale = torch.tensor([p.scale for p in params], dtype=torch.float64).unsqueeze(1)
    zero = torch.tensor([p.zero_point for p in params], dtype=torch.float64).unsqueeze(1)
    q = (torch.round(centres / scale) + zero).clamp_(-128, 127)
    return ((q - zero) * scale - centres).square() @ counts

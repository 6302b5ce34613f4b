"""Bits of a matrix by adaptive contexts, one line after the other.

The sparse indices of Deep Compression spend the same on every position. Real masks are far from even: whole
inputs are dead, some outputs keep ten times what others keep, and kept weights of neighbouring pixels go
together. Here each bit's chance comes from counts of what happened before in the same situation (as in JBIG):
how dense its lane was so far, how dense the line is, and what the same lane was a few lines earlier. First
layer of a LeNet-300-100 on 28x28 digits, 8 % kept: 8,670 bytes of entropy-coded gaps, 7,210 of contexts.

A matrix is [steps, lanes]: the lanes of a step are coded together from what the steps before said.
Chances are made of +, *, / alone, which IEEE rounds alike on every machine: both directions compute the very
same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tautorch.coding.channel import Bytes, Channel, Scale

# Density of a place relative to the matrix's, in steps of 1.6 (1.3 to 2 came out within 1 %).
_EDGES = np.array([0.244140625, 0.390625, 0.625, 1.0, 1.6, 2.56, 4.096])
# A line's stored density: none, or 1.5^-7 to 1.5^7 times the matrix's.
_LEVELS = np.array([0.0, *(1 / 1.5**n for n in range(7, 0, -1)), *(1.5**n for n in range(8))])
_MEMORY = 8.0  # lines that the matrix's density counts for in a lane's
_REACH = 64  # the furthest line looked back at
_MAX_LAGS = 4
_SAMPLE = 1 << 19  # bits on which the options are compared
#: Fewer lanes than this, or more steps, are not worth a call per step.
MIN_LANES, MAX_STEPS = 8, 1 << 15


@dataclass(frozen=True)
class Options:
    """How a matrix is scanned: which axis is the steps, which earlier lines are looked at, stored levels."""

    columns: bool = False  # steps are the columns
    lags: tuple[int, ...] = ()
    levels: bool = False


def pass_options(channel: Channel, options: Options) -> Options:
    """The options through a channel."""
    flags = channel.number(options.columns + 2 * options.levels + 4 * len(options.lags), 4 * _MAX_LAGS + 3)
    lags = tuple(1 + channel.number(lag - 1, _REACH) for lag in (*options.lags, 1, 1, 1, 1)[: flags // 4])
    return Options(bool(flags & 1), lags, bool(flags & 2))


def turned(matrix: Bytes, options: Options) -> Bytes:
    """[steps, lanes] of [rows, columns]."""
    lines: Bytes = np.ascontiguousarray(matrix.T) if options.columns else matrix
    return lines


def pass_mask(channel: Channel, mask: Bytes, options: Options) -> Bytes:
    """A mask [steps, lanes] of 0 and 1; only its shape matters to a reader."""
    steps, lanes = mask.shape
    ones = channel.number(int(mask.sum()), mask.size)
    density = max(ones, 1) / max(mask.size, 1)
    levels = np.full(steps, 1.0)
    if options.levels:
        levels = _LEVELS[channel.symbols(_levels_of(mask, density), steps, len(_LEVELS))]
    found = np.zeros_like(mask)
    counts = _Counts((len(_EDGES) + 1) << len(options.lags), min(max(density, 0.02), 0.98))
    in_lane, total = np.zeros(lanes), 0
    for step in range(steps):
        if levels[step] == 0:
            continue
        expected = (in_lane + _MEMORY * density) / (step + _MEMORY)
        if options.levels:  # the lanes share what the line is known to hold
            mean = (total / lanes + _MEMORY * density) / (step + _MEMORY)
            expected = expected * (levels[step] * density / mean)
        context = np.searchsorted(_EDGES, expected / density)
        for lag in options.lags:
            context = context * 2 + (found[step - lag] if step >= lag else 0)
        found[step] = counts.pass_bits(channel, context, mask[step])
        in_lane += found[step]
        total += int(found[step].sum())
    return found


def pass_halves(channel: Channel, halves: Bytes, where: Bytes, options: Options) -> Bytes:
    """Bits [steps, lanes] where `where` is 1 (0 elsewhere), told from their neighbours' bits."""
    state = np.zeros_like(where)  # 0: not there, 1: a zero bit, 2: a one bit
    counts = _Counts(3 ** len(options.lags), 0.5)
    for step in range(where.shape[0]):
        there = np.flatnonzero(where[step])
        context = np.zeros(there.size, np.int64)
        for lag in options.lags:
            context = context * 3 + (state[step - lag, there] if step >= lag else 0)
        state[step, there] = 1 + counts.pass_bits(channel, context, halves[step, there])
    ones: Bytes = (state == 2).astype(np.uint8)
    return ones


class _Counts:
    """Ones and all bits by context, updated with every line."""

    def __init__(self, contexts: int, prior: float) -> None:
        self._ones = np.full(contexts, prior)
        self._all = np.ones(contexts)

    def pass_bits(self, channel: Channel, context: NDArray[np.int64], bits: Bytes) -> Bytes:
        found = channel.bits(self._ones[context] / self._all[context], bits)
        self._ones += np.bincount(context, found, len(self._ones))
        self._all += np.bincount(context, minlength=len(self._all))
        return found


def _levels_of(mask: Bytes, density: float) -> NDArray[np.int32]:
    share = mask.sum(1, dtype=np.int64) / (density * mask.shape[1])
    nearest = 1 + np.abs(np.log(np.maximum(share, 1e-9))[:, None] - np.log(_LEVELS[1:])).argmin(1)
    return np.where(share == 0, 0, nearest).astype(np.int32)


def best_mask_options(mask: Bytes) -> tuple[Options, float] | None:
    """The options of the fewest bytes for a mask [rows, columns], and those bytes on the whole matrix."""
    choices = []
    for options in _axes(mask):
        lines, scale = _sample(turned(mask, options))
        lags = _lags(lines - lines.mean(0, keepdims=True))
        for n in (0, 2, 4):
            for levels in (False, True):
                choice = replace(options, lags=lags[:n], levels=levels)
                weighed = Scale()
                pass_mask(weighed, lines, choice)
                choices.append((choice, weighed.weight * scale))
    return min(choices, key=lambda c: c[1], default=None)


def best_halves_options(halves: Bytes, where: Bytes) -> tuple[Options, float] | None:
    """As `best_mask_options`, for bits that are there in some places only."""
    choices = []
    for options in _axes(where):
        lines, scale = _sample(turned(halves, options))
        there, _ = _sample(turned(where, options))
        lags = _lags((2.0 * lines - 1) * there)
        for n in (1, 2, 4):
            choice = replace(options, lags=lags[:n])
            weighed = Scale()
            pass_halves(weighed, lines, there, choice)
            choices.append((choice, weighed.weight * scale))
    return min(choices, key=lambda c: c[1], default=None)


def _axes(matrix: Bytes) -> list[Options]:
    rows, columns = matrix.shape
    fits = ((rows, columns, False), (columns, rows, True))
    return [Options(turn) for steps, lanes, turn in fits if steps <= MAX_STEPS and lanes >= MIN_LANES]


def _sample(lines: Bytes) -> tuple[Bytes, float]:
    """The first lines, enough to choose by, and how many times as many there are."""
    steps = max(2 * _REACH, _SAMPLE // lines.shape[1])
    return lines[:steps], max(1.0, lines.shape[0] / steps)


def _lags(signal: NDArray[np.floating]) -> tuple[int, ...]:
    """The distances at which lines are most alike, best first."""
    reach = range(1, min(_REACH + 1, len(signal)))
    alike = [(float(np.vdot(signal[lag:], signal[:-lag])), -lag) for lag in reach]
    return tuple(-lag for _, lag in sorted(alike, reverse=True)[:_MAX_LAGS])

"""Where the kept weights are: relative positions, or a mask by contexts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tautorch.coding import scan
from tautorch.coding.channel import Bytes, Channel, CodingError, Scale

_GAP_BITS = range(2, 9)


def pass_positions(channel: Channel, mask: Bytes) -> Bytes:
    """A mask [rows, columns] of 0 and 1 through a channel, by the smaller method."""
    options: scan.Options | None = None
    bits = 0
    if channel.writes:
        bits, weight = _best_gap_bits(mask)
        best = scan.best_mask_options(mask)
        if best is not None and best[1] < weight:
            options, bits = best[0], 0
    bits = channel.number(bits, max(_GAP_BITS))
    if bits:
        return _pass_gaps(channel, mask, bits)
    options = scan.pass_options(channel, options or scan.Options())
    lines = scan.turned(mask, options)
    found = scan.pass_mask(channel, lines, options)
    return found.T if options.columns else found


def gap_symbols(mask: Bytes, bits: int) -> NDArray[np.int32]:
    """Relative positions in `bits` bits (arXiv:1510.00149, section 2), row by row.

    A symbol s below 2^bits - 1 is s zeros and then a kept weight; the largest is that many zeros and nothing
    (the paper's padding zero, which needs no weight here).
    """
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    most = (1 << bits) - 1
    fillers = gaps // most
    symbols = np.full(gaps.size + int(fillers.sum()), most, np.int32)
    symbols[np.cumsum(fillers + 1) - 1] = gaps % most
    return symbols


def _pass_gaps(channel: Channel, mask: Bytes, bits: int) -> Bytes:
    most = (1 << bits) - 1
    symbols = gap_symbols(mask, bits) if channel.writes else np.zeros(0, np.int32)
    count = channel.number(symbols.size, mask.size)
    symbols = channel.symbols(symbols, count, most + 1)
    kept = symbols < most
    ends = np.cumsum(np.where(kept, symbols.astype(np.int64) + 1, most))
    if count and ends[-1] > mask.size:
        raise CodingError(f"a position is beyond the {mask.size} weights")
    found = np.zeros(mask.size, np.uint8)
    found[ends[kept] - 1] = 1
    return found.reshape(mask.shape)


def _best_gap_bits(mask: Bytes) -> tuple[int, float]:
    """The gap width of the fewest bytes, and those bytes."""
    gaps = np.bincount(np.diff(np.flatnonzero(mask), prepend=-1) - 1, minlength=1)
    weights = {}
    for bits in _GAP_BITS:
        weighed = Scale()
        weighed.number(int(gaps.sum()), mask.size)
        weighed.counted(_symbol_counts(gaps, (1 << bits) - 1))
        weights[bits] = weighed.weight
    best = min(weights, key=weights.__getitem__)
    return best, weights[best]


def _symbol_counts(gaps: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """How often each symbol is written, from how often each gap occurs."""
    lines = np.pad(gaps, (0, -len(gaps) % most)).reshape(-1, most)
    fillers = int(lines.sum(1) @ np.arange(len(lines)))
    return np.append(lines.sum(0), fillers)


def plain_gap_bytes(mask: Bytes, value_bits: int) -> int:
    """Bytes of positions and values before entropy coding, padding zeros counted, at the best gap width."""
    counts = ((bits, gap_symbols(mask, bits).size) for bits in _GAP_BITS)
    return min(math.ceil(count * (bits + value_bits) / 8) for bits, count in counts)

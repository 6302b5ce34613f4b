"""Honest timing of two ways to compute the same thing, on a machine that does other things too.

Two measurements taken one after the other differ by whatever the machine did in between (frequency,
neighbours, caches). `compare` therefore alternates short samples of both (A B, B A, A B, ...) and decides on
the ratios of neighbouring samples, whose common drift cancels. A sample in which the machine was taken away
(another process on the core, a helper thread that had to wait for one) says nothing of the code: pairs with
one are left out and sampling goes on. All times are seconds of wall clock per call.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_MIN_SAMPLE_S = 100e-6  # below this the clock and the loop itself show
_MIN_SAMPLE_CUDA_S = 2e-3  # a synchronisation costs tens of microseconds
_DISTURBED = 2.0  # times its side's fastest sample; without interference samples stay within 1.3
_PATIENCE = 4  # times the given seconds are spent to find undisturbed pairs


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; times are seconds per call, `ratio` above 1 means that b is faster.

    `ratio` is the median of the ratios a/b of neighbouring samples, `ratio_low` and `ratio_high` its 95 %
    confidence interval (order statistics: no assumption on the distribution).
    """

    a_s: float
    b_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    samples: int  # undisturbed pairs, that all figures are of
    disturbed: float  # the share of pairs that were left out


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    seconds: float = 0.2,
    min_samples: int = 9,
    setup_a: Callable[[], object] | None = None,
    setup_b: Callable[[], object] | None = None,
    device: torch.device | None = None,
) -> Comparison:
    """Times `a` against `b`, in turns, for about `seconds` altogether and at least `min_samples` good pairs.

    `setup_a` / `setup_b` run before each sample of their side, outside the clock (to swap a layer, say).
    `device`: where the work runs; a CUDA device is synchronised around each sample.
    """
    sync = _synchronizer(device)
    no_setup: Callable[[], object] = lambda: None  # noqa: E731
    sides = ((a, setup_a or no_setup), (b, setup_b or no_setup))
    floor = _MIN_SAMPLE_S if sync is None else _MIN_SAMPLE_CUDA_S
    repeats = [_repeats(fn, setup, floor, sync) for fn, setup in sides]
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        pair = 0
        while True:
            spent = time.perf_counter() - start
            enough = pair >= min_samples and spent > seconds
            if enough and (spent > _PATIENCE * seconds or len(_undisturbed(*times)) >= min_samples):
                break
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                fn, setup = sides[side]
                setup()
                fn()  # what the other side left in the caches is not this side's cost
                times[side].append(_sample(fn, repeats[side], sync))
            pair += 1
    finally:
        if collecting:
            gc.enable()
    good = _undisturbed(*times)
    if len(good) < min_samples // 2:
        good = list(zip(*times, strict=True))
    ratios = sorted(x / y for x, y in good)
    low, high = median_interval(len(ratios))
    return Comparison(
        a_s=statistics.median(x for x, _ in good),
        b_s=statistics.median(y for _, y in good),
        ratio=statistics.median(ratios),
        ratio_low=ratios[low],
        ratio_high=ratios[high],
        samples=len(good),
        disturbed=1 - len(good) / pair,
    )


def decisive(
    a: Callable[[], object], b: Callable[[], object], threshold: float, seconds: float, **options: Any
) -> Comparison:
    """A comparison, taken again at three times the length when the noise could turn the verdict."""
    found = compare(a, b, seconds=seconds, **options)
    if found.ratio_low < threshold < found.ratio_high:
        found = compare(a, b, seconds=3 * seconds, **options)
    return found


def _undisturbed(a: list[float], b: list[float]) -> list[tuple[float, float]]:
    """The pairs of samples in which neither side took much longer than it can."""
    limits = _DISTURBED * min(a), _DISTURBED * min(b)
    return [(x, y) for x, y in zip(a, b, strict=True) if x <= limits[0] and y <= limits[1]]


def _synchronizer(device: torch.device | None) -> Callable[[], object] | None:
    if device is None or device.type != "cuda":
        return None
    return lambda: torch.cuda.synchronize(device)


def _sample(fn: Callable[[], object], repeats: int, sync: Callable[[], object] | None) -> float:
    """Seconds per call of `repeats` calls."""
    if sync is not None:
        sync()
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    if sync is not None:
        sync()
    return max(time.perf_counter() - start, 1e-9) / repeats


def _repeats(
    fn: Callable[[], object], setup: Callable[[], object], floor: float, sync: Callable[[], object] | None
) -> int:
    """How many calls make a sample of at least `floor` seconds; warms up on the way."""
    setup()
    fn()
    repeats = 1
    while True:
        took = min(_sample(fn, repeats, sync) for _ in range(3)) * repeats
        if took >= floor or repeats >= 1 << 16:
            return repeats
        repeats = max(repeats * 2, math.ceil(repeats * floor / took)) if took > floor / 50 else repeats * 8


def median_interval(count: int) -> tuple[int, int]:
    """Indices of the 95 % confidence interval of the median in `count` sorted values (normal to binomial)."""
    half = 0.98 * math.sqrt(count)
    low = max(0, math.floor(count / 2 - half))
    return low, count - 1 - low

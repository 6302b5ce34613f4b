"""One slice of timing: the same code in the harness and in every worker, standard library alone."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

SAMPLE_S = 100e-6
"""Least length of a sample; shorter calls are timed several at a time."""

WARM_S = 12e-3
"""Calls before the clock counts. Whoever ran before has the caches, and threads that wake up may find
themselves on one core: it took the scheduler 4 to 10 ms to part them, at half the speed."""


def time_slice(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds per call of samples taken for about `seconds`, at least one."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        fastest, spent = math.inf, 0.0
        while spent < WARM_S:
            took = _sample(call, 1)
            fastest, spent = min(fastest, took), spent + took
        repeats = max(1, math.ceil(SAMPLE_S / fastest))
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            samples.append(_sample(call, repeats))
        return samples
    finally:
        if collecting:
            gc.enable()


def _sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return max(time.perf_counter() - start, 1e-9) / repeats

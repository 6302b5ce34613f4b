"""Whether the cores are this machine's own, or other guests of its host work beside it.

A virtual CPU is a hyperthread, and the other one of its core may be another guest's. While that one works,
what issues many instructions a cycle takes up to twice as long, and what waits for one unit does not: an idle
loop of the interpreter 1.7 to 2.0 times as long, products from registers 1.02 times, layers something in
between. A slice of such a moment says who needs less of a core, not who is faster.

Two cores may also lie apart, likely behind different third-level caches, as the host pleases. Handing work
to the other core and back then takes 1.7 to 1.9 us instead of 0.64 to 0.9, for minutes on end, and a layer
on two threads up to 15 us more; one thread, and loops, take as long as before.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tautorch import _C

T = TypeVar("T")
SHARED = 1.35
"""Times the loop's fastest. Own cores were seen at 1.00 to 1.07, shared ones at 1.7 to 2.0."""

APART = 1.6
"""Times the fastest join."""

LEARN_S = 3.0
"""How long a run looks at the cores before its first case."""

_LOOP = range(4000)


def _loop_s() -> float:
    """Seconds of an idle loop, some 40 us: the fastest of three."""
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in _LOOP:
            pass
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def settle(limit: float = 0.05) -> None:
    """Wait until this process burns no time: torch's second thread spins for 7 ms after its last work."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 0.2e-3:
            return


def look() -> float:
    """Seconds of the loop on the slowest CPU that this process may use, once its other threads are still."""
    settle()
    if not hasattr(os, "sched_setaffinity"):
        return _loop_s()
    all_ = os.sched_getaffinity(0)
    try:
        slowest = 0.0
        for cpu in all_:
            os.sched_setaffinity(0, {cpu})
            slowest = max(slowest, _loop_s())
        return slowest
    finally:
        os.sched_setaffinity(0, all_)


def join() -> float | None:
    """Seconds to hand nothing to torch's second thread and wait for it; None where it has one thread."""
    if _C.max_threads() < 2:
        return None
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        _C.fork_join(100, 2)
        fastest = min(fastest, (time.perf_counter() - start) / 100)
    return fastest


def patience(text: str) -> float:
    """The option `--patience`: seconds, 0 or more. Raises ValueError for anything else."""
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError(text)
    return seconds


def patience_ended(row: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a row has slices of shared cores, and no fewer than the row that it would replace says."""
    shared = row.get("shared_slices", 0)
    return bool(shared and shared >= before.get("shared_slices", 0))


@dataclass
class Cores:
    """The cores over one run. `patience`: seconds that one case may wait for them; 0: they are not looked at.

    `fastest` is over all looks, `nearest` over all joins: until there was one at own cores, or at near ones,
    others are taken for such. `given_up` counts slices that were kept though the cores were shared or apart.
    """

    patience: float = 0.0
    look: Callable[[], float] = look
    join: Callable[[], float | None] = join
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    fastest: float = field(default=float("inf"))
    nearest: float = field(default=float("inf"))
    given_up: int = 0

    def learn(self, seconds: float) -> None:
        """Look for so long, where looks are asked for at all."""
        end = self.clock() + seconds
        while self.patience and self.clock() < end:
            self.own()

    def own(self) -> bool:
        """Whether nobody works beside this process at this moment, and its cores are near each other."""
        joined = self.join()  # before the look, which waits until the second thread is still again
        took = self.look()
        self.fastest = min(self.fastest, took)
        if joined is not None:
            self.nearest = min(self.nearest, joined)
        return took <= SHARED * self.fastest and (joined is None or joined <= APART * self.nearest)

    def wait(self, until: float) -> bool:
        """Wait for own cores until that time of the clock; whether they are."""
        while not self.own():
            if self.clock() >= until:
                return False
            self.sleep(5e-3)
        return True

    def take(self, slice_: Callable[[], T], until: float) -> T:
        """What the first slice with own cores before and after it gives, or at `until` the last one."""
        while self.patience:
            own = self.wait(until)
            taken = slice_()
            if own and self.own():
                return taken
            if self.clock() >= until:
                self.given_up += 1
                return taken
        return slice_()

"""Contestants timed in turns, in slices of some milliseconds, one at a time.

Every round gives each contestant one slice, beginning with another one each time, so that what the machine
does meanwhile (clock, neighbours) hits all of them alike. A slice's figure is the median of its samples.
Ratios are taken within a round, where drift cancels, and the median is over rounds. A slice that took much
longer than its contestant's fastest says something of the machine and nothing of the code: its round is left
out for that contestant.
With patience, a slice is taken again while another guest of the host worked on the cores before or after it
(see tautorch.testing.cores).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benches.peers.worker import WorkerError

from tautorch.testing.cores import Cores
from tautorch.timing import median_interval

DISTURBED = 1.3
"""Times the fastest slice. Undisturbed slices lie within 1.2; two threads on one core take up to 2."""

LEAST = 2
"""Undisturbed slices that are enough to go by."""

Timer = Callable[[float], list[float]]
"""Seconds in, seconds per call of samples taken for about so long out."""


@dataclass
class Contestant:
    """Somebody who can do the work, in one or several ways of which the fastest counts.

    `kernels` names what each way ran on; `error` is the relative error of its output, checked before timing.
    """

    name: str
    ways: dict[str, Timer]
    kernels: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None


@dataclass(frozen=True)
class Timed:
    """What a contestant took; `slices` has one median per round, NaN-free."""

    name: str
    way: str
    kernel: str
    slices: tuple[float, ...]
    error: float | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.slices[i] for i in self.undisturbed())

    def undisturbed(self) -> list[int]:
        """Rounds in which the machine was not taken away; all, where that would leave too few."""
        limit = DISTURBED * min(self.slices)
        good = [i for i, s in enumerate(self.slices) if s <= limit]
        return good if len(good) >= LEAST else list(range(len(self.slices)))


@dataclass(frozen=True)
class Ratio:
    """Times of a over those of b, round by round: above 1, b is faster. `low`, `high`: 95 % of the median."""

    median: float
    low: float
    high: float


def ratio(a: Timed, b: Timed, net_of: float = 0.0) -> Ratio:
    """a over b, each less `net_of` seconds."""
    least = 0.05e-6  # what is left of a call cannot be less than its clock

    def of(x: float, y: float) -> float:
        return max(x - net_of, least) / max(y - net_of, least)

    both = sorted(set(a.undisturbed()) & set(b.undisturbed()))
    if len(both) < min(LEAST, len(a.slices)):
        middle = of(a.seconds, b.seconds)
        return Ratio(middle, middle, middle)
    ratios = sorted(of(a.slices[i], b.slices[i]) for i in both)
    low, high = median_interval(len(ratios))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def contest(
    contestants: list[Contestant], *, rounds: int, seconds: float, cores: Cores | None = None
) -> tuple[dict[str, Timed], dict[str, str]]:
    """(what each took, why others could not finish), by name.

    A contestant with several ways runs two short slices of each first, and goes on with the fastest. A slice
    during which `cores` were not this machine's own is taken again, until their patience with the contest
    ends.
    """
    cores = cores or Cores()
    end = cores.clock() + cores.patience
    lost: dict[str, str] = {}
    ways: dict[str, str] = {}
    for contestant in contestants:
        try:
            ways[contestant.name] = _fastest_way(contestant, seconds / 4, cores, end)
        except WorkerError as error:
            lost[contestant.name] = str(error)
    slices: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        first = round_ % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            name = contestant.name
            if name in lost:
                continue
            try:
                slices[name].append(_slice(contestant.ways[ways[name]], seconds, cores, end))
            except WorkerError as error:
                lost[name] = str(error)
    timed = {
        c.name: Timed(c.name, ways[c.name], c.kernels.get(ways[c.name], ""), tuple(slices[c.name]), c.error)
        for c in contestants
        if c.name not in lost
    }
    return timed, lost


def _slice(timer: Timer, seconds: float, cores: Cores, end: float) -> float:
    """The median sample of a slice."""
    return statistics.median(cores.take(lambda: timer(seconds), end))


def _fastest_way(contestant: Contestant, seconds: float, cores: Cores, end: float) -> str:
    if len(contestant.ways) == 1:
        return next(iter(contestant.ways))
    took = dict.fromkeys(contestant.ways, float("inf"))
    for _ in range(2):
        for way, timer in contestant.ways.items():
            took[way] = min(took[way], _slice(timer, seconds, cores, end))
    return min(took, key=lambda way: took[way])

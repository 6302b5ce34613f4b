"""What the benches share: a fair comparison with peers, a table, and a results file.

Each bench verifies before it times, names the kernel that ran, and puts the peer beside the product in the
same process, in samples that take turns. Ratios are peer time over ours: above 1 is a win. Rows are printed
as they come and written together by `write`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

import tautorch
from tautorch import _C
from tautorch.testing.cores import Cores, patience_ended
from tautorch.timing import median_interval

WINDOW_S = 0.05
"""How long sides take turns between two looks at whose the cores are. A thread that was just woken may share
a core with the other for a millisecond or two: not much of this."""

_R = TypeVar("_R")


@dataclass
class Table:
    """Rows of one bench session.

    `quieter`: a row of the file gives way only to one whose sides took less time (ours and what it is held
    against: on a shared machine, whoever gains by it). Rows without two such times are always replaced.
    `cores`: with patience, rows say in how many of their windows other guests were seen; a row with such
    windows replaces none with fewer.
    """

    timed: bool
    quieter: bool = False
    cores: Cores = field(default_factory=Cores)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _given_up: int = 0

    def begin(self) -> None:
        """What was given up until now is no matter of the rows that follow."""
        self._given_up = self.cores.given_up

    def in_turns(self, sides: dict[str, Callable[[], object]], *, seconds: float = 0.5) -> dict[str, float]:
        """Median seconds of a call of every side; see `samples_in_turns`."""
        self.begin()
        samples = samples_in_turns(sides, seconds=seconds, cores=self.cores)
        return {name: statistics.median(times) for name, times in samples.items()}

    def add(self, bench: str, case: str, **figures: Any) -> None:
        """Record and print one row; figures are numbers or text."""
        if self.timed and self.cores.patience:
            figures["shared_slices"] = self.cores.given_up - self._given_up
        self.rows.append({"bench": bench, "case": case, **figures})
        if self.timed:
            print(
                "  ".join([f"{bench:<16}", f"{case:<44}", *(f"{k} {_text(v)}" for k, v in figures.items())])
            )

    def compare(
        self,
        bench: str,
        case: str,
        ours: Callable[[], object],
        peers: dict[str, Callable[[], object]],
        *,
        operations: float | None = None,
        target: tuple[str, float] | None = None,
        peak_of: str | None = None,
        seconds: float = 0.4,
        **extra: Any,
    ) -> dict[str, float]:
        """Time `ours` against every peer and add a row; returns ratios by peer (none when not timing).

        `operations`: of one call, for GOPS. `target`: a peer's name and the ratio asked. `peak_of`: a kernel,
        for the share of its arithmetic's peak on all threads. `seconds`: for each peer.
        """
        with torch.inference_mode():
            ours()
            for peer in peers.values():
                peer()
            if not self.timed:
                self.add(bench, case, **extra)
                return {}
            self.begin()
            samples = samples_in_turns({"": ours, **peers}, seconds=seconds * len(peers), cores=self.cores)
            mine = samples.pop("")
            ours_us = statistics.median(mine) * 1e6
            ratios: dict[str, float] = {}
            figures: dict[str, Any] = {}
            for name, theirs in samples.items():
                by_round = sorted(b / a for a, b in zip(mine, theirs, strict=True))
                low, high = median_interval(len(by_round))
                ratios[name] = statistics.median(by_round)
                figures[f"vs {name}"] = f"{ratios[name]:.2f}x [{by_round[low]:.2f}, {by_round[high]:.2f}]"
            row: dict[str, Any] = {"us": round(ours_us, 2)}
            if operations is not None:
                row["GOPS"] = round(operations / ours_us / 1e3)
                if peak_of is not None:
                    peak = torch.get_num_threads() * peak_gops(peak_of)
                    row["share of peak"] = f"{operations / ours_us / 1e3 / peak:.0%}"
            row |= figures | extra
            if target is not None:
                row["target"] = (
                    f">= {target[1]}x {target[0]}: {'met' if ratios[target[0]] >= target[1] else 'MISSED'}"
                )
            self.add(bench, case, **row)
            return ratios

    def write(self, folder: pathlib.Path) -> pathlib.Path | None:
        """Write the rows to `folder`/<machine>.json, replacing rows of the same bench and case."""
        if not self.timed or not self.rows:
            return None
        path = folder / f"{machine().replace(' ', '-').lower()}.json"
        before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        kept = {(r["bench"], r["case"]): r for r in before.get("rows", [])}
        for row in self.rows:
            row["date"] = time.strftime("%Y-%m-%d")
            key = (row["bench"], row["case"])
            old = kept.get(key)
            if old is None or not (patience_ended(row, old) or (self.quieter and not _quieter(row, old))):
                kept[key] = row
        rows = list(kept.values())
        about = {
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "tautorch": tautorch.__version__,
            "quieter": self.quieter or bool(before.get("quieter")),
        }
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        os.replace(temporary, path)
        return path


def _quieter(row: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether its sides took less time; or one of the two says other things or no times."""
    took, took_before = _took(row), _took(before)
    return row.keys() != before.keys() or took is None or took_before is None or not took >= took_before


def _took(row: dict[str, Any]) -> float | None:
    """Microseconds of ours and of those that `ratio` or `vs ...` are of; None if there is no such pair."""
    for pair in (("one_us", "two_us"), ("us", "read_us")):
        if all(name in row for name in pair):
            return float(sum(row[name] for name in pair))
    others = [str(v) for k, v in row.items() if k == "ratio" or (k.startswith("vs ") and ", net" not in k)]
    if "us" not in row or not others:
        return None
    return float(row["us"] * (1 + sum(float(v.split("x")[0]) for v in others)))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def machine() -> str:
    """Model of this CPU, its best kernel and the number of threads used.

    Virtual machines give many processors one name ("AMD EPYC"): the family tells Zen 4 (25) from Zen 5 (26).
    """
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    with contextlib.suppress(OSError):
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
        facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}
        name = facts.get("model name", name)
        if "cpu family" in facts:
            name += f" family {facts['cpu family']} model {facts['model']}"
        if "CPU part" in facts:  # Arm: 0x41 0xd0b is a Cortex-A76
            name += f" {facts['CPU implementer']} {facts['CPU part']}"
    with contextlib.suppress(OSError):  # a board names itself
        board = pathlib.Path("/proc/device-tree/model").read_text().strip("\0\n ")
        name = f"{board} {name}"
    name = name.replace("(R)", "").replace("(TM)", "")
    best = next(isa for isa, available in _C.isas().items() if available)
    return f"{name} {best} {torch.get_num_threads()} threads"


def best_seconds(fn: Callable[[], object], repeats: int = 50) -> float:
    """Least wall time of one call: what the machine can do when nothing interferes."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - start)
    return best


def peak_gops(kernel: str) -> float:
    """Operations per ns (2 per multiply-accumulate) of one core's product instruction, measured now."""
    rounds = 20_000
    macs = _C.peak_i8(kernel, rounds)
    return 2 * macs / best_seconds(lambda: _C.peak_i8(kernel, rounds), 15) / 1e9


def samples_in_turns(
    sides: dict[str, Callable[[], object]],
    *,
    seconds: float = 0.5,
    sample: float = 150e-6,
    cores: Cores | None = None,
) -> dict[str, list[float]]:
    """Seconds of a call of every side, in samples of about `sample` seconds that take turns.

    What the machine's other work or a drifting clock does to one side, it does to all. Where `cores` have
    patience, what was sampled within `WINDOW_S` of a moment when they were not this machine's own is sampled
    again.
    """
    repeats = {}
    for name, fn in sides.items():
        fn()
        repeats[name] = max(1, round(sample / best_seconds(fn, 3)))

    def window() -> list[dict[str, float]]:
        rounds: list[dict[str, float]] = []
        end = time.perf_counter() + WINDOW_S
        while not rounds or time.perf_counter() < end:
            round_ = {}
            for name, fn in sides.items():
                fn()  # what the side before left in the caches is not this one's cost
                begin = time.perf_counter()
                for _ in range(repeats[name]):
                    fn()
                round_[name] = (time.perf_counter() - begin) / repeats[name]
            rounds.append(round_)
        return rounds

    cores = cores or Cores()
    until = cores.clock() + cores.patience
    rounds: list[dict[str, float]] = []
    windows = 0
    while windows < math.ceil(seconds / WINDOW_S) or len(rounds) < 7:
        rounds += cores.take(window, until)
        windows += 1
    return {name: [round_[name] for round_ in rounds] for name in sides}


def verdict(value: float, least: float, text: str) -> dict[str, str]:
    """The `target` of a row: whether `value` is at least `least`."""
    return {"target": f"{text}: {'met' if value >= least else 'MISSED'}"}


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Run with n torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_threads(n: int, fn: Callable[[], _R]) -> Callable[[], _R]:
    """`fn` run with n torch threads, which stay so many: setting them at every call would take 1 us."""

    def call() -> _R:
        if torch.get_num_threads() != n:
            torch.set_num_threads(n)
        return fn()

    return call


def dynamic_peers(linear: torch.nn.Linear) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """torch.ao's dynamically quantised linear with every engine this torch has."""
    peers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    before = torch.backends.quantized.engine
    for engine in ("x86", "onednn", "fbgemm"):
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        try:
            model = torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8
            )
            peers[f"torch.ao {engine}"] = model[0]
        finally:
            torch.backends.quantized.engine = before
    return peers

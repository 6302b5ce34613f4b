"""Rows of a run: what is in one, and the file they are merged into row by row."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benches.peers.arena import Contestant, Timed, ratio

import tautorch
from tautorch.testing.cores import patience_ended

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """The time of the fastest of `names` over that of the fastest of `ours` shall be at least `want`.

    `net`: each less the time of the contestant "empty call".
    """

    what: str
    want: float
    names: tuple[str, ...]
    ours: tuple[str, ...] = ("ours",)
    net: bool = False


@dataclass
class Case:
    """One row to be: contestants by their part in it, and what is asked of their times.

    `peers` are others' products, `own` are other ways of ours, `limits` neither: "peak" (its time is of one
    operation) and "empty call". `share`: of the peak that is asked for. `lost`: why others cannot take part.
    """

    part: str
    name: str
    meta: dict[str, Any]
    operations: float
    ours: Contestant
    peers: list[Contestant] = field(default_factory=list)
    own: list[Contestant] = field(default_factory=list)
    limits: list[Contestant] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    share: float | None = None
    lost: dict[str, str] = field(default_factory=dict)

    def contestants(self) -> list[Contestant]:
        return [self.ours, *self.peers, *self.own, *self.limits]


def make_row(case: Case, timed: dict[str, Timed], lost: dict[str, str], threads: int) -> Row:
    """The figures of one case. Ratios are the other's time over ours."""
    ours = timed["ours"]
    row: Row = {"part": case.part, "case": case.name, **case.meta, "kernel": ours.kernel}
    row |= {"us": us(ours.seconds), "gops": round(case.operations / ours.seconds / 1e9)}
    if "peak" in timed:
        peak = threads / timed["peak"].seconds / 1e9
        row |= {"peak_gops": round(peak), "share": round(case.operations / ours.seconds / 1e9 / peak, 4)}
    if "empty call" in timed:
        row["empty_us"] = us(timed["empty call"].seconds)
    row["spread"] = round(ours.seconds / min(ours.slices), 3)
    names = [c.name for c in case.peers]
    row["peers"] = {name: _figures(timed[name], ours) for name in names if name in timed}
    row["peers"] |= {name: {"lost": why} for name, why in {**case.lost, **lost}.items()}
    row["own"] = {c.name: _figures(timed[c.name], ours) for c in case.own if c.name in timed}
    there = [name for name in names if name in timed]
    if there:
        best = min(there, key=lambda name: row["peers"][name]["ratio"])
        row |= {"best": best, "ratio": row["peers"][best]["ratio"]}
    row["targets"] = [met for target in case.targets if (met := _verdict(target, timed))]
    # What is asked for is a share of what vectors can do: AMX's tiles wait for L2 (docs/perf-notes.md).
    if case.share is not None and "share" in row and ours.kernel != "amx":
        got = row["share"]
        row["targets"].append(
            {"what": "share of peak", "want": case.share, "got": got, "met": got >= case.share}
        )
    row["date"] = time.strftime("%Y-%m-%d")
    return row


def _figures(other: Timed, ours: Timed) -> dict[str, Any]:
    r = ratio(other, ours)
    figures = {"us": us(other.seconds), "ratio": round(r.median, 3), "low": round(r.low, 3)}
    figures |= {"high": round(r.high, 3), "way": other.way, "kernel": other.kernel}
    if other.error is not None:
        figures["error"] = float(f"{other.error:.2g}")
    return figures


def _verdict(target: Target, timed: dict[str, Timed]) -> dict[str, Any] | None:
    """None where nobody to compare with ran."""
    there = [timed[name] for name in target.names if name in timed]
    mine = [timed[name] for name in target.ours if name in timed]
    if not there or not mine:
        return None
    empty = timed["empty call"].seconds if target.net else 0.0
    fastest = min(mine, key=lambda one: one.seconds)
    got = min(ratio(other, fastest, empty).median for other in there)
    met = {"what": target.what, "want": target.want, "got": round(got, 3), "met": got >= target.want}
    return {**met, "by": fastest.name} if len(mine) > 1 else met


def us(seconds: float) -> float:
    return round(seconds * 1e6, 2 if seconds < 1e-3 else 1)


def _times(row: Row) -> dict[str, float]:
    """Microseconds of everybody in a row."""
    others = {**row["peers"], **row["own"]}
    return {"ours": row["us"], **{name: other["us"] for name, other in others.items() if "us" in other}}


def quieter(row: Row, before: Row) -> bool:
    """Whether its contestants together took less time; or others took part."""
    mine, theirs = _times(row), _times(before)
    return mine.keys() != theirs.keys() or sum(mine.values()) < sum(theirs.values())


@dataclass
class Results:
    """Rows in a JSON file; a row replaces the one of the same part and case, and the others stay.

    `quieter`: only where it is the quieter one, whoever of its contestants gains by that. One whose patience
    with shared cores ended replaces none with fewer shared slices.
    """

    path: Path | None
    about: dict[str, Any]
    quieter: bool = False
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep the row, and write the file: a run that is broken off keeps what it has."""
        self.rows.append(row)
        if self.path is None:
            return
        old: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        key = (row["part"], row["case"])
        rows = {(r["part"], r["case"]): r for r in old.get("rows", [])}
        before = rows.get(key)
        if before is None or not (patience_ended(row, before) or (self.quieter and not quieter(row, before))):
            rows[key] = row
        versions = {**old.get("versions", {}), **self.about["versions"]}
        head = {**self.about, "versions": versions, "quieter": self.quieter or old.get("quieter", False)}
        text = json.dumps({**head, "rows": list(rows.values())}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)


def about(
    machine: str, versions: dict[str, str], rounds: int, slice_ms: float, patience_s: float = 0.0
) -> dict[str, Any]:
    """What a results file says of the run."""
    return {
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "slice_ms": slice_ms,
        "patience_s": patience_s,
        "versions": {"tautorch": tautorch.__version__, "torch": torch.__version__, **versions},
    }

"""A claim, the jobs that test it for each seed, and the row that comes of their results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benches.methods.jobs import Job, Outcome, Result

Relation = Literal[">=", "<=", "<", ">"]
SIGNS = {">=": "≥", "<=": "≤", "<": "<", ">": ">"}

Results = Mapping[str, Result]
"""The results of one seed's jobs by the claim's own names for them."""


@dataclass(frozen=True)
class Claim:
    """What is said of a method, to be judged by the mean of `value` over the seeds.

    Args:
        task, title: where, and what is claimed.
        measured: what `value` is, in words.
        relation, bound: the mean must be in this relation to the bound.
        unit: written after the values, and multiplied out before: "%" and "points" show shares times 100.
        jobs: by seed, the jobs whose results `value` and `parts` read.
        value: the figure of one seed.
        parts: what it was made of, by name, for the plot; in `parts_unit`.
    """

    task: str
    title: str
    measured: str
    relation: Relation
    bound: float
    unit: str
    jobs: Mapping[int, Mapping[str, Job]]
    value: Callable[[Results], float]
    parts: Callable[[Results], dict[str, float]]
    parts_unit: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A claim that was judged: its figure for each seed, and whether the mean met the target."""

    task: str
    title: str
    measured: str
    relation: Relation
    bound: float
    unit: str
    values: dict[str, float]
    parts: dict[str, dict[str, float]]
    parts_unit: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""
    failed: str = ""
    judged: bool = True

    @property
    def mean(self) -> float:
        """Over the seeds; NaN without any."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (n - 1); NaN below two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    @property
    def met(self) -> bool | None:
        """None where nothing was judged."""
        if not self.values or self.failed or not self.judged:
            return None
        mean, bound = self.mean, self.bound
        # Equal counts of images must not fail by a rounding of their quotients.
        slack = 1e-9 * max(1.0, abs(bound))
        return {
            ">=": mean >= bound - slack, "<=": mean <= bound + slack, "<": mean < bound, ">": mean > bound
        }[self.relation]  # fmt: skip

    @property
    def verdict(self) -> str:
        """met, missed, or why it was not judged."""
        return {True: "met", False: "missed", None: "failed" if self.failed else "not judged"}[self.met]

    def part(self, name: str) -> tuple[float, float, float]:
        """Mean, least and greatest of a part over the seeds."""
        values = [parts[name] for parts in self.parts.values()]
        return statistics.fmean(values), min(values), max(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `Row.from_dict` reads it back."""
        extra = {"mean": self.mean, "spread": self.spread, "verdict": self.verdict}
        finite = {name: value if isinstance(value, str) or math.isfinite(value) else None
                  for name, value in extra.items()}  # fmt: skip
        return {**asdict(self), **finite}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def judge(claim: Claim, outcome: Outcome, *, judged: bool = True) -> Row:
    """The row of a claim; not judged where `judged` is False or a seed's results are not there."""
    values: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {}
    settings: dict[str, dict[str, Any]] = {}
    failed = ""
    for seed, jobs in claim.jobs.items():
        failures = [outcome.failed[job.key] for job in jobs.values() if job.key in outcome.failed]
        if failures:
            failed = failed or f"seed {seed}: {failures[0]}"
        if any(job.key not in outcome.results for job in jobs.values()):
            judged = False
            continue
        results = {name: outcome.results[job.key] for name, job in jobs.items()}
        values[str(seed)], parts[str(seed)] = claim.value(results), claim.parts(results)
        settings = settings or {name: _shown(job) for name, job in jobs.items()}
    return Row(
        claim.task, claim.title, claim.measured, claim.relation, claim.bound, claim.unit, values, parts,
        claim.parts_unit, settings, claim.note, failed, judged,
    )  # fmt: skip


def _shown(job: Job) -> dict[str, Any]:
    return {name: value for name, value in job.settings.items() if name != "seed"}


def shown(value: float, unit: str, digits: int = 3) -> str:
    """A figure with its unit: shares in percent or points of percent, factors with a times sign."""
    if math.isnan(value):
        return "–"
    if unit in ("%", "points"):
        text = f"{100 * value:.{digits}g}" if abs(value) < 1 else f"{100 * value:.0f}"
        return f"{text} {unit}"
    return f"{value:.{digits}g}{'×' if unit == '×' else f' {unit}' if unit else ''}"

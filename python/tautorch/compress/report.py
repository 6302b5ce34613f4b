"""What happened to a model: stages, layers, comparisons and verdicts, in the terminal, as JSON and as a page.

All sizes are bytes, all times seconds of wall clock per call, whatever the tables print them in.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tautorch.compress import page

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

FORMAT = 2
"""Version of the JSON; raised when a field changes its meaning."""


@dataclass(frozen=True)
class Proportion:
    """``correct`` out of ``total``, with Wilson's score interval.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927. Unlike
    the normal approximation it stays inside [0, 1] and is honest near 100 %, where a good classifier lives.
    """

    correct: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.correct <= self.total:
            raise ValueError(
                f"Proportion: correct must be within 0..total and total positive, "
                f"got {self.correct} of {self.total}"
            )

    @property
    def value(self) -> float:
        return self.correct / self.total

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Lower and upper limit; ``z`` = 1.96 standard deviations is 95 % confidence."""
        n, p = self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # At 0 and 1 the exact limit is 0 and 1; rounding leaves it an ulp away, on either side.
        low = 0.0 if self.correct == 0 else max(0.0, centre - half)
        return low, 1.0 if self.correct == n else min(1.0, centre + half)


@dataclass(frozen=True)
class Stage:
    """One state of the model on its way: what it scores, weighs and costs.

    ``latency_s`` maps batch size to seconds per call; empty where nothing was timed.
    """

    name: str
    detail: str
    parameters: int
    bytes: int
    accuracy: Proportion | None = None
    latency_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """What became of one layer, and why.

    ``before_s`` and ``after_s`` map the input's shape (``64x1152``) to seconds per call of the layer that was
    there and of the compiled one that was offered for it, also where that one lost. ``error`` is the latter's
    relative output error.
    """

    name: str
    before: str
    after: str
    kernel: str
    replaced: bool
    reason: str
    parameters: int
    bytes_before: int
    bytes_after: int
    before_s: Mapping[str, float] = field(default_factory=dict)
    after_s: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None


@dataclass(frozen=True)
class Speedup:
    """``model`` against ``peer``, timed in turns: ``ratio`` above 1 is faster, with its 95 % interval."""

    model: str
    peer: str
    batch: int
    ratio: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        """Whether the interval is too wide to quote the ratio: its ends are more than 1.5 times apart."""
        return self.high > 1.5 * self.low


@dataclass(frozen=True)
class Check:
    """One expectation: a broken ``promise`` is a failure, a missed ``target`` is only said.

    ``passed`` is None where it was not judged; ``got`` then says why.
    """

    name: str
    expected: str
    got: str
    passed: bool | None
    kind: Literal["promise", "target"] = "promise"


@dataclass
class Report:
    """Everything there is to say about one compression."""

    title: str
    stages: list[Stage] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    speedups: list[Speedup] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    steps_s: dict[str, float] = field(default_factory=dict)
    """Seconds that each step of the compression itself took."""
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    model_error: float | None = None
    """Relative L2 error of the compiled model's output on the example inputs, against that before."""

    @property
    def kept_promises(self) -> bool:
        """False if any promise was judged and broken."""
        return all(check.passed is not False for check in self.checks if check.kind == "promise")

    @property
    def compiled_share(self) -> float:
        """Share of the listed layers' parameters that run in compiled layers, in [0, 1]."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.parameters for layer in self.layers if layer.replaced) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values; `from_dict` reads it back."""
        return {"format": FORMAT, **asdict(self), "kept_promises": self.kept_promises}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`.

        Raises:
            ValueError: written by another version of the format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f"Report.from_dict: format must be {FORMAT}, got {data.get('format')!r}; write it anew"
            )

        def times(values: Mapping[Any, float]) -> dict[int, float]:
            return {int(batch): value for batch, value in values.items()}  # JSON's keys are strings

        def stage(item: Mapping[str, Any]) -> Stage:
            accuracy = Proportion(**item["accuracy"]) if item["accuracy"] is not None else None
            return Stage(**{**item, "accuracy": accuracy, "latency_s": times(item["latency_s"])})

        return cls(
            title=data["title"],
            stages=[stage(item) for item in data["stages"]],
            layers=[Layer(**item) for item in data["layers"]],
            speedups=[Speedup(**item) for item in data["speedups"]],
            checks=[Check(**item) for item in data["checks"]],
            steps_s=dict(data["steps_s"]),
            notes=list(data["notes"]),
            environment=dict(data["environment"]),
            model_error=data["model_error"],
        )

    def write_json(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(
            json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs no other file and no network."""
        Path(path).write_text(page.render(self), encoding="utf-8")

    def print(self, console: Console | None = None) -> None:
        """Print it to ``console``, by default to the terminal; what is too wide for a table line by line."""
        from rich.console import Console  # rich takes longer to import than the whole of tautorch

        (console or Console()).print(self)

    def __rich__(self) -> RenderableType:
        from tautorch.compress import terminal  # for the same reason

        return terminal.tables(self)


def describe_environment() -> dict[str, str]:
    """The machine and the versions a measurement belongs to."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "CPU": _cpu_name(),
        "vector units": capability,
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"

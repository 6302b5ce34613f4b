"""The results of a run: JSON, and the table for the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benches.methods.claims import SIGNS, Row, shown
from rich import box
from rich.table import Table
from rich.text import Text

FORMAT = 1
"""Version of the JSON; raised when a field changes its meaning."""
WIDE = 140
"""Characters; a narrower terminal does not show the means that a figure is made of."""
STYLES = {"met": "green", "missed": "yellow", "failed": "bold red", "not judged": "dim"}


@dataclass
class Results:
    """Rows, and what they belong to."""

    rows: list[Row]
    seeds: list[int]
    seconds: float
    """Processor seconds of all jobs together, those done in earlier runs included."""
    environment: dict[str, str] = field(default_factory=dict)
    quick: bool = False

    def write(self, path: Path) -> None:
        """As JSON, in one step."""
        data = {
            "format": FORMAT,
            "date": self.environment.get("date", ""),
            "environment": self.environment,
            "seeds": self.seeds,
            "seconds": round(self.seconds, 1),
            "quick": self.quick,
            "rows": [row.to_dict() for row in self.rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote; ValueError for another version of the format."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(
                f"methods: the format of {path} must be {FORMAT}, got {data.get('format')}; run anew"
            )
        rows = [Row.from_dict(row) for row in data["rows"]]
        return cls(rows, data["seeds"], data["seconds"], data["environment"], data["quick"])


def target(row: Row) -> str:
    """Relation and bound, such as "≥ 50 %"."""
    return f"{SIGNS[row.relation]} {shown(row.bound, row.unit)}"


def got(row: Row) -> str:
    """Mean and standard deviation over the seeds."""
    spread = "" if row.spread != row.spread else f" ± {shown(row.spread, row.unit, 2)}"
    return f"{shown(row.mean, row.unit)}{spread}"


def ingredients(row: Row) -> str:
    """The means of what a figure is made of, in short."""
    names = list(next(iter(row.parts.values()), {}))
    return ", ".join(f"{name} {part_shown(row.part(name)[0], row.parts_unit)}" for name in names)


def part_shown(value: float, unit: str) -> str:
    """An ingredient with as many digits as its unit needs."""
    if unit == "accuracy":
        return f"{100 * value:.2f} %"
    if unit == "bytes":
        return f"{value:,.0f} B"
    return f"{value:.4g}"


def table(results: Results, width: int = 100) -> Table:
    """One row for each claim; a terminal of `width` characters has room for what a figure is made of, or
    not."""
    title = f"Compression methods on real data, {len(results.seeds)} seeds"
    if results.quick:
        title += ": a few steps each, to see that it runs; nothing is judged"
    made = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "claim", "target", "got, mean ± sd"):
        made.add_column(name, no_wrap=name in ("task", "target"))
    made.add_column("")
    wide = width >= WIDE
    if wide:
        made.add_column("of these means", style="dim")
    for row in results.rows:
        verdict = Text(row.verdict, style=STYLES[row.verdict])
        cells: Sequence[str] = (row.task, row.title, target(row), got(row))
        made.add_row(*map(Text, cells), verdict, *([Text(row.failed or ingredients(row))] if wide else []))
    return made

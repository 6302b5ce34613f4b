"""A report for the terminal: as tables, or line by line where these do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from tautorch.compress._format import (
    batches_of,
    format_accuracy,
    format_bytes,
    format_seconds,
    format_verdict,
)
from tautorch.convert_report import format_error

if TYPE_CHECKING:
    from tautorch.compress.report import Check, Layer, Report, Speedup

_SENTENCE = 18
"""Columns that sentences need in a table: with fewer a block of lines is read more easily."""

_VERDICT_STYLE = {
    "kept": "green",
    "met": "green",
    "BROKEN": "bold red",
    "missed": "yellow",
    "not judged": "dim",
}


def tables(report: Report) -> RenderableType:
    """Everything in the report, as one thing that `rich` can print."""
    parts: list[RenderableType] = [
        _stage_sheet(report) if report.stages else Text(report.title, style="bold")
    ]
    if report.layers:
        parts.append(_layer_sheet(report.layers))
    if report.model_error is not None:
        parts.append(Text(f"model error {format_error(report.model_error)}", style="bold"))
    if report.speedups:
        parts.append(_speedup_table(report.speedups))
    if report.checks:
        parts.append(_check_table(report.checks))
    parts += [Text(note, style="dim") for note in report.notes]
    return Group(*(line for part in parts for line in (part, Text())))


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _row(table: Table, *cells: str | Text, style: str | None = None) -> None:
    """Add cells as they are: rich would take [brackets] in them for its markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


@dataclass(frozen=True)
class _Column:
    """``wraps``: its cells are sentences, which may take several lines of a table."""

    name: str
    right: bool = False
    wraps: bool = False


class _Sheet:
    """Rows that stand whole at any width: a table where it fits, elsewhere a block of lines for each row."""

    def __init__(self, title: str, columns: Sequence[_Column]) -> None:
        self._title, self._columns = title, columns
        self._rows: list[tuple[Sequence[str], str]] = []

    def add(self, *cells: str, style: str) -> None:
        """A row of as many cells as there are columns; one that does not apply is empty."""
        self._rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table() if self._least_width() <= options.max_width else self._blocks()

    def _least_width(self) -> int:
        cells = zip(*(cells for cells, _ in self._rows), strict=True)
        widths = [
            _SENTENCE
            if column.wraps
            else max(cell_len(line) for c in (column.name, *row) for line in c.split("\n"))
            for column, row in zip(self._columns, cells, strict=True)
        ]
        return sum(widths) + 3 * len(widths) - 1  # as `_table` has its box and padding

    def _table(self) -> Table:
        table = _table(self._title)
        for index, column in enumerate(self._columns):
            table.add_column(
                column.name,
                style="" if index else "bold",
                justify="right" if column.right else "left",
                no_wrap=not column.wraps,
            )
        for cells, style in self._rows:
            _row(table, *(cell or "–" for cell in cells), style=style)
        return table

    def _blocks(self) -> RenderableType:
        lines: list[RenderableType] = [Text(self._title, style="bold")]
        for cells, style in self._rows:
            grid = Table.grid(padding=(0, 0, 0, 2))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(style=style, overflow="fold")
            for column, cell in list(zip(self._columns, cells, strict=True))[1:]:
                if cell:
                    _row(grid, column.name, cell)
            lines += [Text(), Text(cells[0], style=f"bold {style}"), grid]
        return Group(*lines)


def _stage_sheet(report: Report) -> _Sheet:
    batches = batches_of([stage.latency_s for stage in report.stages])
    sheet = _Sheet(
        report.title,
        [
            _Column("stage"),
            _Column("accuracy [95 %]"),
            _Column("parameters", right=True),
            _Column("on disk", right=True),
            *(_Column(f"batch {batch}", right=True) for batch in batches),
            _Column("what was done", wraps=True),
        ],
    )
    for index, stage in enumerate(report.stages):
        sheet.add(
            stage.name,
            format_accuracy(stage.accuracy) if stage.accuracy else "",
            f"{stage.parameters:,}",
            format_bytes(stage.bytes),
            *(format_seconds(stage.latency_s[b]) if b in stage.latency_s else "" for b in batches),
            stage.detail,
            style="green" if index == len(report.stages) - 1 else "",
        )
    return sheet


def _layer_sheet(layers: Sequence[Layer]) -> _Sheet:
    sheet = _Sheet(
        "Layers",
        [
            _Column("layer"),
            _Column("before → after", wraps=True),
            _Column("kernel"),
            _Column("bytes", right=True),
            _Column("error", right=True),
            _Column("time"),
            _Column("reason", wraps=True),
        ],
    )
    for layer in layers:
        times = [
            f"{shape}: {format_seconds(layer.before_s[shape])} → {format_seconds(after)}"
            for shape, after in layer.after_s.items()
            if shape in layer.before_s
        ]
        sheet.add(
            layer.name,
            f"{layer.before} → {layer.after}" if layer.replaced else f"{layer.before}, kept",
            layer.kernel,
            f"{format_bytes(layer.bytes_before)} → {format_bytes(layer.bytes_after)}",
            format_error(layer.error),
            "\n".join(times),
            layer.reason,
            style="" if layer.replaced else "yellow",
        )
    return sheet


def _speedup_table(speedups: Sequence[Speedup]) -> Table:
    table = _table("Speed, timed in turns")
    for column in ("model", "against"):
        table.add_column(column)
    for column in ("batch", "times faster", "95 %"):
        table.add_column(column, justify="right")
    for item in speedups:
        _row(
            table,
            item.model,
            item.peer,
            str(item.batch),
            Text(f"{item.ratio:.2f}", style="green" if item.low > 1 else "red" if item.high < 1 else ""),
            f"[{item.low:.2f}, {item.high:.2f}]",
        )
    return table


def _check_table(checks: Sequence[Check]) -> Table:
    table = _table("Promises and targets")
    for column in ("", "what", "expected", "got"):
        table.add_column(column)
    for check in checks:
        _row(
            table,
            Text(format_verdict(check), style=_VERDICT_STYLE[format_verdict(check)]),
            check.name,
            check.expected,
            check.got,
        )
    return table

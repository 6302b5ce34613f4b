"""A report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tautorch.compress._format import (
    batches_of,
    format_accuracy,
    format_bytes,
    format_seconds,
    format_verdict,
)

if TYPE_CHECKING:
    from tautorch.compress.report import Check, Layer, Report, Speedup

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
        _stage_table(report) if report.stages else Text(report.title, style="bold")
    ]
    if report.layers:
        parts.append(_layer_table(report.layers))
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


def _stage_table(report: Report) -> Table:
    table = _table(report.title)
    table.add_column("stage", style="bold")
    table.add_column("accuracy [95 %]", no_wrap=True)
    for column in ("parameters", "on disk"):
        table.add_column(column, justify="right", no_wrap=True)
    batches = batches_of([stage.latency_s for stage in report.stages])
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    table.add_column("what was done", style="dim")
    for index, stage in enumerate(report.stages):
        last = index == len(report.stages) - 1
        _row(
            table,
            stage.name,
            format_accuracy(stage.accuracy) if stage.accuracy else "–",
            f"{stage.parameters:,}",
            format_bytes(stage.bytes),
            *(format_seconds(stage.latency_s[b]) if b in stage.latency_s else "–" for b in batches),
            stage.detail,
            style="green" if last else None,
        )
    return table


def _layer_table(layers: Sequence[Layer]) -> Table:
    table = _table("Layers")
    table.add_column("layer", style="bold", no_wrap=True)
    table.add_column("before → after")
    table.add_column("kernel", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    batches = batches_of([layer.before_s for layer in layers])
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    table.add_column("reason", style="dim")
    for layer in layers:
        _row(
            table,
            layer.name,
            f"{layer.before} → {layer.after}" if layer.replaced else f"{layer.before}, kept",
            layer.kernel,
            f"{format_bytes(layer.bytes_before)} → {format_bytes(layer.bytes_after)}",
            *(_from_to(layer, batch) for batch in batches),
            layer.reason,
            style=None if layer.replaced else "yellow",
        )
    return table


def _from_to(layer: Layer, batch: int) -> str:
    if batch not in layer.before_s or batch not in layer.after_s:
        return "–"
    return f"{format_seconds(layer.before_s[batch])} → {format_seconds(layer.after_s[batch])}"


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

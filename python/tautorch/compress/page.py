"""A report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tautorch.compress import charts
from tautorch.compress._format import (
    batch_of,
    batches_of,
    format_accuracy,
    format_bytes,
    format_seconds,
    format_share,
    format_verdict,
)
from tautorch.convert_report import format_error

if TYPE_CHECKING:
    from tautorch.compress.report import Layer, Report, Stage

_CHIP = {"kept": "good", "met": "good", "BROKEN": "bad", "missed": "warn", "not judged": "soft"}


def render(report: Report) -> str:
    """The whole page. Every text of the report is escaped."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = "".join(
        [
            f"<h1>{escape(report.title)}</h1>",
            f'<p class="lead">{escape(_summary(report))}</p>',
            _tiles(report),
            _section("At a glance", _figures(report)),
            _section("Stages", _stage_table(report)),
            _section("Layers", _layer_figures(report.layers) + _layer_table(report.layers)),
            _section("Speed, timed in turns", _speedup_table(report)),
            _section("Promises and targets", _check_table(report)),
            _footer(report),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>{body}</main>\n</body>\n</html>\n"
    )


def _summary(report: Report) -> str:
    judged = [check for check in report.checks if check.passed is not None]
    broken = [check.name for check in judged if check.kind == "promise" and not check.passed]
    replaced = sum(layer.replaced for layer in report.layers)
    parts = []
    if report.layers:
        parts.append(
            f"{replaced} of {len(report.layers)} layers, with {format_share(report.compiled_share)} "
            "of the parameters, run on compiled kernels."
        )
    if report.model_error is not None:
        parts.append(f"Model error: {format_error(report.model_error)}.")
    if broken:
        parts.append(f"Broken: {'; '.join(broken)}.")
    elif judged:
        parts.append("Every promise that was judged was kept.")
    return " ".join(parts)


def _tiles(report: Report) -> str:
    if len(report.stages) < 2:
        return ""
    first, last = report.stages[0], report.stages[-1]
    tiles = []
    if last.accuracy is not None:
        low, high = last.accuracy.interval()
        was = f"; {first.name}: {first.accuracy.value * 100:.2f} %" if first.accuracy is not None else ""
        tiles.append(
            (
                f"{last.accuracy.value * 100:.2f} %",
                "held-out accuracy",
                f"95 %: {low * 100:.1f} to {high * 100:.1f}{was}",
            )
        )
    tiles.append(
        (
            f"{first.bytes / max(last.bytes, 1):.3g}×",
            f"smaller than the {first.name}",
            f"{format_bytes(first.bytes)} → {format_bytes(last.bytes)} on disk",
        )
    )
    against = [item for item in report.speedups if (item.model, item.peer) == (last.name, first.name)]
    for item in sorted(against, key=lambda item: -item.batch):
        before, after = first.latency_s.get(item.batch), last.latency_s.get(item.batch)
        times = (
            "" if before is None or after is None else f"{format_seconds(before)} → {format_seconds(after)}"
        )
        ratio = f"> {item.low:.3g}×" if item.noisy else f"{item.ratio:.3g}×"
        tiles.append((ratio, f"faster at batch {item.batch}", times))
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>{escape(detail)}</small></div>"
        for value, name, detail in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _figures(report: Report) -> str:
    stages = report.stages
    figures = []
    for batch in batches_of([stage.latency_s for stage in stages]):
        timed = [stage for stage in stages if batch in stage.latency_s]
        groups = [
            (
                stage.name,
                [
                    charts.Bar(
                        stage.latency_s[batch], format_seconds(stage.latency_s[batch]), _tone(report, stage)
                    )
                ],
            )
            for stage in timed
        ]
        title = f"Latency at batch {batch}"
        figures.append(_figure(title, "Median time of a whole forward pass.", charts.bars(groups, title)))
    if stages:
        sizes = [
            (stage.name, [charts.Bar(stage.bytes, format_bytes(stage.bytes), _tone(report, stage))])
            for stage in stages
        ]
        counts = [
            (stage.name, [charts.Bar(stage.parameters, f"{stage.parameters:,}", _tone(report, stage))])
            for stage in stages
        ]
        drawn = charts.bars(sizes, "Size on disk") + "<h3>Parameters</h3>" + charts.bars(counts, "Parameters")
        figures.append(_figure("Size on disk", "Bytes of the saved file.", drawn))
    for batch in reversed(batches_of([stage.latency_s for stage in stages])[-1:]):
        points = [
            charts.Point(
                stage.name,
                stage.latency_s[batch],
                stage.accuracy.value,
                *stage.accuracy.interval(),
                tone=_tone(report, stage),
            )
            for stage in stages
            if batch in stage.latency_s and stage.accuracy is not None
        ]
        title = f"Accuracy and latency at batch {batch}"
        caption = "Whiskers: 95 % interval (Wilson). Dashed: what nothing beats on both."
        figures.append(_figure(title, caption, charts.front(points, title)))
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _tone(report: Report, stage: Stage) -> str:
    return "accent" if stage is report.stages[-1] else "plain"


def _layer_figures(layers: Sequence[Layer]) -> str:
    key = (
        '<span class="key"><span><i style="background:var(--plain)"></i>before</span>'
        '<span><i style="background:var(--accent)"></i>compiled</span>'
        '<span><i style="background:var(--ghost)"></i>compiled, not used</span></span>'
    )
    figures = []
    for batch in sorted({batch_of(shape) for layer in layers for shape in layer.after_s}):
        groups = []
        for layer in layers:
            shapes = [s for s in layer.after_s if s in layer.before_s and batch_of(s) == batch]
            tone = "accent" if layer.replaced else "ghost"
            for shape in shapes:
                bars = [
                    charts.Bar(s, format_seconds(s), colour, f"{what} at {shape}: {format_seconds(s)}")
                    for s, colour, what in (
                        (layer.before_s[shape], "plain", layer.before),
                        (layer.after_s[shape], tone, layer.after),
                    )
                ]
                groups.append((layer.name if len(shapes) == 1 else f"{layer.name} {shape}", bars))
        title = f"Layer by layer at batch {batch}"
        figures.append(_figure(title, key, charts.bars(groups, title), raw_caption=True))
    return f'<div class="grid" style="margin-bottom:14px">{"".join(figures)}</div>' if figures else ""


def _stage_table(report: Report) -> str:
    batches = batches_of([stage.latency_s for stage in report.stages])
    head = [
        "stage",
        "accuracy, 95 % interval",
        "#parameters",
        "#on disk",
        *(f"#batch {b}" for b in batches),
        "what was done",
    ]
    rows = [
        [
            f"<b>{escape(stage.name)}</b>",
            escape(format_accuracy(stage.accuracy)) if stage.accuracy else "–",
            f"{stage.parameters:,}",
            format_bytes(stage.bytes),
            *(format_seconds(stage.latency_s[b]) if b in stage.latency_s else "–" for b in batches),
            escape(stage.detail),
        ]
        for stage in report.stages
    ]
    return _table(head, rows, mark_last=True)


def _layer_table(layers: Sequence[Layer]) -> str:
    if not layers:
        return ""
    head = ["layer", "before", "after", "kernel", "#parameters", "#bytes", "#output error"]
    rows = [
        [
            f"<b>{escape(layer.name)}</b>",
            escape(layer.before),
            escape(layer.after) if layer.replaced else '<span class="warn">kept</span>',
            f"<code>{escape(layer.kernel)}</code>",
            f"{layer.parameters:,}",
            f"{format_bytes(layer.bytes_before)} → {format_bytes(layer.bytes_after)}",
            format_error(layer.error) or "–",
        ]
        for layer in layers
    ]
    return _table(head, rows, notes=[escape(layer.reason) for layer in layers])


def _speedup_table(report: Report) -> str:
    head = ["model", "against", "#batch", "#times faster", "#95 % interval"]
    rows = [
        [
            escape(item.model),
            escape(item.peer),
            str(item.batch),
            f'<b class="{"good" if item.low > 1 else "bad" if item.high < 1 else ""}">{item.ratio:.2f}</b>',
            f"{item.low:.2f} to {item.high:.2f}",
        ]
        for item in report.speedups
    ]
    return _table(head, rows) if rows else ""


def _check_table(report: Report) -> str:
    rows = [
        [
            f'<span class="chip {_CHIP[format_verdict(check)]}">{format_verdict(check)}</span>',
            check.kind,
            escape(check.name),
            escape(check.expected),
            escape(check.got),
        ]
        for check in report.checks
    ]
    return _table(["verdict", "kind", "what", "expected", "got"], rows) if rows else ""


def _footer(report: Report) -> str:
    def pairs(items: Iterable[tuple[str, str]]) -> str:
        return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)

    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    steps = pairs((name, format_seconds(seconds)) for name, seconds in report.steps_s.items())
    took = f"<dl>{steps}</dl>" if steps else ""
    return f"<footer><dl>{pairs(report.environment.items())}</dl>{took}{notes}</footer>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _figure(title: str, caption: str, svg: str, *, raw_caption: bool = False) -> str:
    text = caption if raw_caption else escape(caption)
    return f"<figure><h3>{escape(title)}</h3><figcaption>{text}</figcaption>{svg}</figure>"


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, mark_last: bool = False, notes: Sequence[str] = ()
) -> str:
    """Cells and notes are HTML already; a heading that begins with # is a column of numbers.

    ``notes``, where given, has a line for each row, which goes across the table beneath it.
    """
    numeric = [name.startswith("#") for name in head]

    def line(cells: Sequence[str], tag: str, mark: str = "") -> str:
        inner = "".join(
            f"<{tag}{' class=n' if number else ''}>{cell}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )
        return f"<tr{mark}>{inner}</tr>"

    body = ""
    for index, cells in enumerate(rows):
        marked = " class=last" if mark_last and index == len(rows) - 1 else " class=noted" if notes else ""
        body += line(cells, "td", marked)
        if notes:
            body += f'<tr class=note><td></td><td colspan="{len(head) - 1}">{notes[index]}</td></tr>'
    heading = line([escape(name.removeprefix("#")) for name in head], "th")
    return f'<div class="scroll"><table><thead>{heading}</thead><tbody>{body}</tbody></table></div>'

"""The charts of a report as inline SVG.

Drawn by hand rather than by a plotting library: text stays text in the page's own font, colours are the
page's CSS variables and so follow its light or dark theme, every mark carries its numbers as a tooltip, and a
report costs no import. Every function returns one ``<svg>`` element, styled by ``page.css``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tautorch.compress._format import format_seconds

_WIDTH = 560.0


@dataclass(frozen=True)
class Bar:
    """One bar: ``text`` is written at its end, ``tone`` is a class (``plain``, ``accent`` or ``ghost``)."""

    value: float
    text: str
    tone: str = "plain"
    hint: str = ""


@dataclass(frozen=True)
class Point:
    """One model in the accuracy-latency plane; ``low`` and ``high`` limit its accuracy, all in [0, 1]."""

    label: str
    seconds: float
    accuracy: float
    low: float
    high: float
    tone: str = "plain"


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], title: str) -> str:
    """Horizontal bars on one linear scale that begins at zero, with the bars of a group close together.

    Args:
        groups: (label, its bars) from top to bottom.
        title: what the chart shows, for those who do not see it.
    """
    thick = 22.0 if all(len(group) == 1 for _, group in groups) else 13.0
    gap, between = 3.0, 14.0
    longest = max((len(label) for label, _ in groups), default=0)
    left = min(190.0, 7.2 * longest + 14)
    room = max((len(bar.text) for _, group in groups for bar in group), default=0) * 7.0 + 14
    top = max((bar.value for _, group in groups for bar in group), default=0.0) or 1.0
    scale = (_WIDTH - left - room) / top
    marks, y = [], 4.0
    for label, group in groups:
        height = len(group) * (thick + gap) - gap
        marks.append(_text(left - 12, y + height / 2, label, "label end"))
        for bar in group:
            length = max(bar.value * scale, 1.5)
            hint = f"<title>{escape(bar.hint or f'{label}: {bar.text}')}</title>"
            marks.append(
                f'<rect class="bar {bar.tone}" x="{left:.1f}" y="{y:.1f}" width="{length:.1f}" '
                f'height="{thick:.0f}" rx="2">{hint}</rect>'
            )
            marks.append(_text(left + length + 7, y + thick / 2, bar.text, f"value {bar.tone}"))
            y += thick + gap
        y += between - gap
    height = y - between + 6
    axis = f'<line class="axis" x1="{left:.1f}" y1="0" x2="{left:.1f}" y2="{height:.1f}"/>'
    return _svg(height, title, axis + "".join(marks))


def front(points: Sequence[Point], title: str) -> str:
    """Accuracy over latency (logarithmic), with intervals and the line through what nothing beats."""
    height, left, right, above, below = 300.0, 58.0, 24.0, 22.0, 44.0
    inner_w, inner_h = _WIDTH - left - right, height - above - below
    if not points:
        return _svg(height, title, _text(_WIDTH / 2, height / 2, "nothing was timed", "label middle"))
    x_low, x_high = _padded_log([point.seconds for point in points])
    y_low = math.floor(min(point.low for point in points) * 100 - 0.2) / 100
    y_high = 1.0 if max(point.high for point in points) > 0.96 else max(point.high for point in points) * 1.02

    def x(seconds: float) -> float:
        return left + (math.log10(seconds) - x_low) / (x_high - x_low) * inner_w

    def y(accuracy: float) -> float:
        return above + (y_high - accuracy) / (y_high - y_low) * inner_h

    marks = []
    for tick in _ticks(y_low, y_high):
        marks.append(
            f'<line class="grid" x1="{left}" y1="{y(tick):.1f}" x2="{_WIDTH - right}" y2="{y(tick):.1f}"/>'
        )
        marks.append(_text(left - 8, y(tick), f"{tick * 100:g} %", "tick end"))
    for tick in _log_ticks(x_low, x_high):
        marks.append(
            f'<line class="grid" x1="{x(tick):.1f}" y1="{above}" x2="{x(tick):.1f}" y2="{height - below}"/>'
        )
        marks.append(_text(x(tick), height - below + 15, format_seconds(tick), "tick middle"))
    marks.append(
        _text(
            left + inner_w / 2, height - 8, "time per batch, logarithmic: faster to the left", "tick middle"
        )
    )
    steps = _pareto(points)
    path = " ".join(f"{x(point.seconds):.1f},{y(point.accuracy):.1f}" for point in steps)
    marks.append(f'<polyline class="front" points="{path}"/>')
    on_left = [x(point.seconds) > left + inner_w * 0.72 for point in points]
    spots = [(x(point.seconds), y(point.accuracy)) for point in points]
    for point, flip, label_y in zip(points, on_left, _spread(spots, on_left), strict=True):
        px, py = x(point.seconds), y(point.accuracy)
        hint = (
            f"{point.label}: {point.accuracy * 100:.2f} % "
            f"[{point.low * 100:.1f}, {point.high * 100:.1f}], "
            f"{format_seconds(point.seconds)}"
        )
        marks.append(
            f'<g class="point {point.tone}"><title>{escape(hint)}</title>'
            f'<line x1="{px:.1f}" y1="{y(point.low):.1f}" x2="{px:.1f}" y2="{y(point.high):.1f}"/>'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5.5"/></g>'
        )
        side = "end" if flip else ""
        marks.append(_text(px - 8 if flip else px + 8, label_y, point.label, f"value {point.tone} {side}"))
    return _svg(height, title, "".join(marks))


def _svg(height: float, title: str, body: str) -> str:
    box = f"0 0 {_WIDTH:.0f} {height:.0f}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text class="{classes.strip()}" x="{x:.1f}" y="{y:.1f}" dy="0.35em">{escape(text)}</text>'


def _padded_log(values: Sequence[float]) -> tuple[float, float]:
    """Limits in powers of ten, a little wider than the values."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.12, (high - low) * 0.12)
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Round steps of accuracy, three to seven of them."""
    for step in (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        if (high - low) / step <= 6:
            return [
                index * step
                for index in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
            ]
    return [low, high]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, thinned out over long ranges."""
    factors = (1, 2, 5) if high - low < 2.2 else (1,)
    every = [
        factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors
    ]
    return [tick for tick in every if low <= math.log10(tick) <= high]


def _pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other is both as fast as and more accurate than, fastest first."""
    best, kept = -1.0, []
    for point in sorted(points, key=lambda point: (point.seconds, -point.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            kept.append(point)
    return kept


def _spread(spots: Sequence[tuple[float, float]], above: Sequence[bool]) -> list[float]:
    """Heights of the labels of points: off the front's line, which rises to the right, and off each other."""
    placed: list[tuple[float, float]] = []
    for (x, y), up in zip(spots, above, strict=True):
        step = -15.0 if up else 15.0
        y += step
        while any(abs(x - other_x) < 150 and abs(y - other_y) < 15 for other_x, other_y in placed):
            y += step
        placed.append((x, y))
    return [y for _, y in placed]

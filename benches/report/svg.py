"""Just enough SVG for the plots of the performance page: text stays text, equal rows give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
OURS, SECOND, THIRD = "#1d5fd1", "#d9730d", "#2e9e6b"
LINES = ("#1d5fd1", "#d9730d", "#2e9e6b", "#8a4fc7", "#c2255c", "#0b8fa8", "#7a6a00")
"""Colours told apart by the common colour blindnesses at least in pairs of neighbours."""


@dataclass
class Canvas:
    """Marks on a white card of `width` by `height` pixels; `title` is for those who do not see it."""

    width: float
    height: float
    title: str
    marks: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, text: str, *, size: float = 11, anchor: str = "start", fill: str = INK,
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Centred on y."""
        weight = ' font-weight="600"' if bold else ""
        self.marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" dy="0.35em" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="{fill}"{weight}>{escape(text)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, stroke: str = GRID, width: float = 1.0,
        dash: str = "",
    ) -> None:  # fmt: skip
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.marks.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
            f'stroke-width="{width:g}"{dashed}/>'
        )

    def polyline(self, points: Sequence[tuple[float, float]], *, stroke: str, dash: str = "") -> None:
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.marks.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="2"{dashed} '
            f'stroke-linejoin="round"/>'
        )

    def dot(self, x: float, y: float, *, fill: str, hint: str, r: float = 3.4) -> None:
        self.marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" fill="{fill}" stroke="#fff" stroke-width="1">'
            f"<title>{escape(hint)}</title></circle>"
        )

    def rect(self, x: float, y: float, w: float, h: float, *, fill: str, hint: str = "") -> None:
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="3" fill="{fill}">'
            f"{title}</rect>"
        )

    def legend(
        self, x: float, y: float, entries: Sequence[tuple[str, str]], *, dashed: Sequence[str] = ()
    ) -> None:
        """(name, colour) from left to right."""
        for name, colour in entries:
            self.line(x, y, x + 18, y, stroke=colour, width=2.5, dash="4 3" if name in dashed else "")
            self.text(x + 24, y, name)
            x += 24 + 6.3 * len(name) + 18

    def render(self) -> str:
        size = f"{self.width:.0f}", f"{self.height:.0f}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
            f'height="{size[1]}" role="img" aria-label="{escape(self.title)}" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f'<rect width="{size[0]}" height="{size[1]}" rx="8" fill="#fff"/>\n'
            + "\n".join(self.marks)
            + "\n</svg>\n"
        )


def density(sparsity: float) -> float:
    """Of a sparsity, so that equal steps halve what is left."""
    return -math.log(1 - sparsity)


@dataclass(frozen=True)
class Axis:
    """Values to pixels, through `scale`."""

    low: float
    high: float
    start: float
    end: float
    scale: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        low, high = self.scale(self.low), self.scale(self.high)
        at = (self.scale(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.start + at * (self.end - self.start)


@dataclass(frozen=True)
class Frame:
    """The inner area of a plot with its two axes, each with the ticks (value, text) that are drawn."""

    x: Axis
    y: Axis

    def draw(
        self, canvas: Canvas, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]
    ) -> None:
        for value, text in y_ticks:
            canvas.line(self.x.start, self.y(value), self.x.end, self.y(value))
            canvas.text(self.x.start - 6, self.y(value), text, anchor="end", fill=MUTED, size=10)
        for value, text in x_ticks:
            canvas.text(self.x(value), self.y.start + 13, text, anchor="middle", fill=MUTED, size=10)
        canvas.line(self.x.start, self.y.start, self.x.end, self.y.start, stroke=MUTED)

    def curve(
        self, canvas: Canvas, points: Sequence[tuple[float, float]], colour: str, name: str, *, dash: str = ""
    ) -> None:
        """A line with a dot at each point, which says its value."""
        spots = [(self.x(x), self.y(y)) for x, y in points]
        canvas.polyline(spots, stroke=colour, dash=dash)
        if not dash:
            for (px, py), (x, y) in zip(spots, points, strict=True):
                canvas.dot(px, py, fill=colour, hint=f"{name}: {y:.3g} at {x:g}")


def shade(ratio: float) -> str:
    """Red below 1, white at 1, blue above; a factor of 3 either way is the deepest."""
    depth = max(-1.0, min(1.0, math.log(ratio) / math.log(3)))
    end = (214, 64, 48) if depth < 0 else (66, 133, 222)
    depth = abs(depth) ** 0.8
    return "#" + "".join(f"{round(255 + (c - 255) * depth * 0.85):02x}" for c in end)

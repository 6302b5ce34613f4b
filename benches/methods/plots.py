"""One plot for each row of the page: what its figure is made of, each seed a dot, the mean a bar."""

from __future__ import annotations

import math

from benches.methods.claims import Row
from benches.methods.results import part_shown
from benches.report.svg import INK, LINES, MUTED, Axis, Canvas

WIDTH, LEFT, RIGHT, ROW, TOP = 560.0, 170.0, 96.0, 26.0, 10.0


def strip(row: Row, title: str) -> str:
    """The parts from top to bottom, over an axis that spans them: they lie close together."""
    names = list(next(iter(row.parts.values())))
    values = [parts[name] for parts in row.parts.values() for name in names]
    axis = _axis(values)
    bottom = TOP + ROW * len(names)
    canvas = Canvas(WIDTH, bottom + 26, title)
    for tick in _ticks(axis):
        canvas.line(axis(tick), TOP, axis(tick), bottom)
        canvas.text(
            axis(tick), bottom + 13, part_shown(tick, row.parts_unit), size=10, anchor="middle", fill=MUTED
        )
    for index, name in enumerate(names):
        y, colour = TOP + ROW * (index + 0.5), LINES[index % len(LINES)]
        mean = row.part(name)[0]
        canvas.text(LEFT - 14, y, name, anchor="end")
        canvas.line(axis.start, y, axis.end, y)
        canvas.line(axis(mean), y - 8, axis(mean), y + 8, stroke=colour, width=2.5)
        for seed, parts in row.parts.items():
            hint = f"{name}, seed {seed}: {part_shown(parts[name], row.parts_unit)}"
            canvas.dot(axis(parts[name]), y, fill=colour, hint=hint)
        canvas.text(WIDTH - 8, y, part_shown(mean, row.parts_unit), anchor="end", fill=INK, bold=True)
    return canvas.render()


def _axis(values: list[float]) -> Axis:
    """A tenth wider than the values on both sides; logarithmic where they differ by more than ten times."""
    low, high = min(values), max(values)
    if low > 0 and high > 10 * low:
        return Axis(low / 1.3, high * 1.3, LEFT, WIDTH - RIGHT, math.log10)
    pad = 0.1 * (high - low) or 0.01 * abs(high) or 1.0
    return Axis(low - pad, high + pad, LEFT, WIDTH - RIGHT)


def _ticks(axis: Axis) -> list[float]:
    """Round values on the axis, two to five."""
    if axis.scale is math.log10:
        powers = range(math.ceil(math.log10(axis.low)), math.floor(math.log10(axis.high)) + 1)
        return [10.0**power for power in powers]
    step = 10.0 ** math.floor(math.log10(axis.high - axis.low))
    step = next(part for part in (step, step / 2, step / 4, step / 5) if (axis.high - axis.low) / part >= 2)
    return [k * step for k in range(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)]

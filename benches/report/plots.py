"""The plots of the performance page, from rows of one results file; None where they hold nothing for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benches.peers.summary import geomean
from benches.report.svg import INK, LINES, MUTED, OURS, SECOND, THIRD, Axis, Canvas, Frame, density, shade

Row = dict[str, Any]

SHARES = [(v / 100, f"{v} %") for v in (0, 20, 40, 60, 80, 100)]
SPEEDUPS = [(v, f"{v:g}x") for v in (0.25, 0.5, 1, 2, 4, 8, 16)]


def shape(row: Row) -> str:
    return f"{row['k']} x {row['n']}"


def distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def short(peer: str) -> str:
    """A peer's name for a small cell."""
    for long, brief in (("torch.ao ", "ao "), ("torch ", ""), ("ONNX Runtime", "ORT"), (" int8", "")):
        peer = peer.replace(long, brief)
    return peer


def share_over_m(rows: list[Row]) -> str | None:
    """Share of the arithmetic peak over M, a line for each weight."""
    rows = [row for row in rows if row["part"] == "dense" and "share" in row]
    if not rows:
        return None
    ms = sorted({row["m"] for row in rows})
    canvas = Canvas(760, 380, "Share of the int8 peak over M, one line for each weight")
    frame = Frame(Axis(ms[0], max(ms[-1], 2), 56, 600, math.log), Axis(0, 1, 320, 44))
    frame.draw(canvas, [(m, str(m)) for m in ms], SHARES)
    canvas.text(56, 20, "Int8Linear, float in and out: share of both cores' int8 peak", bold=True, size=13)
    canvas.text(328, 356, "M, rows of x (logarithmic)", anchor="middle", fill=MUTED)
    ends = []
    for colour, name in zip(LINES, distinct(map(shape, rows)), strict=False):
        points = sorted((row["m"], row["share"]) for row in rows if shape(row) == name)
        frame.curve(canvas, points, colour, name)
        ends.append((frame.y(points[-1][1]), name, colour))
    for y, (_, name, colour) in zip(spread([e[0] for e in sorted(ends)], 15), sorted(ends), strict=True):
        canvas.text(612, y, name, fill=colour, bold=True)
    return canvas.render()


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights moved apart by at least `least`, upwards where they would leave the plot."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    return placed


def dense_ratios(rows: list[Row]) -> str | None:
    """The ratio to the best peer at every point."""
    rows = [row for row in rows if row["part"] == "dense" and "ratio" in row]
    if not rows:
        return None
    ms, shapes = sorted({row["m"] for row in rows}), distinct(map(shape, rows))
    cell, high, left, top = 62, 38, 104, 66
    canvas = Canvas(
        max(left + cell * len(ms) + 20, 620), top + high * len(shapes) + 16, "Ratio to the best peer"
    )
    canvas.text(
        16, 20, "Int8Linear against the best peer at each point (above 1: ours is faster)", bold=True, size=13
    )
    canvas.text(left - 38, 50, "K x N", anchor="end", fill=MUTED)
    canvas.text(left - 10, 50, "M", anchor="end", fill=MUTED)
    for column, m in enumerate(ms):
        canvas.text(left + cell * (column + 0.5), 50, str(m), anchor="middle", fill=MUTED)
    for line, name in enumerate(shapes):
        y = top + high * line
        canvas.text(left - 10, y + high / 2, name, anchor="end")
        for row in rows:
            if shape(row) == name:
                x = left + cell * ms.index(row["m"])
                hint = f"{row['case']}: {row['us']} us, {row['ratio']:.2f}x of {row['best']}"
                canvas.rect(x + 1, y + 1, cell - 2, high - 2, fill=shade(row["ratio"]), hint=hint)
                canvas.text(
                    x + cell / 2, y + 13, f"{row['ratio']:.2f}", anchor="middle", bold=row["ratio"] < 1
                )
                canvas.text(x + cell / 2, y + 27, short(row["best"]), anchor="middle", fill=INK, size=8.5)
    return canvas.render()


def dense_peers(rows: list[Row]) -> str | None:
    """For each peer its least, geometric mean and largest ratio."""
    rows = [row for row in rows if row["part"] == "dense"]
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for name, figures in row["peers"].items():
            if "ratio" in figures:
                ratios.setdefault(name, []).append(figures["ratio"])
        if "ratio" in row:
            ratios.setdefault("best peer at each point", []).append(row["ratio"])
    if not ratios:
        return None
    names = sorted(ratios, key=lambda name: (geomean(ratios[name]), name))
    canvas = Canvas(760, 70 + 26 * len(names) + 30, "Ratio to each peer: least, geometric mean, largest")
    canvas.text(
        16, 20, "Time of each peer over Int8Linear's: least, geometric mean, largest", bold=True, size=13
    )
    x = Axis(0.5, max(8.0, *(max(r) for r in ratios.values())), 190, 690, math.log)
    bottom = 52 + 26 * len(names)
    for tick in (0.5, 1, 2, 4, 8, 16, 32):
        if tick <= x.high:
            canvas.line(x(tick), 44, x(tick), bottom, stroke=MUTED if tick == 1 else "#e3e7eb")
            canvas.text(x(tick), bottom + 13, f"{tick:g}x", anchor="middle", fill=MUTED, size=10)
    for i, name in enumerate(names):
        y, mean, every = 60 + 26 * i, geomean(ratios[name]), ratios[name]
        colour = OURS if name.startswith("best") else THIRD
        canvas.text(180, y, name, anchor="end", bold=name.startswith("best"))
        canvas.line(x(min(every)), y, x(max(every)), y, stroke=colour, width=3)
        hint = f"{name}: least {min(every):.2f}x, mean {mean:.2f}x, largest {max(every):.2f}x"
        canvas.dot(x(mean), y, fill=colour, hint=hint, r=6)
        canvas.text(x(min(every)) - 9, y, f"{min(every):.2f}", anchor="end", size=9, fill=MUTED)
        canvas.text(x(mean), y - 11, f"{mean:.2f}", anchor="middle", size=9.5, bold=True)
        canvas.text(x(max(every)) + 9, y, f"{max(every):.1f}", size=9, fill=MUTED)
    return canvas.render()


def sparse(rows: list[Row]) -> str | None:
    """Speed-up over our own dense layer over sparsity, ours and DeepSparse's."""
    rows = [r for r in rows if r["part"] == "sparse" and r["pattern"] == "unstructured"]

    def curves(mine: list[Row]) -> list[tuple[str, str, list[tuple[float, float]]]]:
        ours = [(row["sparsity"], row["own"]["Int8Linear"]["ratio"]) for row in mine]
        theirs = [
            (row["sparsity"], row["own"]["Int8Linear"]["us"] / row["peers"]["DeepSparse int8"]["us"])
            for row in mine
            if "us" in row["peers"].get("DeepSparse int8", {})
        ]
        return [("SparseLinear", OURS, ours), ("DeepSparse", SECOND, theirs)]

    title = "Unstructured int8, float in and out: times faster than our dense Int8Linear, over sparsity"
    return _panels(rows, title, curves)


def fp32(rows: list[Row]) -> str | None:
    """Speed-up over the best dense float32 of anybody, over sparsity."""
    rows = [row for row in rows if row["part"] == "fp32"]

    def curves(mine: list[Row]) -> list[tuple[str, str, list[tuple[float, float]]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in mine:
            times = {name: figures["us"] for name, figures in row["peers"].items() if "us" in figures}
            sparse = times.pop("DeepSparse fp32", None)
            times = {"ours": row["us"], "4x1": row["own"]["ours 4x1"]["us"], "dense": min(times.values())}
            for name, us in (("ours", times["ours"]), ("4x1", times["4x1"]), ("DeepSparse", sparse)):
                if us is not None:
                    found.setdefault(name, []).append((row["sparsity"], times["dense"] / us))
        names = (("ours", "SparseLinear", OURS), ("4x1", "SparseLinear 4x1", THIRD))
        names = (*names, ("DeepSparse", "DeepSparse", SECOND))
        return [(title, colour, found.get(name, [])) for name, title, colour in names]

    title = "Sparse float32: times faster than the best dense float32 of all peers, over sparsity"
    return _panels(rows, title, curves)


Curves = Callable[[list[Row]], list[tuple[str, str, list[tuple[float, float]]]]]


def _panels(rows: list[Row], title: str, curves: Curves) -> str | None:
    """Small multiples: a row of panels for each K x N, a column for each M."""
    if not rows:
        return None
    shapes, ms = distinct(map(shape, rows)), sorted({row["m"] for row in rows})
    wide, high, left, top = 232, 168, 44, 76
    canvas = Canvas(
        max(left + wide * len(ms) + 10, 30 + 7.3 * len(title)), top + high * len(shapes) + 6, title
    )
    canvas.text(16, 20, title, bold=True, size=12.5)
    sparsities = sorted({row["sparsity"] for row in rows})
    legend: dict[str, str] = {}
    for line, name in enumerate(shapes):
        for column, m in enumerate(ms):
            mine = sorted((r for r in rows if shape(r) == name and r["m"] == m), key=lambda r: r["sparsity"])
            if not mine:
                continue
            x0, y0 = left + wide * column, top + high * line
            x = Axis(sparsities[0], max(sparsities[-1], sparsities[0] + 0.01), x0, x0 + wide - 44, density)
            frame = Frame(x, Axis(0.25, 16, y0 + high - 48, y0 + 6, math.log))
            frame.draw(canvas, [(s, f"{s * 100:g} %") for s in sparsities], SPEEDUPS)
            canvas.line(x.start, frame.y(1), x.end, frame.y(1), stroke=MUTED)
            canvas.text(x0, y0 - 6, f"{name}, M = {m}", size=11, bold=True)
            for label, colour, points in curves(mine):
                if points:
                    legend[label] = colour
                    frame.curve(canvas, points, colour, label)
    canvas.legend(16, 44, list(legend.items()))
    return canvas.render()


def patterns(rows: list[Row]) -> str | None:
    """4x1 over our dense layer with what was asked, and every pattern at batch 1."""
    blocks = [row for row in rows if row["part"] == "sparse" and row["pattern"] == "4x1"]
    single = [row for row in rows if row["part"] == "sparse" and row["pattern"] == "best pattern"]
    if not blocks and not single:
        return None
    canvas = Canvas(780, 350, "Speed-up of patterns over our dense int8 layer, over sparsity")
    canvas.text(
        16, 20, "int8 patterns: times faster than our dense Int8Linear, over sparsity", bold=True, size=13
    )
    panels = [
        (f"4x1, {name}", [r for r in blocks if shape(r) == name]) for name in distinct(map(shape, blocks))
    ]
    for i, (title, mine) in enumerate(panels[:2]):
        curves = {
            f"M = {m}": [(r["sparsity"], r["targets"][0]["got"]) for r in mine if r["m"] == m]
            for m in sorted({r["m"] for r in mine})
        }
        asked = {r["sparsity"]: r["targets"][0]["want"] for r in mine}
        _pattern_panel(canvas, 44 + 250 * i, title, curves, sorted(asked.items()))
    if single:
        names = distinct(name for row in single for name in row["own"])
        curves = {
            name: [(row["sparsity"], _net(row, name)) for row in single if name in row["own"]]
            for name in names
        }
        asked = [(row["sparsity"], row["targets"][0]["want"]) for row in single if row["targets"]]
        title = f"batch 1, {shape(single[0])}, net"
        _pattern_panel(canvas, 544, title, curves, sorted(asked))
    return canvas.render()


def _net(row: Row, name: str) -> float:
    """Our dense layer's time over a pattern's, each less an empty call's."""
    return (row["us"] - row["empty_us"]) / max(row["own"][name]["us"] - row["empty_us"], 0.05)


def _pattern_panel(
    canvas: Canvas, left: float, title: str, curves: dict[str, list[tuple[float, float]]],
    asked: list[tuple[float, float]],
) -> None:  # fmt: skip
    canvas.text(left, 48, title, bold=True)
    sparsities = sorted({s for points in curves.values() for s, _ in points} | {s for s, _ in asked})
    x = Axis(sparsities[0], max(sparsities[-1], sparsities[0] + 0.01), left, left + 200, density)
    frame = Frame(x, Axis(0.25, 32, 250, 62, math.log))
    frame.draw(canvas, [(s, f"{s * 100:g} %") for s in sparsities], [*SPEEDUPS, (32, "32x")])
    canvas.line(x.start, frame.y(1), x.end, frame.y(1), stroke=MUTED)
    if asked:
        frame.curve(canvas, asked, INK, "asked", dash="4 3")
    y = 284.0
    for i, (name, points) in enumerate(curves.items()):
        frame.curve(canvas, sorted(points), LINES[i % len(LINES)], name)
        canvas.legend(left + 105 * (i % 2), y + 16 * (i // 2), [(name, LINES[i % len(LINES)])])
    if asked:
        i = len(curves)
        canvas.legend(left + 105 * (i % 2), y + 16 * (i // 2), [("asked", INK)], dashed=["asked"])


def conv(rows: list[Row]) -> str | None:
    """Share of peak of every ResNet-50 layer, ours and torch.ao's, int8 in."""
    rows = [row for row in rows if row["part"] == "conv" and row["kind"] == "int8" and "share" in row]
    if not rows:
        return None
    layers, batches = distinct(row["layer"] for row in rows), sorted({row["batch"] for row in rows})
    wide, left, top = 340, 176, 84
    bottom = top + 20 * len(layers)
    canvas = Canvas(
        max(left + wide * len(batches) + 12, 560), bottom + 34, "Share of the int8 peak of each convolution"
    )
    canvas.text(
        16, 20, "ResNet-50's convolutions, static int8: share of both cores' int8 peak", bold=True, size=13
    )
    for colour, name, x in ((OURS, "Int8Conv2d", 16), (SECOND, "torch.ao, its better engine", 120)):
        canvas.dot(x + 5, 44, fill=colour, hint=name, r=5)
        canvas.text(x + 16, 44, name)
    for row, name in enumerate(layers):
        canvas.text(left - 12, top + 20 * row, name, anchor="end", size=10)
    for column, batch in enumerate(batches):
        x = Axis(0, 1, left + wide * column, left + wide * column + wide - 44)
        canvas.text(x.start, 66, f"batch {batch}", bold=True)
        for value, text in SHARES:
            canvas.line(x(value), top - 10, x(value), bottom - 8)
            canvas.text(x(value), bottom + 6, text, anchor="middle", fill=MUTED, size=10)
        for row in rows:
            if row["batch"] != batch:
                continue
            y = top + 20 * layers.index(row["layer"])
            if "ratio" in row:
                theirs = row["share"] / row["ratio"]
                faster = row["ratio"] >= 1
                canvas.line(
                    x(theirs), y, x(row["share"]), y, stroke="#a9c4f0" if faster else "#f1b6ae", width=3
                )
                canvas.dot(x(theirs), y, fill=SECOND, hint=f"{row['best']}: {theirs:.0%}", r=4.5)
            canvas.dot(x(row["share"]), y, fill=OURS, hint=f"ours: {row['share']:.0%}, {row['us']} us", r=4.5)
    return canvas.render()


PLOTS: dict[str, Callable[[list[Row]], str | None]] = {
    "dense-ratios": dense_ratios,
    "dense-peers": dense_peers,
    "share-over-m": share_over_m,
    "sparse": sparse,
    "patterns": patterns,
    "fp32": fp32,
    "conv": conv,
}
"""By the name of the file."""

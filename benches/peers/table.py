"""The rows of a run as tables in the terminal, with what was asked and what came of it."""

from __future__ import annotations

from benches.peers import summary
from benches.peers.results import Row
from rich.console import Console
from rich.table import Table

TITLES = {
    "dense": "Dense int8, float in and out, dynamic quantisation (ratios: the peer's time over ours)",
    "conv": "ResNet-50 convolutions, static int8",
    "sparse": "Sparse int8",
    "fp32": "Sparse float32, unstructured",
}


def show(rows: list[Row], console: Console | None = None) -> None:
    """One table per part, then the summary."""
    console = console or Console(width=None if Console().is_terminal else 200)
    for part, title in TITLES.items():
        mine = [row for row in rows if row["part"] == part]
        if mine:
            console.print(_table(title, mine))
    for line in summary.lines(rows):
        console.print(line, highlight=False)


def _table(title: str, rows: list[Row]) -> Table:
    others = list(dict.fromkeys(name for row in rows for name in {**row["peers"], **row["own"]}))
    table = Table(title=title, title_justify="left")
    table.add_column("case", no_wrap=True)
    for name in ("us", "GOPS", "peak", *others, "best peer", "asked"):
        table.add_column(name, justify="right")
    for row in rows:
        every = {**row["peers"], **row["own"]}
        cells = [_ratio(every[name]) if name in every else "" for name in others]
        share = f"{row['share']:.0%}" if "share" in row else ""
        best = f"{_coloured(row['ratio'])} {row['best']}" if "ratio" in row else ""
        asked = ", ".join(
            f"[{'green' if t['met'] else 'red'}]{t['got']:.2f} of {t['want']:g}[/]" for t in row["targets"]
        )
        table.add_row(row["case"], f"{row['us']:.1f}", str(row["gops"]), share, *cells, best, asked)
    return table


def _ratio(figures: dict[str, object]) -> str:
    return "[dim]lost[/]" if "lost" in figures else _coloured(float(str(figures["ratio"])))


def _coloured(ratio: float) -> str:
    return f"[{'red' if ratio < 1 else 'default'}]{ratio:.2f}[/]"

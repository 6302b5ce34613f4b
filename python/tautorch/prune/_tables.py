"""Tables for the terminal, and the same as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str]) -> Table:
    """The first column is text, the others are numbers; `total` is the last row, none if empty."""
    # Imported here: rich takes 0.1 s, which `import tautorch` need not.
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_footer=bool(total),
        footer_style="bold",
    )
    for index, column in enumerate(columns):
        footer = Text(total[index]) if total else ""
        made.add_column(column, footer, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        # Text: rich would take [brackets] for its markup.
        made.add_row(*(Text(cell) for cell in row))
    return made


def bar(share: float, width: int = 10) -> str:
    """A bar of `width` cells, `share` of them full."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


def text(made: Table) -> str:
    """The table without colours, as wide as it needs."""
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=200, color_system=None).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")

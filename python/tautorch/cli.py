"""The ``tautorch`` command, also ``python -m tautorch``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tautorch import dispatch
from tautorch._version import __version__

app = typer.Typer(
    help="Compress a trained PyTorch model and run it on compiled kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tautorch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
def demo(
    timing: Annotated[
        bool,
        typer.Option(
            "--timing/--no-timing",
            help="Judge the speed end to end. Without, everything runs, for machines that are shared.",
        ),
    ] = True,
    out: Annotated[
        Path, typer.Option(help="Folder for the model, the JSON and the page; made where it does not exist.")
    ] = Path("demo-out"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the split, the weights and the order of the images.")
    ] = 0,
) -> None:
    """Take handwritten digits the whole way, from a teacher to a compiled student, and report.

    Ends with status 1 if a promise breaks: slower end to end than the float student or the teacher, accuracy
    more than a point under the teacher's, or other predictions after reloading.
    """
    console = _console()
    with _writing(out, console):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    from tautorch.demo import pipeline  # twice as long to import as all the rest

    try:
        report = pipeline.run(pipeline.Settings(out=out, seed=seed, timing=timing), console)
    except ImportError as error:
        console.print(str(error), style="bold red", markup=False)
        raise typer.Exit(2) from error
    console.print()
    report.print(console)
    for what, name in {
        "page": "report.html",
        "numbers": "report.json",
        "model": "compiled.safetensors",
    }.items():
        console.print(f"{what:<8} {out / name}", soft_wrap=True, markup=False)
    if not report.kept_promises:
        console.print("[bold red]A promise was broken; see above.[/]")
        raise typer.Exit(1)


@app.command()
def kernels(
    op: Annotated[str | None, typer.Argument(help="One operator; all of them where left out.")] = None,
) -> None:
    """List the kernels of every operator, best first, and say why those that cannot run here cannot."""
    try:
        rows = dispatch.kernels(op)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    table = Table(box=None, pad_edge=False)
    for column in ("operator", "kernel", "device", "here"):
        table.add_column(column, no_wrap=column != "here", overflow="fold")
    for row in rows:
        reason = row.supports(dispatch.Problem(row.op, row.device))
        mark = Text("yes", style="green") if reason is None else Text(f"no: {reason}", style="dim")
        table.add_row(row.op, row.name, row.device, mark)
    _console().print(table)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and short samples: seconds.")] = False,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Only this kernel; may be given again. All that run here otherwise."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file too.")] = None,
) -> None:
    """Time every CPU kernel of this machine beside fp32 and the machine's own limits, in under two minutes.

    Shares are of the product instruction's rate on registers, and of the rate at which the same bytes can be
    read, both measured in the same run. Nothing is timed before it was shown to be exact.
    """
    console = _console()
    if json is not None:
        with _writing(json, console):  # said now, not after two minutes
            if json.exists():
                json.open("a").close()
            else:
                tempfile.TemporaryFile(dir=json.parent).close()
    from tautorch import bench as measured  # most of its import is of layers and cases

    try:
        with console.status("") as status:
            result = measured.run(kernel or measured.kernels(), quick=quick, note=status.update)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except AssertionError as error:
        console.print(f"wrong: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from error
    measured.show(result, console)
    if json is not None:
        result.write(json)
        console.print(f"\nwritten to {json}", markup=False)


@contextmanager
def _writing(path: Path, console: Console) -> Iterator[None]:
    """Ends with status 2 and one line where the system does not let us write `path`."""
    try:
        yield
    except OSError as error:
        console.print(
            f"cannot write {path}: {error.strerror}", style="bold red", markup=False, soft_wrap=True
        )
        raise typer.Exit(2) from error


def _console() -> Console:
    """The terminal; a file or a pipe has no width of its own and gets a wide one."""
    console = Console()
    return console if console.is_terminal else Console(width=170)


def main() -> None:
    """The entry point of the ``tautorch`` command."""
    app()

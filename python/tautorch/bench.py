"""``tautorch bench``: every kernel this CPU runs, at a few shapes, against what the CPU itself can do.

For owners of a device that the project has not measured: one command, one table, one JSON file. Each kernel
is proven before it is timed; arithmetic's and memory's limits are measured in the same run, and ``nn.Linear``
(``nn.Conv2d``) in fp32 runs beside every layer, in alternating samples.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tautorch import _C, bench_cases, dispatch, timing
from tautorch._version import __version__
from tautorch.bench_cases import Layer
from tautorch.testing.bench import best_seconds, machine

BUDGET_S = 100.0  # for all timings; proofs and packing come on top
DISTURBED = 0.1  # of the samples, median over the rows: more than a quiet machine has
# A scalar kernel takes seconds where the others take milliseconds, and its speed decides nothing. It has no
# product instruction either, whose rate would be its peak.
SCALAR_MACS = 5e7

LEGEND = """
of peak: of the product instruction's rate on registers. of reading: of the rate at which weights can be read.
fp32 / ours: above 1 is faster than torch in fp32, with 95 % confidence. Everything in this one run."""


@dataclass(frozen=True)
class Row:
    """One layer by one kernel. Shares are of what this CPU did in the same run; GOPS count adds too."""

    kernel: str
    op: str
    layer: str
    rows: int
    us: float
    gops: float
    share_of_peak: float | None
    gb_s: float | None  # of packed weights, at one row
    share_of_read: float | None
    fp32_us: float
    ratio: float  # fp32 over ours: above 1 is faster
    ratio_low: float  # 95 % confidence
    ratio_high: float
    disturbed: float  # share of the samples in which something else had the processor


@dataclass(frozen=True)
class Result:
    """What ``tautorch bench`` found. ``peaks``: GOPS of each kernel's product instruction on all threads."""

    machine: str
    threads: int
    torch: str
    tautorch: str
    date: str
    peaks: dict[str, float]
    rows: list[Row]
    left_out: list[str]  # what there was no time for

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def kernels() -> list[str]:
    """The CPU kernels that run here, best first."""
    return [name for name, available in _C.isas().items() if available]


def run(names: list[str], *, quick: bool = False, note: Callable[[str], None] = lambda text: None) -> Result:
    """Prove and time the kernels of these names; `note` is told of every row.

    Raises:
        ValueError: a name that is no kernel of this CPU.
        AssertionError: a kernel computed something wrong.
    """
    here, names = kernels(), list(dict.fromkeys(names))
    for name in names:
        if name not in here:
            raise ValueError(f"bench: kernel must be one this CPU runs ({', '.join(here)}), got {name!r}")
    end = time.perf_counter() + BUDGET_S
    peaks = {name: _peak(name) for name in names if name != "scalar"}
    rows: list[Row] = []
    left_out: list[str] = []
    with torch.inference_mode():
        for group in bench_cases.groups(quick):
            for name in names:
                layers = [x for x in group.layers if name != "scalar" or x.macs <= SCALAR_MACS]
                if not layers:
                    continue
                with dispatch.force(layers[0].op, name):
                    group.prove()
                    for layer in layers:
                        label = f"{name}, {layer.name}, {layer.rows} rows"
                        if time.perf_counter() > end:
                            left_out.append(label)
                            continue
                        rows.append(_row(layer, name, peaks.get(name), 0.03 if quick else 0.25))
                        note(f"{label}: {rows[-1].us:.4g} us")
    return Result(
        machine(), torch.get_num_threads(), torch.__version__, __version__, time.strftime("%Y-%m-%d"), peaks,
        rows, left_out,
    )  # fmt: skip


def _row(layer: Layer, kernel: str, peak: float | None, seconds: float) -> Row:
    ours, float_layer, x = layer.ours, layer.float_layer, layer.x
    ours(x)
    if (ran := dispatch.last_used(layer.op)) != kernel:
        raise AssertionError(f"{layer.name}: {kernel} was asked for and {ran} ran")
    packs = [p for name, p in ours.named_buffers() if name.startswith("packed") and p is not None]

    def reading() -> float:
        return best_seconds(lambda: [_C.read_lines(p.data_ptr(), p.numel()) for p in packs])

    before = reading()
    found = timing.compare(lambda: float_layer(x), lambda: ours(x), seconds=seconds, min_samples=5)
    gops = 2 * layer.macs / found.b_s / 1e9
    gb_s = share_of_read = None
    if x.dim() == 2 and layer.rows == 1:
        gb_s = sum(p.numel() for p in packs) / found.b_s / 1e9
        share_of_read = min(before, reading()) / found.b_s
    return Row(
        kernel, layer.op, layer.name, layer.rows, found.b_s * 1e6, gops, peak and gops / peak, gb_s,
        share_of_read, found.a_s * 1e6, found.ratio, found.ratio_low, found.ratio_high, found.disturbed,
    )  # fmt: skip


def _peak(kernel: str) -> float:
    """GOPS of the kernel's product instruction on registers alone, on as many threads as layers use."""
    threads = torch.get_num_threads()
    probe = 200
    rounds = math.ceil(probe * 2e-3 / best_seconds(lambda: _C.peak_i8(kernel, probe)))
    with ThreadPoolExecutor(threads) as pool:
        macs: list[int] = []

        def together() -> None:
            macs[:] = pool.map(lambda _: _C.peak_i8(kernel, rounds), range(threads))

        took = best_seconds(together, 15)
    return 2 * sum(macs) / took / 1e9


def table(result: Result) -> Table:
    """The rows, for a terminal."""
    made = Table(box=None, pad_edge=False)
    for column in ("kernel", "operator", "layer"):
        made.add_column(column, no_wrap=True)
    for column in ("rows", "us", "GOPS", "of peak", "GB/s", "of reading", "fp32 us", "fp32 / ours"):
        made.add_column(column, justify="right", no_wrap=True)
    for r in result.rows:
        share = "" if r.share_of_peak is None else f"{r.share_of_peak:.0%}"
        memory = ("", "") if r.gb_s is None else (f"{r.gb_s:.1f}", f"{r.share_of_read:.0%}")
        made.add_row(
            r.kernel, r.op, r.layer, str(r.rows), f"{r.us:.1f}", f"{r.gops:.1f}", share,
            *memory, f"{r.fp32_us:.1f}", f"{r.ratio:.2f}x [{r.ratio_low:.2f}, {r.ratio_high:.2f}]",
        )  # fmt: skip
    return made


def show(result: Result, console: Console) -> None:
    """What was measured, where and by what."""
    console.print(
        f"{result.machine}, tautorch {result.tautorch}, torch {result.torch}, {result.date}", markup=False
    )
    peaks = ", ".join(f"{name} {gops:.0f}" for name, gops in result.peaks.items())
    console.print(f"product instructions on registers, GOPS on all threads: {peaks}\n", markup=False)
    console.print(table(result))
    console.print(LEGEND, style="dim", markup=False, highlight=False)
    disturbed = statistics.median(r.disturbed for r in result.rows) if result.rows else 0.0
    if disturbed > DISTURBED:
        console.print(
            f"\n[bold]{disturbed:.0%} of the samples were disturbed by other programs: "
            "run this again on an idle machine.[/]"
        )
    if result.left_out:
        console.print(f"\nno time was left for {len(result.left_out)}: {'; '.join(result.left_out)}")

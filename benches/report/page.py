"""docs/performance.md from results files: what was asked and what came of it, losses beside wins."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benches.peers.summary import GEOMEAN_WANTED, behind, geomean, limit_us, read_bandwidth, verdicts
from benches.report.plots import distinct, shape

Row = dict[str, Any]

HEAD = """# Performance

<!-- Made by `make bench-report` from benches/results/*-peers.json: run it again instead of editing. -->

How the figures come about (`make bench-peers`):

- **The work.** Float tensors in, float tensors out through the public module, quantisation and epilogue
  included, unless a heading says otherwise. Every contestant has the same number of threads.
- **Checked first.** Our integers must be the reference's, or the run stops; a peer's output must lie within
  5 % (root mean square) of the float layer's, or it is out of that row.
- **In turns.** A case gives each contestant a slice of some milliseconds, in rounds that begin with another
  one each time. Peers that need packages of their own run in a process of their own, which is stopped while
  others are timed. A figure is the median over rounds of the slices' medians; a ratio is taken within a
  round, and then the median over rounds.
- **Peers at their best.** torch.ao with every engine; OpenVINO with static and dynamic quantisation, blocking
  and asynchronous calls, both memory layouts; ONNX Runtime with dynamic and static MatMulInteger; DeepSparse
  with both of its int8 forms. The fastest counts in each row. Static quantisation, where it is the faster
  one, saves them a pass over the input that `Int8Linear` makes.
- **Ratios** are the other's time over ours: above 1, ours is faster.
"""

NOTES = {
    "conv": """ResNet-50's 3x3 and 1x1 layers, static scales, channels last. `int8` rows take int8 input, as
the layer before left it; torch.ao's output is uint8, ours what the row says. `float` rows take and give
float32, and quantise inside; torch.ao between its `quantize_per_tensor` and `dequantize`.
""",
    "sparse": """Random masks, and masks of a layer that was trained, pruned by magnitude and trained again.
`two layers` is K to N to K: DeepSparse has both in one graph and passes uint8 between them, ours are two
modules with float32 between them. In the rows `best pattern` ours is the dense layer.
""",
    "fp32": """`SparseLinear` with float32 values; the dense peers multiply a dense weight of the same size.
""",
}

ASKED = {
    ("dense", "best peer"): "dense int8 against the best peer",
    (
        "dense",
        "share of peak",
    ): "dense int8, M >= 64, K, N >= 1024: share of the int8 peak, quantisation included",
    ("conv", "torch.ao"): "convolution against torch.ao's better engine",
    ("conv", "4x1 80 % over dense"): "4x1 sparse 1x1 convolution, 80 %, against our dense one",
    ("conv", "4x1 80 % over dense, int8 output"): "the same, both with int8 output",
    ("conv", "share of peak"): "3x3 convolution, share of the int8 peak",
    ("sparse", "DeepSparse"): "unstructured int8 (dynamic) against DeepSparse int8 (static)",
    ("sparse", "DeepSparse, both static"): "the same, both static",
    ("sparse", "Int8Linear"): "blocks against our dense int8",
    ("sparse", "Int8Linear, net"): "batch 1, best pattern against our dense int8, net of an empty call",
    ("sparse", "2:4 over Int8Linear"): "2:4 at batch 1 against our dense int8",
    ("fp32", "DeepSparse fp32"): "unstructured float32 against DeepSparse",
    ("fp32", "best dense fp32"): "unstructured float32 against the best dense float32",
    ("fp32", "4x1: best dense fp32"): "4x1 float32 against the best dense float32",
}

SIZES = re.compile(r"\b\d+(x\d+){2,}\b|\b\d+ rows of \d+\b|\b\d+ x \d+\^2")
"""What differs among the rows of one bench."""

QUIETER = "each from the run, of several, in which its contestants together took the least time"


def _shared_host(*files: dict[str, Any] | None) -> str:
    """What was done about other guests of the host in these results; nothing where nothing was."""
    had = [file for file in files if file is not None]
    rows = [row for file in had for row in file["rows"]]
    looked = [row for row in rows if "shared_slices" in row]
    quieter = any(file.get("quieter") for file in had)
    text = " Others work on the same host." if looked or quieter else ""
    if looked and all(row.get("shared_slices") == 0 for row in rows):
        return text + (
            " Slices were taken again where another guest was seen on the cores before or after them; no row "
            "has such a slice left."
        )
    if looked:
        parts = ", ".join(dict.fromkeys(row.get("part") or f"make bench: {row['bench']}" for row in looked))
        own = sum(row["shared_slices"] == 0 for row in looked)
        text += (
            f" Of {len(looked)} rows ({parts}) slices were taken again where another guest was seen on the "
            f"cores before or after them; {own} of these rows have no such slice left."
        )
    if quieter and len(looked) < len(rows):
        text += f" {'The other rows' if looked else 'Rows'} are {QUIETER}."
    return text


def machine(results: dict[str, Any], benches: dict[str, Any] | None, plots: dict[str, str]) -> str:
    """The section of one machine; `plots`: path of each plot, `benches`: what `make bench` left there."""
    rows = results["rows"]
    dates = sorted({row["date"] for row in rows})
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = [
        f"## {results['machine']}",
        "",
        f"Measured {' and '.join([dates[0], dates[-1]] if len(dates) > 1 else dates)} with {versions}; "
        f"{results['threads']} threads, {results['rounds']} rounds of {results['slice_ms']:g} ms."
        + _shared_host(results, benches),
        "",
        *_asked(rows, benches),
        *_possible(rows, benches),
        *_behind(rows, benches),
    ]
    for title, part, names, table in (
        ("Dense int8", "dense", ("dense-ratios", "dense-peers", "share-over-m"), _dense),
        ("Sparse int8", "sparse", ("sparse", "patterns"), _others),
        ("Sparse float32", "fp32", ("fp32",), _others),
        ("Convolutions", "conv", ("conv",), _others),
    ):
        mine = [row for row in rows if row["part"] == part]
        if mine:
            text += [
                f"### {title}",
                "",
                *_note(part),
                *_images(names, plots),
                *_details(table, mine),
            ]
    return "\n".join(text)


def _note(part: str) -> list[str]:
    return [*NOTES[part].splitlines(), ""] if part in NOTES else []


def _images(names: tuple[str, ...], plots: dict[str, str]) -> list[str]:
    return [line for name in names if name in plots for line in (f"![{name}]({plots[name]})", "")]


def _details(table: Callable[[list[Row]], list[str]], rows: list[Row]) -> list[str]:
    return ["<details><summary>every row</summary>", "", *table(rows), "</details>", ""]


# ---- what was asked ---------------------------------------------------------------------------------------


def _asked(rows: list[Row], benches: dict[str, Any] | None) -> list[str]:
    text = ["### Targets", "", "| target | asked | met | least | geometric mean |", "|---|---|---|---|---|"]
    dense = [row["ratio"] for row in rows if row["part"] == "dense" and "ratio" in row]
    if dense:
        mean = geomean(dense)
        text.append(
            f"| dense int8 against the best peer, geometric mean | {GEOMEAN_WANTED:g} | "
            f"{_met(mean >= GEOMEAN_WANTED)} | | {mean:.2f} |"
        )
    for key, found in verdicts(rows).items():
        targets: list[dict[str, Any]] = [target for _, target in found]
        wants = sorted({target["want"] for target in targets})
        want = f"{wants[0]:g}" + (f" to {wants[-1]:g}, by sparsity" if len(wants) > 1 else "")
        met = sum(target["met"] for target in targets)
        got = [target["got"] for target in targets]
        text.append(
            f"| {ASKED.get(key, ': '.join(key))} | {want} "
            f"| {_met(met == len(targets))}: {met} of {len(targets)} | {min(got):.2f} | {geomean(got):.2f} |"
        )
    for (what, want), mine in _bench_targets(benches).items():
        met = sum(row["target"].endswith(": met") for row in mine)
        text.append(f"| `make bench`: {what} | {want} | {_met(met == len(mine))}: {met} of {len(mine)} | | |")
    return [*text, ""]


def _bench_targets(benches: dict[str, Any] | None) -> dict[tuple[str, str], list[Row]]:
    """The judged rows of `make bench` by (what, asked); sizes are left out."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in (benches or {}).get("rows", []):
        want, _, verdict = row.get("target", "").rpartition(": ")
        if verdict in ("met", "MISSED"):  # else a row that shows a target but does not judge it
            what = " ".join(SIZES.sub("", row["case"]).replace(" ,", ",").split()).strip(" ,")
            found.setdefault((f"{row['bench']}, {what}", want), []).append(row)
    return found


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _possible(rows: list[Row], benches: dict[str, Any] | None) -> list[str]:
    """Dense layers beside what nothing but an empty call and the machine's limits would reach, by M."""
    read = read_bandwidth(benches)
    dense = [row for row in rows if row["part"] == "dense" and "ratio" in row and "empty_us" in row]
    if not dense or read is None:
        return []
    text = [
        "### What is possible",
        "",
        "Dense int8 against the best peer, geometric means over the shapes. The limit is an empty call and "
        "then nothing but products at the int8 peak, or the weight's bytes at the fastest read found by "
        f"`make bench` ({read:.0f} GB/s, weights in cache), whichever takes longer: no quantisation, no "
        "output, no join. Of weights that fit the second-level caches more bytes arrive than that.",
        "",
        "| M | reached | the limit would be | share of the limit |",
        "|---|---|---|---|",
    ]
    by_m: dict[str, list[Row]] = {}
    for row in sorted(dense, key=lambda row: row["m"]):
        by_m.setdefault(str(row["m"]), []).append(row)
    for m, mine in [*by_m.items(), ("all", dense)]:
        reached = geomean(row["ratio"] for row in mine)
        share = geomean(limit_us(row, read) / row["us"] for row in mine)
        text.append(f"| {m} | {reached:.2f} | {reached / share:.2f} | {share:.0%} |")
    return [*text, ""]


def _behind(rows: list[Row], benches: dict[str, Any] | None) -> list[str]:
    """Every point where a peer is faster, every target that is missed, and every peer that did not run."""
    losses = behind(rows)
    compared = sum("ratio" in row for row in rows)
    text = ["### Where a peer is faster", ""]
    if losses:
        text += [
            f"{len(losses)} of {compared} rows, worst first.",
            "",
            "| case | ours | peer | ratio |",
            "|---|---|---|---|",
        ]
        for row in losses:
            figures = row["peers"][row["best"]]
            interval = f"[{figures['low']:.2f}, {figures['high']:.2f}]"
            text.append(
                f"| {row['part']} {row['case']} | {_us(row['us'])} | {row['best']} {_us(figures['us'])} "
                f"| {row['ratio']:.2f} {interval} |"
            )
    else:
        text.append(f"Nowhere: {compared} of {compared} rows are ahead of their best peer.")
    missed = [
        (row, target)
        for found in verdicts(rows).values()
        for row, target in found
        if not target["met"] and target["what"] not in ("best peer", "torch.ao")
    ]
    benched = [
        (row, want)
        for (_, want), mine in _bench_targets(benches).items()
        for row in mine
        if row["target"].endswith(": MISSED")
    ]
    if missed or benched:
        text += [
            "",
            f"<details><summary>Other targets missed: {len(missed) + len(benched)} rows</summary>",
            "",
        ]
        text += ["| case | target | asked | reached |", "|---|---|---|---|"]
        for row, target in missed:
            what = ASKED.get((row["part"], str(target["what"])), target["what"])
            text.append(f"| {row['case']} | {what} | {target['want']:g} | {target['got']:.2f} |")
        for row, want in benched:
            text.append(f"| {row['case']} | `make bench`: {row['bench']} | {want} | {_reached(row, want)} |")
        text += ["", "</details>"]
    lost: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, figures in row["peers"].items():
            if "lost" in figures:
                lost[(name, figures["lost"])] = lost.get((name, figures["lost"]), 0) + 1
    if lost:
        text += ["", "Peers that could not run some rows:", ""]
        text += [f"- {name}: {why} ({count} rows)" for (name, why), count in lost.items()]
    return [*text, ""]


def _reached(row: Row, want: str) -> str:
    """The figure of a row of `make bench` that its target is about, by the names its benches use."""
    peer = f"vs {want.partition('x ')[2]}"
    return next((str(row[key]) for key in (peer, "share", "ratio", "gain", "us") if key in row), "")


# ---- tables -----------------------------------------------------------------------------------------------


def _dense(rows: list[Row]) -> list[str]:
    names = distinct(name for row in rows for name in row["peers"])
    head = ["K x N", "M", "ours", "GOPS", "peak", *names, "best"]
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: (row["k"] * row["n"], row["k"], row["m"])):
        cells = [shape(row), str(row["m"]), _us(row["us"]), str(row["gops"]), _share(row)]
        cells += [_ratio(row["peers"].get(name)) for name in names]
        text.append(f"| {' | '.join([*cells, _best(row)])} |")
    return [*text, ""]


def _others(rows: list[Row]) -> list[str]:
    names = distinct(name for row in rows for name in (*row["peers"], *row["own"]))
    head = ["case", "ours", "GOPS", "peak", *names, "asked"]
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        every = {**row["peers"], **row["own"]}
        asked = ", ".join(
            f"{t['got']:.2f} of {t['want']:g}{'' if t['met'] else ' **missed**'}" for t in row["targets"]
        )
        case = f"{row['case']}, out {row['out']}" if "out" in row else row["case"]
        cells = [case, _us(row["us"]), str(row["gops"]), _share(row)]
        text.append(f"| {' | '.join([*cells, *(_ratio(every.get(name)) for name in names), asked])} |")
    return [*text, ""]


def _ratio(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    if "lost" in figures:
        return "did not run"
    return f"**{figures['ratio']:.2f}**" if figures["ratio"] < 1 else f"{figures['ratio']:.2f}"


def _best(row: Row) -> str:
    return f"{_ratio(row['peers'][row['best']])} {row['best']}" if "ratio" in row else ""


def _share(row: Row) -> str:
    return f"{row['share']:.0%}" if "share" in row else ""


def _us(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"

"""Timings of the GPU kernels beside their peers: the bench stage of ``make gpu``.

Each case is verified, then timed: a CUDA graph of one call, replayed between two events, after a write of a
buffer larger than L2 (so weights come from memory, as they do in a model) that also hides the launch. Median
of the samples and their spread. Peers are timed in turn with ours, sample by sample. Ceilings (copy
bandwidth, bf16 matrix rate) are measured in the same run. Rows are written to the results file as they come;
a later run with the same sources leaves out what is there.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tautorch import dispatch, ops, tuning
from tautorch.nn import Int8Linear

OP = "int8_linear"
SAMPLES = 40
# (N, K) of the layers of an 8-billion-parameter Llama and of BERT-large, and 8192 cubed.
LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
BERT = [(1024, 1024), (4096, 1024), (1024, 4096)]
ROWS = [1, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096]


Calls = dict[str, Callable[[], object]]


class Case(NamedTuple):
    """A verified case, ready to be timed."""

    calls: Calls  # "ours" among them
    moved: float  # bytes that must move
    operations: float
    missing: Sequence[str] = ()  # peers that do not run here, with the reason


class Results:
    """benches/results/<device>.json, rewritten at every row."""

    def __init__(self, folder: Path, sources: str) -> None:
        name = torch.cuda.get_device_name()
        self.path = folder / f"{name.lower().replace(' ', '-')}.json"
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.data: dict[str, Any] = (
            kept if kept.get("sources") == sources else {"sources": sources, "rows": {}}
        )
        p = torch.cuda.get_device_properties(0)
        self.data |= {
            "device": name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "torch": torch.__version__,
            "driver": dispatch.cuda.driver_version(),
            "date": datetime.date.today().isoformat(),
            "command": "make gpu STAGE=bench",
        }

    def has(self, case: str) -> bool:
        return case in self.data["rows"]

    def add(self, case: str, **figures: Any) -> None:
        self.data["rows"][case] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        print(f"  {case:<40}", "  ".join(f"{k} {v}" for k, v in figures.items()), flush=True)


def graph_of(fn: Callable[[], object]) -> Callable[[], None]:
    """One call of ``fn`` as a graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # Triton compiles, weights are packed, cuBLAS takes its workspace
            fn()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def time_in_turn(calls: dict[str, Callable[[], object]], flush: Tensor) -> dict[str, list[float]]:
    """Microseconds of each call, cold, in turns."""
    events = {
        name: [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(SAMPLES)
        ]
        for name in calls
    }
    for i in range(SAMPLES):
        for name, call in calls.items():
            flush.fill_(i % 2)
            begin, end = events[name][i]
            begin.record()
            call()
            end.record()
    torch.cuda.synchronize()
    return {name: [b.elapsed_time(e) * 1e3 for b, e in pairs] for name, pairs in events.items()}


def host_microseconds(fn: Callable[[], object], calls: int = 300) -> float:
    """Host time of one eager call, the queue never full: the best of several runs."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            fn()
        best = min(best, time.perf_counter() - begin)
    torch.cuda.synchronize()
    return best / calls * 1e6


def ceilings(results: Results, flush: Tensor) -> None:
    """Copy bandwidth and bf16 matrix rate of this machine."""
    if results.has("ceilings"):
        return
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    x, w = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = time_in_turn({"copy": lambda: b.copy_(a), "bf16": lambda: torch.mm(x, w)}, flush)
    copy, bf16 = median(times["copy"]), median(times["bf16"])
    results.add(
        "ceilings",
        copy_tb_s=round(2 * a.numel() / copy / 1e6, 2),
        bf16_tflops=round(2 * 8192**3 / bf16 / 1e6),
    )


def case_int8(m: int, n: int, k: int, mode: str) -> tuple[dict[str, Callable[[], object]], str]:
    """Ours and its peers for one shape, after ours was verified; and the kernel that ran."""
    linear = torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16).eval()
    ours = Int8Linear.from_float(linear.float()).cuda()
    linear = linear.bfloat16()
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    q = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
    weight, scale = ours.weight, ours.weight_scale
    x_scale = torch.rand(m, device="cuda") * 0.01

    raw = ops.int8_linear(q, weight, scale, x_scale=x_scale, out_dtype=torch.int32)
    check = torch.randperm(m, device="cuda")[:64]
    expected = q[check].double() @ weight.double().t()
    if not torch.equal(raw[check].double(), expected):
        raise RuntimeError(f"int8_linear {m}x{n}x{k}: accumulators differ from the float64 product")

    def int_mm() -> object:
        rows = q if m > 16 else torch.nn.functional.pad(q, (0, 0, 0, 17 - m))  # _int_mm wants more than 16
        acc = torch._int_mm(rows, weight.t())[:m]
        return (acc.float() * x_scale[:, None] * scale).bfloat16()

    calls: dict[str, Callable[[], object]] = {}
    if mode == "dynamic":
        calls["ours"] = lambda: ours(x)
    else:
        calls["ours"] = lambda: ops.int8_linear(q, weight, scale, x_scale=x_scale, out_dtype=torch.bfloat16)
        if k % 8 == 0 and n % 8 == 0:
            calls["_int_mm + epilogue"] = int_mm
    calls["bf16"] = lambda: linear(x)
    with torch.no_grad():
        calls["ours"]()
    return calls, str(dispatch.last_used(OP))


def failure(name: str, error: Exception) -> str:
    """One line about a case that failed; raises where the device is lost, so that no other can run."""
    torch.cuda.synchronize()
    text = f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    print(f"  {text}", flush=True)
    return text


def run_cases(
    cases: Iterator[tuple[str, Callable[[], Case]]],
    results: Results,
    flush: Tensor,
    deadline: float,
    only: str,
    failed: list[str],
) -> int:
    """Time what is not there yet, tiles measured first as ``tautorch.warmup`` does: how many are left."""
    todo = [(name, make) for name, make in cases if only in name and not results.has(name)]
    copy = results.data["rows"]["ceilings"]["copy_tb_s"]
    for i, (name, make) in enumerate(todo):
        if time.monotonic() > deadline - 40:  # measuring tiles compiles several
            return len(todo) - i
        try:
            time_case(name, make, results, flush, copy)
        except Exception as error:
            failed.append(failure(name, error))
    return 0


def time_case(name: str, make: Callable[[], Case], results: Results, flush: Tensor, copy: float) -> None:
    """One case, into the results."""
    op = name.split()[0]
    with torch.no_grad(), tuning.measuring():
        case = make()
        case.calls["ours"]()
    kernel = dispatch.last_used(op) if op in dispatch.OPS else op
    with torch.no_grad():
        times = time_in_turn({who: graph_of(fn) for who, fn in case.calls.items()}, flush)
    ours = median(times["ours"])
    figures: dict[str, Any] = {"us": round(ours, 2)}
    if case.operations:
        figures["tops"] = round(case.operations / ours / 1e6, 1)
    figures["copy_share"] = round(case.moved / ours / 1e6 / copy, 3)
    figures |= {f"vs {who}": round(median(t) / ours, 2) for who, t in times.items() if who != "ours"}
    if case.missing:
        figures["not here"] = list(case.missing)
    results.add(name, **figures, kernel=kernel)


def time_linear(
    name: str, case: tuple[str, int, int, int], results: Results, flush: Tensor, copy: float
) -> None:
    """One shape of int8_linear, into the results."""
    mode, m, n, k = case
    with torch.no_grad():
        with tuning.measuring():  # which of the kernels, as a layer that was warmed up knows
            calls, kernel = case_int8(m, n, k, mode)
        times = time_in_turn({name: graph_of(fn) for name, fn in calls.items()}, flush)
        host = {name: host_microseconds(calls[name]) for name in ("ours", "bf16")} if m == 1 else {}
    ours = median(times["ours"])
    low, high = sorted(times["ours"])[SAMPLES // 10], sorted(times["ours"])[-SAMPLES // 10]
    moved = n * k + m * k * (1 if mode == "int8" else 2) + 2 * m * n
    figures: dict[str, Any] = {"us": round(ours, 2), "spread": f"{low:.2f}..{high:.2f}"}
    figures["tops"] = round(2 * m * n * k / ours / 1e6, 1)
    figures["copy_share"] = round(moved / ours / 1e6 / copy, 3)
    for peer, samples in times.items():
        if peer != "ours":
            figures[f"vs {peer}"] = round(median(samples) / ours, 2)
    figures |= {f"host us {who}": round(us, 1) for who, us in host.items()}
    results.add(name, **figures, kernel=kernel)


def run(folder: Path, sources: str, deadline: float, only: str) -> tuple[str, list[str]]:
    """All cases, until the deadline: what was done or is left, and the cases that failed."""
    from benches.gpu import measure_packed, measure_triton  # they need this module

    results, failed = Results(folder, sources), list[str]()
    torch.manual_seed(0)
    l2 = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26))
    flush = torch.empty(max(4 * l2, 1 << 28), dtype=torch.uint8, device="cuda")
    ceilings(results, flush)
    copy = results.data["rows"]["ceilings"]["copy_tb_s"]
    shapes = [(8192, 8192, 8192), *((m, n, k) for n, k in LLAMA + BERT for m in ROWS)]
    cases = [(mode, *shape) for shape in shapes for mode in ("int8", "dynamic")]
    cases = [c for c in cases if only in f"{c[0]} {c[1]}x{c[2]}x{c[3]}"]
    for i, (mode, m, n, k) in enumerate(cases):
        name = f"{OP} {mode} {m}x{n}x{k}"
        if results.has(name):
            continue
        if time.monotonic() > deadline - 20:
            return f"stopped at the limit with {len(cases) - i} cases left; run the stage again", failed
        try:
            time_linear(name, (mode, m, n, k), results, flush, copy)
        except Exception as error:
            failed.append(failure(name, error))
    for module in (measure_packed, measure_triton):
        left = run_cases(module.cases(), results, flush, deadline, only, failed)
        if left:
            name = module.__name__.rpartition(".")[2]
            return f"stopped at the limit with {left} cases of {name} left; run the stage again", failed
    ratios = [
        r["vs bf16"] for name, r in results.data["rows"].items() if name.startswith(OP) and "vs bf16" in r
    ]
    if not ratios:
        return f"no point of {OP} in {results.path}", failed
    geometric = torch.tensor(ratios).log().mean().exp().item()
    wins = sum(r > 1 for r in ratios) / len(ratios)
    results.add(
        "summary", points=len(ratios), geomean_vs_bf16=round(geometric, 3), faster_share=round(wins, 3)
    )
    return f"{len(ratios)} points in {results.path}", failed

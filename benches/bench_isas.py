"""Narrower instruction sets than this CPU's best, forced: int8 and sparse layers on AVX2 and AVX-VNNI."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from tautorch import _C, dispatch, prune
from tautorch.nn import Int8Linear, SparseLinear
from tautorch.testing.bench import Table, verdict
from tautorch.testing.cores import Cores

SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (1024, 4096), (4096, 4096), (1000, 1003))
NARROW = ("avx2", "avxvnni")
Side = tuple[str, str, Callable[[], object]]  # op and kernel to force ("" for none), what to run


def medians(sides: dict[str, Side], cores: Cores, rounds: int = 5, seconds: float = 0.03) -> dict[str, float]:
    """Seconds of a call of each side, in turns; packing for a kernel is not timed."""
    times: dict[str, list[float]] = {name: [] for name in sides}

    def slice_(run: Callable[[], object]) -> list[float]:
        took = []
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            run()
            took.append(time.perf_counter() - start)
        return took

    until = cores.clock() + cores.patience
    with torch.inference_mode():
        for _ in range(rounds):
            for name, (op, kernel, run) in sides.items():
                with dispatch.force(op, kernel) if op else nullcontext():
                    run()
                    assert not op or dispatch.last_used(op) == kernel
                    times[name] += cores.take(lambda run=run: slice_(run), until)  # type: ignore[misc]
    return {name: statistics.median(t) for name, t in times.items()}


def needs(*kernels: str) -> None:
    missing = [kernel for kernel in kernels if not _C.isas().get(kernel, False)]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")


@pytest.mark.parametrize("m", [16, 64, 128])
@pytest.mark.parametrize("k, n", SHAPES)
@pytest.mark.parametrize("kernel", NARROW)
def test_dense(table: Table, kernel: str, k: int, n: int, m: int) -> None:
    """AVX2 beside torch's fp32 layer; AVX-VNNI beside AVX512-VNNI from 64 rows on."""
    beside = ["avx512vnni"] if kernel == "avxvnni" and m >= 64 else []
    needs(kernel, *beside)
    linear = torch.nn.Linear(k, n).eval()
    ours = Int8Linear.from_float(linear)
    x = torch.randn(m, k)
    with torch.inference_mode():
        expected = linear(x)
        for forced in (kernel, *beside):
            with dispatch.force("int8_linear", forced):
                torch.testing.assert_close(ours(x), expected, rtol=0, atol=0.2)
    if not table.timed:
        return
    sides: dict[str, Side] = {name: ("int8_linear", name, lambda: ours(x)) for name in (kernel, *beside)}
    t = medians({**sides, "fp32": ("", "", lambda: linear(x))}, table.cores)
    fp32 = t["fp32"] / t[kernel]
    ratios, judged = {"vs nn.Linear fp32": round(fp32, 2)}, {}
    if kernel == "avx2":
        judged = verdict(fp32, 1.5, ">= 1.5x nn.Linear fp32")
    elif beside:
        ratio = t["avx512vnni"] / t[kernel]
        ratios["vs avx512vnni"] = round(ratio, 2)
        judged = verdict(ratio, 0.45, ">= 0.45x avx512vnni")
    table.add("int8_linear", f"{kernel} {m}x{k}x{n}", us=round(t[kernel] * 1e6, 1), **ratios, **judged)


@pytest.mark.parametrize("pattern", ["4x1", "unstructured"])
@pytest.mark.parametrize("kernel", NARROW)
def test_sparse(table: Table, kernel: str, pattern: str) -> None:
    """80 % zeros beside the same instruction set's dense int8 layer."""
    needs(kernel)
    m, k, n = 128, 1024, 4096
    linear = torch.nn.Linear(k, n).eval()
    dense = Int8Linear.from_float(linear)
    mask = prune.make_mask(torch.rand(n, k), pattern, 0.8)
    with torch.no_grad():
        linear.weight.mul_(mask)
    ours = SparseLinear.from_float(linear, pattern=pattern, mask=mask)
    x = torch.randn(m, k)
    with torch.inference_mode(), dispatch.force("sparse_linear", kernel):
        torch.testing.assert_close(ours(x), linear(x), rtol=0, atol=0.2)
    if not table.timed:
        return
    t = medians(
        {
            "sparse": ("sparse_linear", kernel, lambda: ours(x)),
            "dense": ("int8_linear", kernel, lambda: dense(x)),
        },
        table.cores,
    )
    ratio = t["dense"] / t["sparse"]
    table.add(
        "sparse_linear", f"{kernel} {pattern} 80% int8 {m}x{k}x{n}", us=round(t["sparse"] * 1e6, 1),
        **{"vs Int8Linear": round(ratio, 2)},
        **(verdict(ratio, 2.0, "4x1: >= 2x the same kernel's dense layer") if pattern == "4x1" else {}),
    )  # fmt: skip

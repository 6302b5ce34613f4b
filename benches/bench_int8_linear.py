"""int8_linear beside torch.ao's dynamic engines and nn.Linear, and against the core's own peak."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tautorch import _C, dispatch
from tautorch.nn import Int8Linear
from tautorch.ops import tails
from tautorch.ops.int8_linear import pack, plan
from tautorch.reference.int8_linear import int8_linear as reference
from tautorch.testing.bench import Table, best_seconds, dynamic_peers, on_threads, threads, verdict

KERNELS = [
    k.name
    for k in dispatch.kernels("int8_linear")
    if k.device == "cpu" and k.name not in ("reference", "scalar")
]


def _available(kernel: str) -> None:
    if not _C.isas()[kernel]:
        pytest.skip(f"this CPU has no {kernel}")


def _direct(
    weight: torch.Tensor, x: torch.Tensor, out_dtype: torch.dtype, mode: int, kernel: str | None = None
) -> tuple[Callable[[], None], torch.Tensor]:
    """A call of the kernel without the module, and its output. Scales are 1, a requantised output's 2^10."""
    (m, k), n = x.shape, weight.shape[0]
    packed, out = pack(weight, kernel=kernel), torch.empty(m, n, dtype=out_dtype)
    codes, keep = tails.tail(
        weight_scale=torch.ones(n), bias=None, mode=mode,
        x_scale=torch.ones(1) if mode != tails.DYNAMIC else None, x_zero_point=None, activation="none",
        out_scale=torch.tensor([1024.0]) if out_dtype == torch.int8 else None,
    )  # fmt: skip
    run_plan = plan(packed, k, codes)
    x_code, out_code = tails.DTYPE_CODE[x.dtype], tails.DTYPE_CODE[out_dtype]

    def run() -> None:
        _C.int8_linear_run(run_plan, x.data_ptr(), x_code, m, k, out.data_ptr(), out_code)
        assert packed.numel() and keep is not None  # a plan holds addresses: these must outlive it

    return run, out


def _operands(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    return x, torch.randint(-127, 128, (n, k), dtype=torch.int8)


SHARES = [(k, 64, 1024, 1024) for k in KERNELS] + [
    ("avx512vnni", m, k, n) for m, k, n in ((128, 1024, 4096), (64, 4096, 4096), (256, 4096, 1024))
]


@pytest.mark.parametrize("kernel, m, k, n", SHARES)
def test_share_of_peak(table: Table, kernel: str, m: int, k: int, n: int) -> None:
    """One thread: int8 in and int32 out (the micro-kernel), and float in and out with dynamic scales."""
    _available(kernel)
    x, weight = _operands(m, k, n)
    bare, out = _direct(weight, x, torch.int32, tails.GIVEN, kernel)
    whole, _ = _direct(weight, x.float(), torch.float32, tails.DYNAMIC, kernel)
    rounds = 20_000
    with threads(1):
        bare()
        whole()
        assert torch.equal(out, (x.double() @ weight.double().T).to(torch.int32))
        assert dispatch.last_used("int8_linear") == kernel
        if not table.timed:
            return
        sides = {"bare": bare, "whole": whole, "peak": lambda: _C.peak_i8(kernel, rounds)}
        times = table.in_turns(sides, seconds=0.8)
        peak = _C.peak_i8(kernel, rounds) / times["peak"]
        for name, side, least in (("micro-kernel", "bare", 0.92), ("whole op", "whole", 0.88)):
            share = m * n * k / times[side] / peak
            target = verdict(share, least, f">= {least:.0%}") if kernel == "avx512vnni" else {}
            table.add("int8_linear", f"{name} {kernel} {m}x{k}x{n}", share=f"{share:.1%}",
                      peak_gops=round(2 * peak / 1e9), **target)  # fmt: skip


@pytest.mark.parametrize("k, n, layers", [(1024, 4096, 1), (4096, 1024, 1), (4096, 4096, 8)])
def test_bandwidth(table: Table, k: int, n: int, layers: int) -> None:
    """M = 1, two threads: reading the weights' cache lines against a call, less that of an empty module.

    One layer of 4 MB stays in L3; eight of 16 MB one after another come from memory. So large a read drives
    what calls a module (Python, torch) out of the inner caches: `after_a_read` is the share less an empty
    call that follows one.
    """
    modules = [Int8Linear.from_float(torch.nn.Linear(k, n)) for _ in range(layers)]
    empty, x, x_empty = Int8Linear.from_float(torch.nn.Linear(4, 4)), torch.randn(1, k), torch.randn(1, 4)
    with torch.inference_mode():
        for module in (*modules, empty):
            module(x_empty if module is empty else x)
        packs = [module.get_buffer("packed") for module in modules]

        def call() -> None:
            for module in modules:
                module(x)

        def read() -> None:
            for p in packs:
                _C.read_lines(p.data_ptr(), p.numel())

        def read_and_empty() -> None:
            for p in packs:
                _C.read_lines(p.data_ptr(), p.numel())
                empty(x_empty)

        read()
        if table.timed:
            sides = {"call": call, "read": read, "empty": lambda: empty(x_empty), "after": read_and_empty}
            times = table.in_turns(sides, seconds=0.8)
            net, reading = times["call"] / layers - times["empty"], times["read"] / layers
            net_after = (times["call"] - times["after"]) / layers + reading
            case = f"dynamic 1x{k}x{n}, weights in {'L3' if layers == 1 else 'memory'}"
            table.add("int8_linear", case, us=round((net + times["empty"]) * 1e6, 1),
                      net_us=round(net * 1e6, 1), read_us=round(reading * 1e6, 1),
                      GB_s=round(n * k / reading / 1e9),
                      share=f"{reading / net:.1%}", after_a_read=f"{reading / net_after:.1%}",
                      **verdict(reading / net, 0.85, ">= 85 % of read bandwidth"))  # fmt: skip


@pytest.mark.parametrize("m, k, n", [(64, 1024, 1024), (128, 1024, 4096), (128, 384, 1536)])
def test_chained(table: Table, m: int, k: int, n: int) -> None:
    """Static int8 in and int8 out, as chained layers pass it on, against int32 out: the product alone."""
    x, weight = _operands(m, k, n)
    bare, acc = _direct(weight, x, torch.int32, tails.GIVEN)
    chained, out = _direct(weight, x, torch.int8, tails.GIVEN)
    bare()
    chained()
    assert torch.equal(out, torch.clamp(torch.round(acc * 2.0**-10), -128, 127).to(torch.int8))
    if table.timed:
        times = table.in_turns({"bare": bare, "chained": chained})
        ratio = times["bare"] / times["chained"]
        table.add("int8_linear", f"int8 in and out {m}x{k}x{n}", us=round(times["chained"] * 1e6, 1),
                  ratio=round(ratio, 3),
                  **verdict(ratio, 1 / 1.05, "within 5 % of the bare product"))  # fmt: skip


@pytest.mark.parametrize("m, k, n", [(1, 1024, 4096), (16, 1024, 4096), (128, 1024, 4096), (128, 384, 384)])
def test_half_floats(table: Table, m: int, k: int, n: int) -> None:
    """bf16 and fp16 in and out against fp32, through the module."""
    ours, x = Int8Linear.from_float(torch.nn.Linear(k, n)), torch.randn(m, k)
    xs = {str(d).removeprefix("torch."): x.to(d) for d in (torch.float32, torch.bfloat16, torch.float16)}
    with torch.inference_mode():
        for name, xd in xs.items():
            assert str(ours(xd).dtype) == f"torch.{name}"
        if table.timed:
            times = table.in_turns({name: (lambda xd=xd: ours(xd)) for name, xd in xs.items()})
            for name in ("bfloat16", "float16"):
                ratio = times["float32"] / times[name]
                table.add("int8_linear", f"{name} in and out {m}x{k}x{n}", us=round(times[name] * 1e6, 1),
                          ratio=round(ratio, 3),
                          **verdict(ratio, 1 / 1.05, "within 5 % of float32"))  # fmt: skip


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("k, n", [(1024, 4096), (4096, 4096)])
def test_weight_only(table: Table, m: int, k: int, n: int) -> None:
    """Float activations by int8 weights against the dynamic layer of the same weights."""
    linear, x = torch.nn.Linear(k, n), torch.randn(m, k)
    weight_only, dynamic = (Int8Linear.from_float(linear, quant=q) for q in ("weight_only", "dynamic"))
    with torch.inference_mode():
        expected = (x.double() @ weight_only.to_float().weight.double().T + linear.bias).float()
        torch.testing.assert_close(weight_only(x), expected, rtol=1e-5, atol=1e-5)
        dynamic(x)
        if table.timed:
            times = table.in_turns({"weight_only": lambda: weight_only(x), "dynamic": lambda: dynamic(x)})
            ratio = times["dynamic"] / times["weight_only"]
            table.add("int8_linear", f"weight-only {m}x{k}x{n}", us=round(times["weight_only"] * 1e6, 1),
                      ratio=round(ratio, 2), **verdict(ratio, 1.0, ">= 1.0x the dynamic layer"))  # fmt: skip


@pytest.mark.parametrize("m, k, n", [(16, 1024, 4096), (64, 1024, 1024), (512, 768, 3072)])
def test_two_threads(table: Table, m: int, k: int, n: int) -> None:
    """Two threads against one, where one takes 100 us or more."""
    ours, x = Int8Linear.from_float(torch.nn.Linear(k, n)), torch.randn(m, k)
    one, two = (on_threads(n, lambda: ours(x)) for n in (1, 2))
    with torch.inference_mode(), threads(2):
        assert torch.equal(one(), two())
        if table.timed:
            times = table.in_turns({"one": one, "two": two})
            ratio = times["one"] / times["two"]
            table.add("int8_linear", f"two threads {m}x{k}x{n}", us=round(times["two"] * 1e6, 1),
                      ratio=round(ratio, 2), **verdict(ratio, 1.8, ">= 1.8x one thread"))  # fmt: skip


ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024)
SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (1024, 4096), (4096, 4096), (1000, 1003))


@pytest.mark.parametrize("k, n", SHAPES)
def test_against_torch(table: Table, k: int, n: int) -> None:
    """Float in and out, dynamic quantisation inside, two threads. More peers: `make bench-peers`."""
    linear = torch.nn.Linear(k, n).eval()
    ours, engines = Int8Linear.from_float(linear), dynamic_peers(linear)
    half = copy.deepcopy(linear).to(torch.bfloat16)
    for m in ROWS:
        x = torch.randn(m, k)
        xb = x.to(torch.bfloat16)
        sides: dict[str, Callable[[], object]] = {"ours": lambda x=x: ours(x)}  # type: ignore[misc]
        sides |= {name: (lambda p=p, x=x: p(x)) for name, p in engines.items()}
        if m <= 128:  # beyond, they take two and eight times as long as any int8 layer
            sides["torch bf16"] = lambda xb=xb: half(xb)  # type: ignore[misc]
        if m <= 16:
            sides["torch fp32"] = lambda x=x: linear(x)  # type: ignore[misc]
        with torch.inference_mode():
            expected = reference(x, ours.weight, ours.weight_scale, ours.bias)
            torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
            for side in sides.values():
                side()
            if not table.timed:
                continue
            times = table.in_turns(sides, seconds=0.3)
            mine = times.pop("ours")
            best = min(times, key=lambda name: times[name])
            ratio = times[best] / mine
            table.add("int8_linear", f"dynamic {m}x{k}x{n}", us=round(mine * 1e6, 1),
                      GOPS=round(2 * m * k * n / mine / 1e9), best=best, ratio=round(ratio, 2),
                      kernel=ours.kernel(), **verdict(ratio, 1.0, ">= 1.0x the best of torch"))  # fmt: skip


def test_geometric_mean(table: Table) -> None:
    """Of the rows of test_against_torch."""
    ratios = [float(r["ratio"]) for r in table.rows if r["bench"] == "int8_linear" and "best" in r]
    if len(ratios) == len(ROWS) * len(SHAPES):
        mean = statistics.geometric_mean(ratios)
        table.add("int8_linear", "dynamic, geometric mean of a run", ratio=round(mean, 2),
                  **verdict(mean, 1.4, ">= 1.4x the best of torch"))  # fmt: skip


def test_fork_join(table: Table) -> None:
    """Nothing, on two threads of torch's pool."""
    _C.fork_join(1000, 2)
    if table.timed:
        us = best_seconds(lambda: _C.fork_join(2000, 2), 20) / 2000 * 1e6
        table.add(
            "core",
            "fork-join, 2 threads",
            us=round(us, 2),
            target=f"<= 1 us: {'met' if us <= 1 else 'MISSED'}",
        )


def test_throughput(benchmark: BenchmarkFixture) -> None:
    """pytest-benchmark's own statistics of one call."""
    ours, x = Int8Linear.from_float(torch.nn.Linear(1024, 4096)), torch.randn(128, 1024)
    with torch.inference_mode():
        benchmark(ours, x)

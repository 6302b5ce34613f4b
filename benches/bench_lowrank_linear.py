"""lowrank_linear in one call beside two calls of layers on the same factors, and against its bound.

The bound is the empty call and, of two things that can overlap, the longer: the arithmetic at the peak of the
cores, or the bytes of factors and output at the bandwidth of a copy in cache. All are measured in the run.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tautorch import _C, dispatch
from tautorch.factorize import FactorizedLinear
from tautorch.nn import Int8Linear, LowRankLinear
from tautorch.testing.bench import Table, best_seconds, verdict

SIZES = [(768, 3072, 32), (1024, 4096, 64), (4096, 4096, 128)]
DTYPES = pytest.mark.parametrize("weight_dtype", [torch.float32, torch.int8], ids=["fp32", "int8"])


@functools.cache
def _per_second(weight_dtype: torch.dtype) -> float:
    """Multiply-accumulates of all threads: the product instruction on registers alone."""
    peak = _C.peak_i8 if weight_dtype == torch.int8 else _C.peak_f32
    kernel = next(isa for isa, available in _C.isas().items() if available)
    rounds = 20_000
    return torch.get_num_threads() * peak(kernel, rounds) / best_seconds(lambda: peak(kernel, rounds))


@functools.cache
def _bytes_per_second() -> float:
    """Read and written by a copy of 512 KiB."""
    a, b = torch.randn(1 << 17), torch.empty(1 << 17)
    return 2 * 4 * a.numel() / best_seconds(lambda: b.copy_(a))


@DTYPES
@pytest.mark.parametrize("m", [1, 16, 128, 1024])
@pytest.mark.parametrize("k, n, rank", SIZES)
def test_lowrank_linear(table: Table, k: int, n: int, rank: int, m: int, weight_dtype: torch.dtype) -> None:
    """Two threads. Int8 factors beside two Int8Linear, float ones beside two nn.Linear."""
    pair = FactorizedLinear(nn.Linear(k, rank, bias=False), nn.Linear(rank, n)).eval()
    ours = LowRankLinear.from_float(pair, weight_dtype=weight_dtype)
    x = torch.randn(m, k)
    integer = weight_dtype == torch.int8
    first, second = pair.down, pair.up
    if integer:
        first, second = Int8Linear.from_float(first), Int8Linear.from_float(second)
    name = f"{str(weight_dtype).removeprefix('torch.')} {m}x{k}x{n} rank {rank}"
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), pair(x), rtol=0, atol=0.1 if integer else 1e-4)
        assert dispatch.last_used("lowrank_linear") == ours.kernel()
        if not table.timed:
            table.add("lowrank_linear", name, kernel=ours.kernel())
            return
        none = x[:0]
        t = table.in_turns(
            {"ours": lambda: ours(x), "two": lambda: second(first(x)), "empty": lambda: ours(none)}
        )
        size = rank * (k + n) * (1 if integer else 4) + 4 * m * n
        arithmetic = m * rank * (k + n) / _per_second(weight_dtype)
        bound = t["empty"] + max(arithmetic, size / _bytes_per_second())
    ratio = t["two"] / t["ours"]
    table.add(
        "lowrank_linear",
        name,
        us=round(t["ours"] * 1e6, 2),
        **{"vs two calls": f"{ratio:.2f}x", "of bound": f"{bound / t['ours']:.0%}"},
        kernel=ours.kernel(),
        **verdict(ratio, 1.3 if m <= 16 else 1.05, f">= {1.3 if m <= 16 else 1.05}x two calls"),
    )


@DTYPES
@pytest.mark.parametrize("m", [1, 16, 128])
def test_residual(table: Table, m: int, weight_dtype: torch.dtype) -> None:
    """With an int8 residual in one call, beside the low-rank layer, an Int8Linear and a sum."""
    k, n, rank = 1024, 4096, 64
    layer, x = nn.Linear(k, n), torch.randn(m, k)
    ours = LowRankLinear.from_float(layer, rank=rank, weight_dtype=weight_dtype, residual="int8")
    alone = LowRankLinear.from_float(layer, rank=rank, weight_dtype=weight_dtype)
    rest = Int8Linear(k, n, bias=False)
    rest.load_state_dict(ours.residual.state_dict())
    name = f"{str(weight_dtype).removeprefix('torch.')} {m}x{k}x{n} rank {rank} + int8"
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), layer(x), rtol=0, atol=0.1)
    table.compare(
        "lowrank_linear", name, lambda: ours(x), {"three calls": lambda: alone(x) + rest(x)},
        kernel=ours.kernel(),
    )  # fmt: skip

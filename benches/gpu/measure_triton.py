"""Timings of the low-rank operators and block-sparse sparse_linear, tiles measured first as in ``warmup``.

Peers, in the same run: lowrank_linear beside two bf16 linears and the dense bf16 one; int8 with a low-rank
correction beside plain int8; lowrank_conv2d beside two bf16 convolutions and the dense one (cuDNN,
channels-last); block-sparse beside our dense int8 and bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from benches.gpu.measure import Calls, Case

from tautorch.nn import Int8Linear, LowRankConv2d, LowRankLinear, SparseLinear
from tautorch.prune.patterns import make_mask

ROWS = (16, 512, 1024, 4096)
# (batch, channels in and out, side, rank): ResNet-50's 3x3 layers
CONVOLUTIONS = ((32, 64, 56, 16), (32, 128, 28, 32), (32, 256, 14, 64), (1, 256, 14, 64), (32, 512, 7, 128))


def _input(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16)


def lowrank(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> Case:
    """x through two factors."""
    down = torch.nn.Linear(k, r, bias=False, device="cuda")
    up = torch.nn.Linear(r, n, device="cuda")
    ours = LowRankLinear.from_factors(down, up, weight_dtype=dtype).eval()
    dense = torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    x = _input(m, k)
    with torch.no_grad():
        want = up(down(x.float()))
        error = ((ours(x).float() - want).norm() / want.norm()).item()
    if not error < 0.03:
        raise RuntimeError(f"lowrank_linear {m}x{n}x{k} r={r} {dtype}: {error} away from float")
    down, up = down.bfloat16(), up.bfloat16()
    calls: Calls = {"ours": lambda: ours(x), "two bf16": lambda: up(down(x)), "bf16": lambda: dense(x)}
    return Case(calls, 2 * m * (n + k) + r * (n + k) * (1 if dtype == torch.int8 else 2), 2 * m * r * (n + k))


def corrected(m: int, n: int, k: int, r: int) -> Case:
    """int8 plus a rank-r correction, beside int8 alone."""
    linear = torch.nn.Linear(k, n, device="cuda")
    ours, plain = (
        LowRankLinear.from_float(linear, rank=r, residual="int8").eval(),
        Int8Linear.from_float(linear),
    )
    linear, x = linear.bfloat16(), _input(m, k)
    with torch.no_grad():
        want = linear(x).float()
        error = ((ours(x).float() - want).norm() / want.norm()).item()
    if not error < 0.03:
        raise RuntimeError(f"corrected {m}x{n}x{k} r={r}: {error} away from bf16")
    calls: Calls = {"ours": lambda: ours(x), "int8": lambda: plain(x), "bf16": lambda: linear(x)}
    return Case(calls, 2 * m * (n + k) + n * k + 2 * r * (n + k), 2 * m * (n * k + r * (n + k)))


def sparse(m: int, n: int, k: int, block: int, dtype: torch.dtype, share: float) -> Case:
    """Block-sparse beside dense; ``share`` of the blocks is removed."""
    linear, pattern = torch.nn.Linear(k, n, device="cuda"), f"{block}x{block}"
    mask = make_mask(torch.rand(n, k, device="cuda"), pattern, share)
    with torch.no_grad():
        linear.weight.mul_(mask)
    ours = SparseLinear.from_float(linear, pattern=pattern, mask=mask, weight_dtype=dtype).eval()
    plain, x = Int8Linear.from_float(linear), _input(m, k)
    linear = linear.bfloat16()
    with torch.no_grad():
        want = linear(x).float()
        error = ((ours(x).float() - want).norm() / want.norm()).item()
    if not error < 0.03:
        raise RuntimeError(f"sparse_linear {m}x{n}x{k} {pattern} {dtype}: {error} away from bf16")
    calls: Calls = {"ours": lambda: ours(x), "int8": lambda: plain(x), "bf16": lambda: linear(x)}
    kept = (1 - share) * n * k
    return Case(calls, 2 * m * (n + k) + kept * (1 if dtype == torch.int8 else 2), 2 * m * kept)


def lowrank_conv(batch: int, c: int, side: int, n: int, r: int, dtype: torch.dtype) -> Case:
    """A 3x3 convolution through r channels."""
    down = torch.nn.Conv2d(c, r, 3, padding=1, bias=False, device="cuda")
    up = torch.nn.Conv2d(r, n, 1, device="cuda")
    ours = LowRankConv2d.from_factors(down, up, weight_dtype=dtype).eval()
    dense = torch.nn.Conv2d(c, n, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    dense = dense.to(memory_format=torch.channels_last)
    x = torch.randn(batch, c, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = up(down(x.float()))
        error = ((ours(x).float() - want).norm() / want.norm()).item()
    if not error < 0.03:
        raise RuntimeError(f"lowrank_conv2d {batch}x{c}x{side} r={r} {dtype}: {error} away from float")
    down, up = (layer.bfloat16().to(memory_format=torch.channels_last) for layer in (down, up))
    calls: Calls = {"ours": lambda: ours(x), "two bf16": lambda: up(down(x)), "bf16": lambda: dense(x)}
    pixels, weights = batch * side * side, r * (9 * c + n)
    size = 1 if dtype == torch.int8 else 2
    return Case(calls, 2 * pixels * (c + n) + weights * size, 2 * pixels * weights)


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and what makes each."""
    for m in ROWS:
        for dtype in (torch.float32, torch.int8):
            kind = "int8" if dtype == torch.int8 else "bf16"
            for n, k, r in ((4096, 4096, 128), (1024, 1024, 32)):
                name = f"lowrank_linear {kind} {m}x{n}x{k} r{r}"
                yield name, lambda m=m, n=n, k=k, r=r, dtype=dtype: lowrank(m, n, k, r, dtype)  # type: ignore[misc]
            for block in (64, 32, 16):
                for share in (0.8, 0.9):
                    name = f"sparse_linear {kind} {m}x4096x4096 {block}x{block} {share:.0%}"
                    yield (
                        name,
                        lambda m=m, b=block, s=share, dtype=dtype: sparse(m, 4096, 4096, b, dtype, s),  # type: ignore[misc]
                    )
    for dtype in (torch.float32, torch.int8):
        kind = "int8" if dtype == torch.int8 else "bf16"
        for batch, c, side, r in CONVOLUTIONS:
            name = f"lowrank_conv2d {kind} {batch}x{c}x{side}x{side} 3x3 r{r}"
            yield name, lambda b=batch, c=c, s=side, r=r, d=dtype: lowrank_conv(b, c, s, c, r, d)  # type: ignore[misc]
    for m in ROWS:
        yield f"lowrank_linear int8+r32 {m}x4096x4096", lambda m=m: corrected(m, 4096, 4096, 32)  # type: ignore[misc]

"""What a call of each module costs beside torch's layer, and what a second thread gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tautorch.nn import (
    Int8Conv2d,
    Int8Linear,
    LowRankConv2d,
    LowRankLinear,
    PackedModule,
    SparseConv2d,
    SparseLinear,
)
from tautorch.testing.bench import Table, on_threads, threads


def _mask(weight: Tensor) -> Tensor:
    """4x1 blocks, a fifth of them kept."""
    rows = weight.shape[0] // 4
    kept = torch.rand(rows, weight[0].numel(), generator=torch.Generator().manual_seed(1)) < 0.2
    return kept.repeat_interleave(4, 0).reshape(weight.shape)


LINEAR: dict[str, Callable[[nn.Linear], PackedModule]] = {
    "int8_linear": Int8Linear.from_float,
    "sparse_linear": lambda layer: SparseLinear.from_float(layer, mask=_mask(layer.weight)),
    "lowrank_linear": lambda layer: LowRankLinear.from_float(layer, rank=32, weight_dtype=torch.int8),
}
CONV: dict[str, Callable[[nn.Conv2d], PackedModule]] = {
    "int8_conv2d": Int8Conv2d.from_float,
    "sparse_conv2d": lambda layer: SparseConv2d.from_float(layer, mask=_mask(layer.weight)),
    "lowrank_conv2d": lambda layer: LowRankConv2d.from_float(layer, rank=32, weight_dtype=torch.int8),
}


def _float_layer(op: str, size: int, filter_size: int = 3) -> nn.Module:
    if op in LINEAR:
        return nn.Linear(size, size).eval()
    return nn.Conv2d(size, size, filter_size, padding=filter_size // 2).eval()


def _layer(op: str, layer: nn.Module) -> PackedModule:
    if isinstance(layer, nn.Linear):
        return LINEAR[op](layer)
    assert isinstance(layer, nn.Conv2d)
    return CONV[op](layer)


@pytest.mark.parametrize("op", [*LINEAR, *CONV])
def test_call(table: Table, op: str) -> None:
    """64 features or channels, one row or pixel: next to nothing to compute."""
    layer = _float_layer(op, 64, 1)
    ours, x = _layer(op, layer), torch.randn(1, 64) if op in LINEAR else torch.randn(1, 64, 1, 1)
    with torch.inference_mode():
        assert ours(x).shape == layer(x).shape
    peer = f"nn.{type(layer).__name__}"
    table.compare(op, "call, 64 -> 64, one row", lambda: ours(x), {peer: lambda: layer(x)},
                  target=(peer, 1.0), kernel=ours.kernel())  # fmt: skip


SIZES = {
    "linear": ((16, 512), (16, 1024), (128, 512), (128, 1024), (512, 1024)),
    "conv2d": ((7, 128), (14, 128), (28, 128), (56, 64)),
}


@pytest.mark.parametrize("op", [*LINEAR, *CONV])
def test_two_threads(table: Table, op: str) -> None:
    """The same bits, at least 1.8 times as fast wherever one thread takes 100 us or more."""
    for rows, size in SIZES[op.rpartition("_")[2]]:
        ours = _layer(op, _float_layer(op, size))
        x = torch.randn(rows, size) if op in LINEAR else torch.randn(1, size, rows, rows)
        one, two = (on_threads(n, lambda ours=ours, x=x: ours(x)) for n in (1, 2))  # type: ignore[misc]
        with torch.inference_mode(), threads(2):
            assert torch.equal(one(), two())
            times = table.in_turns({"one": one, "two": two}) if table.timed else {}
        if times:
            once, twice = times["one"], times["two"]
            gain = once / twice
            verdict = f">= 1.8x: {'met' if gain >= 1.8 else 'MISSED'}" if once >= 1e-4 else "one thread's"
            case = f"2 threads, {rows} rows of {size}" if op in LINEAR else f"2 threads, {size} x {rows}^2"
            table.add(op, case, one_us=round(once * 1e6), two_us=round(twice * 1e6), gain=round(gain, 2),
                      target=verdict, kernel=ours.kernel())  # fmt: skip

"""What ``tautorch bench`` runs: layers at a few shapes beside the float layers they stand for, and proofs.

A group is made once and used for every kernel. Its proof: the operator's int32 accumulators of int8 values
against a float64 product, which is exact; for low rank, whose inner product is quantised again, and for
weight-only layers, which have no accumulators, the output against the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tautorch import ops
from tautorch.nn import Int8Conv2d, Int8Linear, LowRankLinear, SparseLinear
from tautorch.prune import make_mask
from tautorch.reference.int8_conv2d import int8_conv2d as reference_conv
from tautorch.reference.int8_linear import int8_linear as reference_linear
from tautorch.reference.lowrank_linear import lowrank_linear as reference_lowrank
from tautorch.reference.sparse_linear import sparse_linear as reference_sparse
from tautorch.testing.cases import Case, conv_case, linear_case
from tautorch.testing.tolerances import assert_close

ROWS = (1, 16, 128)
SHAPES = ((1024, 4096), (4096, 4096), (768, 3072))  # inputs, outputs
SPARSITY, RANK = 0.8, 64

Proof = Callable[[], None]


@dataclass(frozen=True)
class Layer:
    """Ours beside the float one, at one input. `macs` are those that ours computes."""

    op: str
    name: str
    rows: int
    macs: int
    float_layer: nn.Module
    ours: nn.Module
    x: Tensor


@dataclass(frozen=True)
class Group:
    """Layers of one shape, which share weights and a proof."""

    layers: list[Layer]
    prove: Proof


def groups(quick: bool) -> Iterator[Group]:
    """One shape after the other, each made when it is asked for: all at once would take 300 MB."""
    torch.manual_seed(0)
    rows = (1, 16) if quick else ROWS
    for k, n in SHAPES[2:] if quick else SHAPES:
        yield dense(k, n, rows)
    yield weight_only(1024, 4096, rows)
    yield sparse(1024, 4096, rows, "4x1")
    yield sparse(1024, 4096, rows, "16x16")
    yield lowrank(768, 3072, rows)
    yield conv("conv 3x3", 256, 14, 1)
    yield conv("depthwise 3x3", 256, 28, 256)


def dense(k: int, n: int, rows: tuple[int, ...]) -> Group:
    float_layer = nn.Linear(k, n)
    ours = Int8Linear.from_float(float_layer)
    layers = [
        Layer("int8_linear", f"{k} x {n}", m, m * k * n, float_layer, ours, torch.randn(m, k)) for m in rows
    ]
    return Group(layers, exact(linear_case("int8_linear", rows[-1], n, k, mode="int8"), ops.int8_linear,
                               reference_linear, rows))  # fmt: skip


def weight_only(k: int, n: int, rows: tuple[int, ...]) -> Group:
    float_layer = nn.Linear(k, n)
    ours = Int8Linear.from_float(float_layer, quant="weight_only")
    name = f"{k} x {n}, weight-only"
    layers = [Layer("int8_linear", name, m, m * k * n, float_layer, ours, torch.randn(m, k)) for m in rows]
    case = linear_case("int8_linear", rows[-1], n, k, mode="weight_only")
    return Group(layers, close(case, ops.int8_linear, reference_linear))


def sparse(k: int, n: int, rows: tuple[int, ...], pattern: str) -> Group:
    float_layer = nn.Linear(k, n)
    mask = make_mask(torch.rand(n, k), pattern, SPARSITY)
    ours = SparseLinear.from_float(float_layer, pattern=pattern, mask=mask)
    macs, name = int(mask.sum()), f"{k} x {n}, {pattern} {SPARSITY:.0%}"
    layers = [Layer("sparse_linear", name, m, m * macs, float_layer, ours, torch.randn(m, k)) for m in rows]
    case = linear_case("sparse_linear", rows[-1], n, k, mode="int8", pattern=pattern, keep=1 - SPARSITY)
    return Group(layers, exact(case, ops.sparse_linear, reference_sparse, rows))


def lowrank(k: int, n: int, rows: tuple[int, ...]) -> Group:
    float_layer = nn.Linear(k, n)
    ours = LowRankLinear.from_float(float_layer, rank=RANK, weight_dtype=torch.int8)
    macs, name = RANK * (k + n), f"{k} x {n}, rank {RANK}"
    layers = [Layer("lowrank_linear", name, m, m * macs, float_layer, ours, torch.randn(m, k)) for m in rows]
    case = linear_case("lowrank_linear", rows[-1], n, k, mode="int8", rank=RANK)
    return Group(layers, close(case, ops.lowrank_linear, reference_lowrank))


def conv(name: str, channels: int, side: int, groups: int) -> Group:
    float_layer = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
    float_layer.weight.data = float_layer.weight.data.contiguous(memory_format=torch.channels_last)
    ours = Int8Conv2d.from_float(float_layer)
    x = torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = (channels, channels // groups, 3, 3)
    macs = side * side * channels * channels // groups * 9
    case = conv_case("int8_conv2d", (1, channels, side, side), weight, mode="int8", groups=groups, padding=1)
    prove = exact(case, ops.int8_conv2d, reference_conv, ())
    label = f"{name}, {channels} at {side} x {side}"
    return Group([Layer("int8_conv2d", label, 1, macs, float_layer, ours, x)], prove)


def close(case: Case, op: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Proof:
    """A proof that `op` gives the reference's output to within rounding."""
    expected, size = case(reference), case.magnitude(reference)

    def prove() -> None:
        assert_close(case(op), expected, magnitude=size)

    return prove


def exact(
    case: Case, op: Callable[..., Tensor], reference: Callable[..., Tensor], rows: tuple[int, ...]
) -> Proof:
    """A proof that `op` gives the reference's accumulators, for as many rows of x as each layer has."""
    raw = case.raw()
    expected = raw(reference)

    def prove() -> None:
        for m in rows or (raw.x.shape[0],):
            got = raw.with_x(raw.x[:m])(op)
            if not torch.equal(got, expected[:m]):
                wrong = int((got != expected[:m]).sum())
                raise AssertionError(
                    f"{wrong} of {got.numel()} accumulators are wrong, {case.label}, {m} rows"
                )

    return prove

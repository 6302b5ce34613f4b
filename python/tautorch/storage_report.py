"""What each stage of Deep Compression makes of a model's bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tautorch.coding.positions import plain_gap_bytes
from tautorch.storage_coded import pack


@dataclass(frozen=True)
class TensorSize:
    """The bytes of one tensor after each stage; `distinct` counts its values, zero included.

    `negative_zeros`: zeros with a sign, as `weight * mask` leaves them. Kept bit for bit, each costs about a
    bit; `weight + 0.0` is without them.
    """

    name: str
    shape: tuple[int, ...]
    nonzero: int
    distinct: int
    negative_zeros: int
    dense: int
    pruned: int
    clustered: int
    coded: int


@dataclass(frozen=True)
class SizeReport:
    """`tensors`, their sums, and `file`: the bytes of the whole entropy-coded file with all its headers."""

    tensors: tuple[TensorSize, ...]
    dense: int
    pruned: int
    clustered: int
    coded: int
    file: int

    @property
    def ratio(self) -> float:
        """How many times smaller than the dense tensors the whole file is."""
        return self.dense / self.file

    def __str__(self) -> str:
        head = ("tensor", "nonzero", "distinct", "dense", "pruned", "clustered", "coded")
        rows: list[tuple[str, ...]] = [head]
        for t in self.tensors:
            share = f"{t.nonzero / max(1, math.prod(t.shape)):.1%}"
            sizes = (t.dense, t.pruned, t.clustered, t.coded)
            rows.append((t.name, share, f"{t.distinct:,}", *(f"{n:,}" for n in sizes)))
        sums = (self.dense, self.pruned, self.clustered, self.coded)
        rows.append(("all tensors, bytes", "", "", *(f"{n:,}" for n in sums)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        lines.append(f"file with all headers: {self.file:,} bytes, {self.ratio:.1f}x smaller")
        if signs := sum(t.negative_zeros for t in self.tensors):
            lines.append(f"{signs:,} zeros have a minus sign, about a bit each: weight + 0.0 removes it")
        return "\n".join(lines)


def measure(tensors: dict[str, Tensor], document: dict[str, Any]) -> SizeReport:
    """The report of a file's content."""
    data, coded = pack(tensors, document)
    rows = tuple(_row(name, value, coded[name]) for name, value in tensors.items())
    return SizeReport(
        rows,
        dense=sum(row.dense for row in rows),
        pruned=sum(row.pruned for row in rows),
        clustered=sum(row.clustered for row in rows),
        coded=sum(row.coded for row in rows),
        file=len(data),
    )


def _row(name: str, value: Tensor, coded: int) -> TensorSize:
    plain = value.reshape(1, -1)
    mask = (plain != 0).to(torch.uint8).numpy()
    distinct = int(torch.unique(plain).numel()) if plain.numel() else 0
    nonzero, dense, bits = int(mask.sum()), value.nbytes, 8 * value.itemsize
    pruned = min(dense, plain_gap_bytes(mask, bits))
    # The table holds every distinct value; an index must tell them apart, of those kept where zeros are not.
    table, kept = distinct * value.itemsize, max(2, distinct - (nonzero < plain.numel()))
    every = table + math.ceil(plain.numel() * math.ceil(math.log2(max(2, distinct))) / 8)
    sparse = table + plain_gap_bytes(mask, math.ceil(math.log2(kept)))
    signs = int(((plain == 0) & plain.signbit()).sum()) if value.is_floating_point() else 0
    return TensorSize(
        name,
        tuple(value.shape),
        nonzero=nonzero,
        distinct=distinct,
        negative_zeros=signs,
        dense=dense,
        pruned=pruned,
        clustered=min(pruned, every, sparse),
        coded=coded,
    )

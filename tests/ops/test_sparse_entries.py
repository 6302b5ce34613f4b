"""Packs list the entries of a canonical layout, and give the layout back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.ops import sparse_entries as sparse
from tautorch.reference.layouts import PATTERNS, decode, encode
from tautorch.testing.values import float_values, int8_values, sparse_mask

KERNELS = [
    row.name
    for row in dispatch.kernels("sparse_linear")
    if row.device == "cpu"
    and row.name != "reference"
    and row.supports(dispatch.Problem("sparse_linear")) is None
]
SHAPES = [
    ((1, 1), 1),
    ((5, 7), 1),
    ((64, 64), 1),
    ((66, 130), 1),
    ((70, 9), 1),
    ((12, 5), 2),
    ((18, 3, 3, 3), 1),
    ((18, 3, 3, 3), 3),
    ((132, 20, 3, 2), 2),
]
SPARSE = [p for p in PATTERNS if p != "2:4"]


def layout(
    shape: tuple[int, ...], groups: int, pattern: str, dtype: torch.dtype, keep: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A layout without stored zeros, which a weight packed dense could not tell from others."""
    weight = int8_values(shape, seed=1) if dtype == torch.int8 else float_values(shape, seed=1)
    weight = torch.where(weight == 0, torch.ones_like(weight), weight)
    mask = sparse_mask(shape, pattern, keep, groups=groups, seed=2)
    return encode(weight * mask, None if pattern == "2:4" else mask, pattern, groups)


@pytest.mark.parametrize("pattern", SPARSE)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_entries_are_the_weight(shape: tuple[int, ...], groups: int, pattern: str) -> None:
    """Read as the kernel's contract says: groups of gs outputs, inputs in (tap, channel) order."""
    where = (pattern, shape, groups)
    tensors = layout(shape, groups, pattern, torch.int8, 0.5)
    values, crow, col = tensors
    assert crow is not None
    e = sparse.to_entries(values, crow, col, *where)
    n, k, taps = shape[0] // groups, shape[1], math.prod(shape[2:])
    bands = -(-n // e.gs)
    assert e.gs == (1 if pattern == "unstructured" else 4)
    assert e.start.shape == (groups * bands + 1,) and e.values.shape == (e.index.shape[0], e.gs)
    dense = torch.zeros(groups, bands * e.gs, taps, k, dtype=torch.int8)
    start = e.start.tolist()
    for band in range(groups * bands):
        indices = e.index[start[band] : start[band + 1]].tolist()
        assert indices == sorted(set(indices))
        for entry, index in zip(range(start[band], start[band + 1]), indices, strict=True):
            row = band % bands * e.gs
            dense[band // bands, row : row + e.gs, index // k, index % k] = e.values[entry]
    assert not bool(dense[:, n:].any())
    weight = dense[:, :n].transpose(2, 3).reshape(shape)
    assert torch.equal(weight, decode(*tensors, *where))


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_packs_give_the_layout_back(
    shape: tuple[int, ...], groups: int, pattern: str, dtype: torch.dtype, keep: float
) -> None:
    where = (pattern, shape, groups)
    tensors = layout(shape, groups, pattern, dtype, keep)
    dense = decode(*tensors, *where)
    if sparse.packs_dense(pattern, shape):
        assert sparse.dense_keeps_indices(*tensors, *where)
    for kernel in KERNELS:
        packed = sparse.pack(*tensors, *where, kernel=kernel, op="test")
        packed = sparse.repack(packed, KERNELS[0], *where, op="test")
        assert torch.equal(sparse.unpack_dense(packed, shape), dense)
        for got, given in zip(sparse.unpack(packed, *where), tensors, strict=True):
            if given is None:
                assert got is None
            else:
                assert got is not None and got.dtype == given.dtype and torch.equal(got, given)


@pytest.mark.parametrize("pattern", SPARSE)
def test_stored_zeros_are_entries(pattern: str) -> None:
    shape = (37, 70)
    mask = sparse_mask(shape, pattern, 0.5, seed=2)
    tensors = encode(torch.zeros(shape, dtype=torch.int8), mask, pattern)
    packed = sparse.pack(*tensors, pattern, shape, kernel=KERNELS[0], op="test")
    for got, given in zip(sparse.unpack(packed, pattern, shape), tensors, strict=True):
        assert got is not None and given is not None and torch.equal(got, given)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_values_at_the_places_of_a_layout(shape: tuple[int, ...], groups: int, pattern: str) -> None:
    values, crow, col = layout(shape, groups, pattern, torch.float32, 0.5)
    dense = decode(values, crow, col, pattern, shape, groups)
    assert torch.equal(sparse.values_at(dense, crow, col, pattern, groups), values)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stored_zeros_are_told_from_a_dense_pack(pattern: str) -> None:
    shape = (6, 16)
    values, crow, col = layout(shape, 1, pattern, torch.int8, 1.0)
    values = values.clone()
    values.view(-1)[: values.numel() // 2] = 0
    assert not sparse.dense_keeps_indices(values, crow, col, pattern, shape) or pattern in (
        "16x16",
        "32x32",
        "64x64",
    )


def test_a_bad_layout_is_not_packed() -> None:
    values, crow, col = layout((8, 8), 1, "4x1", torch.int8, 1.0)
    bad = col.clone()
    bad[-1] = 8
    with pytest.raises(ValueError, match=r"test: col_indices must be in 0\.\.7, got 8"):
        sparse.pack(values, crow, bad, "4x1", (8, 8), kernel=KERNELS[0], op="test")

"""Sparse weights between their two forms: the canonical layout of ``reference/layouts`` and CPU packs.

A pack lists *entries*: the kept inputs of each sparse group, ``gs`` adjacent outputs (1 for unstructured, 4
otherwise; a BxB block becomes B/4 groups of 4 outputs). Inputs are numbered ``tap * k + channel``, ascending
in each group, while a canonical column is ``channel * taps + tap``; the same for linear layers (one tap).

A pack is self-contained: ``unpack`` restores the canonical tensors. The exception are weights packed dense
(``packs_dense``) whose indices store explicit zeros; ``dense_keeps_indices`` tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tautorch import _C
from tautorch.reference.layouts import (
    block_cols,
    block_row_indices,
    block_rows,
    block_shape,
    check_layout,
    decode,
    encode,
    index_dtype,
    unpack_positions,
)

from . import library as lib
from . import packing

LISTS, SELL, BOTH, CELLS, IMAGE = 1, 2, 3, 4, 5
"""Forms of a sparse int8 pack besides 0, which keeps what runs fastest; see sell.h and cells.h."""

MAX_INPUTS = 65_536
"""Inputs (taps * channels) that the uint16 indices of a pack can name."""


@dataclass(frozen=True)
class Entries:
    """What ``_C.sparse_pack`` takes; the unsigned types of the contract are held as signed bits.

    ``start`` int32 ``[sparse_groups + 1]``, ``index`` int16 ``[entries]``, ``values`` int8 or float32
    ``[entries, gs]``.
    """

    gs: int
    start: Tensor
    index: Tensor
    values: Tensor


def group_size(pattern: str) -> int:
    """Outputs of one sparse group."""
    return 1 if pattern == "unstructured" else 4


def packs_dense(pattern: str, shape: Sequence[int]) -> bool:
    """Whether a weight goes into its pack expanded, without indices: 2:4, and wide ones."""
    return pattern == "2:4" or math.prod(shape[1:]) > MAX_INPUTS


def _geometry(shape: Sequence[int], groups: int) -> tuple[int, int, int]:
    """``(n, k, taps)`` of one convolution group."""
    return shape[0] // groups, shape[1], math.prod(shape[2:])


def _expand(
    values: Tensor, counts: Tensor, col: Tensor, size: int, rows: tuple[int, int], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """BxB blocks as 4x1 ones: ``(values [e, 4], counts [sparse groups], col [e])``, columns ascending.

    ``rows`` is (convolution groups, outputs of each), ``counts`` int64 ``[block rows]``.
    """
    groups, n = rows
    bands, blocks = size // 4, col.shape[0]
    row_of = torch.repeat_interleave(counts)
    first = (torch.cumsum(counts, 0) - counts)[row_of]
    # Band b of the block at place i of its row goes to place i of band b of that row.
    place = first * (bands - 1) + torch.arange(blocks, device=col.device)
    target = place[:, None] + torch.arange(bands, device=col.device) * counts[row_of][:, None]
    source = torch.empty(blocks * bands, dtype=torch.int64, device=col.device)
    source[target.reshape(-1)] = torch.arange(blocks * bands, device=col.device)
    bits = values.reshape(blocks, bands, 4, size).transpose(2, 3).reshape(blocks * bands, size, 4)
    out = bits[source]
    block_of = source // bands
    cols = (col.long()[block_of] * size)[:, None] + torch.arange(size, device=col.device)
    band_counts = counts[:, None].expand(-1, bands)
    width = torch.full((blocks,), size, dtype=torch.int64, device=col.device)
    if k % size:
        width[col.long() == k // size] = k % size
    sums = torch.zeros_like(counts).index_add_(0, row_of, width)[:, None].expand(-1, bands)
    real = -(-n // 4)  # bands of a convolution group that hold outputs
    in_group = -(-n // size) * bands
    if real != in_group:
        kept = (torch.arange(in_group, device=col.device) < real).repeat(groups)
        stored = kept.repeat_interleave(band_counts.reshape(-1))
        out, cols = out[stored], cols[stored]
        sums = sums.reshape(-1)[kept]
    out, cols, sums = out.reshape(-1, 4), cols.reshape(-1), sums.reshape(-1)
    if k % size:
        inside = cols < k
        out, cols = out[inside], cols[inside]
    return out, sums, cols


def to_entries(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern: str,
    shape: Sequence[int],
    groups: int = 1,
) -> Entries:
    """Entries of a canonical layout that ``check_layout`` has passed; not for ``packs_dense``."""
    n, k, taps = _geometry(shape, groups)
    size = block_shape(pattern)[1]
    counts = crow_indices[1:].long() - crow_indices[:-1].long()
    if size > 1:
        values, counts, cols = _expand(values, counts, col_indices, size, (groups, n), k * taps)
    else:
        values, cols = values.reshape(-1, group_size(pattern)), col_indices
    if taps > 1:
        index = cols.long() % taps * k + cols.long() // taps
        group = torch.repeat_interleave(counts)
        order = torch.argsort(group * (k * taps) + index)
        values, cols = values[order], index[order]
    start = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=values.device)
    torch.cumsum(counts, 0, out=start[1:])
    # int16 of the same bits as uint16
    index = cols if cols.dtype == torch.int16 else cols.to(torch.int32).to(torch.int16)
    return Entries(group_size(pattern), start, index.contiguous(), values.contiguous())


def from_entries(
    entries: Entries, pattern: str, shape: Sequence[int], groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of ``to_entries``: ``(values, crow_indices, col_indices)``."""
    n, k, taps = _geometry(shape, groups)
    size, gs = block_shape(pattern)[1], entries.gs
    counts = (entries.start[1:] - entries.start[:-1]).long()
    values, cols = entries.values, entries.index.int() & 0xFFFF
    if taps > 1:
        wide = cols.long()
        wide = wide % k * taps + wide // k
        group = torch.repeat_interleave(counts)
        order = torch.argsort(group * (k * taps) + wide)
        values, cols = values[order], wide[order]
    if size == 1:
        values = values.reshape(-1) if gs == 1 else values.reshape(-1, gs, 1)
    else:
        values, counts, cols = _collect(values, counts, cols.long(), size, (groups, n))
    crow = torch.zeros(counts.shape[0] + 1, dtype=index_dtype(cols.shape[0]), device=counts.device)
    torch.cumsum(counts, 0, out=crow[1:])
    return values, crow, cols.to(index_dtype(block_cols(k * taps, pattern) - 1))


def _collect(
    values: Tensor, counts: Tensor, cols: Tensor, size: int, rows: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of ``_expand``: ``(values [nblk, B, B], counts [block rows], col [nblk] of blocks)``."""
    groups, n = rows
    bands = size // 4
    real = -(-n // 4)
    each = torch.arange(groups * real, device=counts.device)
    local = each % real
    row = each // real * -(-n // size) + local // bands  # block row of a sparse group
    begins = cols % size == 0  # every stored block has its first column
    group = torch.repeat_interleave(counts)
    blocks_of = torch.zeros_like(counts).index_add_(0, group, begins.long())
    leads = local % bands == 0
    row_counts = blocks_of[leads]
    first = torch.cumsum(row_counts, 0) - row_counts  # first block of each block row
    before = torch.cumsum(blocks_of, 0) - blocks_of
    block = torch.cumsum(begins, 0) - 1 + (first[row] - before)[group]
    out = values.new_zeros(int(row_counts.sum()), bands, size, 4)
    out[block, (local % bands)[group], cols % size] = values
    block_values = out.transpose(2, 3).reshape(-1, size, size)
    return block_values, row_counts, (cols // size)[begins & leads[group]]


# ---- packs ----------------------------------------------------------------------------------------------


def pack(
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    pattern: str,
    shape: Sequence[int],
    groups: int = 1,
    *,
    kernel: str,
    op: str,
    as_float: bool = False,
    form: int = 0,
) -> Tensor:
    """Pack a canonical layout for a CPU kernel.

    Args:
        values, crow_indices, col_indices, pattern, shape, groups: see ``reference/layouts``; checked.
        kernel: the kernel's name.
        op: the name that errors begin with.
        as_float: pack int8 values as fp32, for float activations.
        form: of int8 values: ``LISTS``, ``SELL`` (where the kernel has it), ``BOTH``, ``CELLS`` (where the
            blocks are whole), or 0: those that some number of rows runs fastest with, and for a convolution
            (``IMAGE``) those that an NCHW image does.

    Returns:
        uint8 ``[bytes]``, self-describing.

    Raises:
        TypeError, ValueError: what is given is no canonical layout of such a weight.
    """
    check_layout(values, crow_indices, col_indices, pattern, shape, groups, op=op)
    values = values.detach()
    if values.dtype != torch.int8 or as_float:
        values = values.to(torch.float32)
    if crow_indices is None or packs_dense(pattern, shape):
        dense = decode(values, crow_indices, col_indices, pattern, shape, groups, check=False, op=op)
        return _dense_pack(dense, groups, kernel, pattern)
    n, k, taps = _geometry(shape, groups)
    e = to_entries(values, crow_indices, col_indices, pattern, shape, groups)
    kind = packing.SPARSE_I8 if values.dtype == torch.int8 else packing.SPARSE_F32
    what = (kernel, kind, e.gs, groups, n, k, taps, e.start.shape[0] - 1)
    if form == 0 and len(shape) == 4:
        form = IMAGE
    out = packing.pack_buffer(_C.sparse_pack_bytes(*what, e.start.data_ptr(), e.index.data_ptr(), form))
    _C.sparse_pack(*what, e.start.data_ptr(), e.index.data_ptr(), e.values.data_ptr(), form, out.data_ptr())
    return out


def _dense_pack(dense: Tensor, groups: int, kernel: str, pattern: str) -> Tensor:
    n, k, taps = _geometry(dense.shape, groups)
    kind = packing.DENSE_I8 if dense.dtype == torch.int8 else packing.DENSE_F32
    if kind == packing.DENSE_I8 and pattern == "2:4" and dense.dim() == 2 and _C.pairs_pay(kernel, n, k):
        kind = packing.PAIRS_I8
    return packing.dense_pack(kernel, kind, dense, groups, n, k, taps, (k * taps, taps, 1))


def dense_keeps_indices(
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    pattern: str,
    shape: Sequence[int],
    groups: int = 1,
) -> bool:
    """Whether a dense pack gives these very indices back: they store no zeros but the usual fillers."""
    if pattern == "2:4":
        # encode() fills a group up at its lowest free places.
        places = unpack_positions(col_indices).reshape(-1, 2)
        kept = values.reshape(-1, 2) != 0
        usual = (places[:, 0] == 0) & (kept[:, 1] | (places[:, 1] == 1))
        return bool((usual | kept[:, 0] & kept[:, 1]).all())
    dense = decode(values, crow_indices, col_indices, pattern, shape, groups, check=False)
    _, crow, col = encode(dense, None, pattern, groups)
    same_crow = crow is crow_indices or (
        crow is not None and crow_indices is not None and torch.equal(crow.long(), crow_indices.long())
    )
    return same_crow and col.shape == col_indices.shape and torch.equal(col.long(), col_indices.long())


def values_at(
    dense: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    pattern: str,
    groups: int = 1,
) -> Tensor:
    """The ``values`` that a dense weight has at the places of a layout."""
    matrix = dense.reshape(dense.shape[0], -1)
    n, k = matrix.shape
    if crow_indices is None:
        padded = torch.nn.functional.pad(matrix, (0, -k % 8)).reshape(n, -1, 4)
        places = unpack_positions(col_indices).reshape(n, -1, 2).long()
        return padded.gather(2, places).reshape(n, -1)
    height, width = block_shape(pattern)
    rows = block_row_indices(crow_indices)
    in_group = block_rows(n // groups, pattern)
    # Outputs and inputs of each block; those beyond the matrix are 0.
    local = (rows % in_group * height)[:, None] + torch.arange(height, device=rows.device)
    row = ((rows // in_group * (n // groups))[:, None] + local)[:, :, None]
    col = (col_indices.long() * width)[:, None, None] + torch.arange(width, device=col_indices.device)
    inside = (local < n // groups)[:, :, None] & (col < k)
    values = matrix[row.clamp(max=n - 1), col.clamp(max=k - 1)] * inside
    return values.reshape(-1) if pattern == "unstructured" else values


def read_entries(packed: Tensor) -> Entries:
    """Entries of a sparse pack."""
    info = packing.pack_info(packed)
    gs = int(info["gs"])
    sparse_groups = int(info["groups"]) * -(-int(info["n"]) // gs)
    total = _C.sparse_unpack(packed.data_ptr(), packed.numel(), 0, 0, 0)
    dtype = torch.float32 if info["kind"] == packing.SPARSE_F32 else torch.int8
    start = packing.with_memory(torch.empty(sparse_groups + 1, dtype=torch.int32, device="cpu"))
    index = torch.empty(total, dtype=torch.int16, device="cpu")
    values = torch.empty(total, gs, dtype=dtype, device="cpu")
    where = (start.data_ptr(), index.data_ptr(), values.data_ptr())
    _C.sparse_unpack(packed.data_ptr(), packed.numel(), *where)
    return Entries(gs, start, index, values)


def unpack(
    packed: Tensor, pattern: str, shape: Sequence[int], groups: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(values, crow_indices, col_indices)`` of a pack of a weight of ``shape``."""
    if packs_dense(pattern, shape):
        return encode(unpack_dense(packed, shape), None, pattern, groups)
    return from_entries(read_entries(packed), pattern, shape, groups)


def unpack_dense(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of ``shape`` that a pack holds, int8 or fp32, 0 where nothing is stored."""
    info = packing.pack_info(packed)
    n, k, taps = int(info["n"]), int(info["k"]), int(info["taps"])
    groups = int(info["groups"])
    if info["kind"] not in (packing.SPARSE_I8, packing.SPARSE_F32):
        packing.check_pack("unpack", "weight", packed, shape[0], math.prod(shape))
        dtype = torch.float32 if info["kind"] == packing.DENSE_F32 else torch.int8
        dense = packing.with_memory(torch.empty(tuple(shape), dtype=dtype, device="cpu"))
        _C.dense_unpack(packed.data_ptr(), packed.numel(), dense.data_ptr(), k * taps, taps, 1)
        return dense
    e = read_entries(packed)
    per_group = -(-n // e.gs)
    out = e.values.new_zeros(groups * per_group, e.gs, taps * k)
    group = torch.repeat_interleave((e.start[1:] - e.start[:-1]).long())
    out.transpose(1, 2)[group, (e.index.int() & 0xFFFF).long()] = e.values
    weight = out.reshape(groups, per_group * e.gs, taps, k)[:, :n].transpose(2, 3)
    return weight.reshape(tuple(shape)).contiguous()


def repack(
    packed: Tensor, kernel: str, pattern: str, shape: Sequence[int], groups: int, *, op: str
) -> Tensor:
    """The same weight packed for another kernel."""
    if packs_dense(pattern, shape):
        return _dense_pack(unpack_dense(packed, shape), groups, kernel, pattern)
    return pack(*unpack(packed, pattern, shape, groups), pattern, shape, groups, kernel=kernel, op=op)


# ---- graphs ---------------------------------------------------------------------------------------------

# The dense weight of a canonical layout, or of a pack (uint8 values, no indices), for backward graphs.
lib.LIB.define(
    "sparse_to_dense(Tensor values, Tensor? crow_indices, Tensor? col_indices, str pattern, "
    "SymInt[] shape, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _to_dense(
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    groups: int,
) -> Tensor:
    if values.dtype == torch.uint8 or col_indices is None:
        return unpack_dense(values, shape).to(torch.float32)
    return decode(values, crow_indices, col_indices, pattern, shape, groups).to(torch.float32)


def _to_dense_fake(
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    groups: int,
) -> Tensor:
    return values.new_empty(tuple(shape), dtype=torch.float32)


lib.LIB.impl("sparse_to_dense", _to_dense, "CPU")
lib.LIB.impl("sparse_to_dense", _to_dense, "CUDA")  # canonical alone: no pack gets there
torch.library.register_fake("tautorch::sparse_to_dense", _to_dense_fake, lib=lib.LIB)

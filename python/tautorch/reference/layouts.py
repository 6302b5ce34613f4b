"""Canonical sparse layouts: dense weight and mask <-> ``values``, ``crow_indices``, ``col_indices``.

A weight is seen as the matrix ``[N, K]``: ``weight.reshape(N, -1)``, so a convolution's ``[O, I/g, kh, kw]``
becomes ``[O, (I/g)*kh*kw]``. torch's CSR and BSR terms are used:

============== ======================= ============================= =================================
pattern        values                  crow_indices                  col_indices
============== ======================= ============================= =================================
unstructured   [nnz]                   [N + 1]                       [nnz], column
4x1            [nblk, 4, 1]            [rows + 1], rows of 4 outputs [nblk], column
BxB, B in      [nblk, B, B]            [rows + 1], rows of B outputs [nblk], column of blocks
16, 32, 64
2:4            [N, Kp/2]               None                          [N, Kp/8] uint8, 4 positions a byte
============== ======================= ============================= =================================

With ``groups`` the blocks of one group do not reach into the next: ``rows = groups * ceil((N/groups) / B)``.
Tail blocks are short: what lies beyond the matrix is stored as 0. ``Kp`` is K padded to a multiple of 8; a
2:4 position is the 2-bit place of a kept value in its group of 4, the first value in the byte's low bits, the
two positions of a group strictly ascending. Indices are int16 where the largest possible one fits, else
int32.

Semi-structured 2:4: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378.
Block patterns: Gray et al., "GPU Kernels for Block-Sparse Weights", 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PATTERNS: tuple[str, ...] = ("unstructured", "2:4", "4x1", "16x16", "32x32", "64x64")
_BLOCKS: dict[str, tuple[int, int]] = {
    "unstructured": (1, 1),
    "4x1": (4, 1),
    "16x16": (16, 16),
    "32x32": (32, 32),
    "64x64": (64, 64),
}
_INT16_MAX = 2**15 - 1
_OP = "sparse_layout"

# Place of the first and second kept value of a group of 4, by the group's mask bits (bit i: place i is kept).
# A group that keeps fewer than two stores a 0 at its lowest free place. -1: more than two kept.
_FIRST = [0, 0, 0, 0, 0, 0, 1, -1, 0, 0, 1, -1, 2, -1, -1, -1]
_SECOND = [1, 1, 1, 1, 2, 2, 2, -1, 3, 3, 3, -1, 3, -1, -1, -1]


def block_shape(pattern: str, *, op: str = _OP) -> tuple[int, int]:
    """Rows and columns of one block of ``pattern``; ``(1, 4)`` for ``"2:4"``. ValueError if unknown."""
    if pattern == "2:4":
        return 1, 4
    if pattern not in _BLOCKS:
        raise ValueError(f"{op}: pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    return _BLOCKS[pattern]


def matrix_shape(shape: Sequence[int], groups: int = 1, *, op: str = _OP) -> tuple[int, int]:
    """``(N, K)`` of a weight's shape: ``[N, K]`` or ``[O, I/g, kh, kw]``. ValueError if N % groups."""
    if len(shape) < 2:
        raise ValueError(f"{op}: weight must have 2 or more dimensions, got shape {tuple(shape)}")
    rows, cols = int(shape[0]), math.prod(int(s) for s in shape[1:])
    if groups < 1 or rows % groups:
        raise ValueError(f"{op}: groups must divide the {rows} outputs, got groups={groups}")
    return rows, cols


def block_rows(rows: int, pattern: str, groups: int = 1) -> int:
    """Number of block rows: ``groups * ceil((rows / groups) / B)``."""
    height = block_shape(pattern)[0]
    return groups * -(-(rows // groups) // height)


def block_cols(cols: int, pattern: str) -> int:
    """Number of block columns (for ``"2:4"``: groups of 4, K padded to a multiple of 8)."""
    if pattern == "2:4":
        return -(-cols // 8) * 2
    return -(-cols // block_shape(pattern)[1])


def index_dtype(largest: int) -> torch.dtype:
    """The smallest of int16 and int32 that holds ``largest``."""
    return torch.int16 if largest <= _INT16_MAX else torch.int32


def _blocked(matrix: Tensor, pattern: str, groups: int, fill: bool) -> Tensor:
    """``[block rows, B, block cols, C]``: view or padded copy of ``matrix`` [N, K]; padding is ``fill``."""
    height, width = block_shape(pattern)
    rows, cols = matrix.shape
    per_group = rows // groups
    pad_rows, pad_cols = -per_group % height, -cols % width
    if pad_rows or pad_cols:
        grouped = matrix.reshape(groups, per_group, cols)
        grouped = torch.nn.functional.pad(grouped, (0, pad_cols, 0, pad_rows), value=float(fill))
        matrix = grouped.reshape(groups * (per_group + pad_rows), cols + pad_cols)
    return matrix.reshape(matrix.shape[0] // height, height, matrix.shape[1] // width, width)


def _unblocked(blocks: Tensor, rows: int, cols: int, groups: int) -> Tensor:
    """Inverse of ``_blocked``: ``[block rows, B, block cols, C]`` -> ``[rows, cols]``."""
    full = blocks.reshape(groups, -1, blocks.shape[2] * blocks.shape[3])
    return full[:, : rows // groups, :cols].reshape(rows, cols).contiguous()


def _check_mask(weight: Tensor, mask: Tensor, rows: int, cols: int, op: str) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool (True = kept), got {mask.dtype}; use mask.bool()")
    if mask.shape != weight.shape and tuple(mask.shape) != (rows, cols):
        raise ValueError(
            f"{op}: mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    if mask.device != weight.device:
        raise ValueError(f"{op}: mask must be on {weight.device} as the weight is, got {mask.device}")
    return mask.reshape(rows, cols)


def _kept_blocks(matrix: Tensor, mask: Tensor | None, pattern: str, groups: int, op: str) -> Tensor:
    """Which blocks are kept, bool ``[block rows, block cols]``; ValueError where a block is kept in part."""
    if mask is None:
        return _any_in_block(_blocked(matrix != 0, pattern, groups, False))
    if pattern == "unstructured":
        return mask
    some = _any_in_block(_blocked(mask, pattern, groups, False))
    every = ~_any_in_block(_blocked(~mask, pattern, groups, False))
    bad = some & ~every
    if bool(bad.any()):
        row, col = (int(i) for i in bad.nonzero()[0])
        height, width = block_shape(pattern)
        per_group = matrix.shape[0] // groups
        rows_in_group = -(-per_group // height)
        first_row = row // rows_in_group * per_group + row % rows_in_group * height
        last_row = min(first_row + height, (row // rows_in_group + 1) * per_group) - 1
        last_col = min((col + 1) * width, matrix.shape[1]) - 1
        raise ValueError(
            f"{op}: mask must keep or drop each {pattern} block as a whole, got a mix in block "
            f"({row}, {col}): rows {first_row}..{last_row}, columns {col * width}..{last_col}; "
            f"prune with pattern={pattern!r}"
        )
    return some


def _any_in_block(blocks: Tensor) -> Tensor:
    """bool ``[R, B, C, D]`` -> ``[R, C]``: whether any element of a block is True."""
    # A loop of B ORs over whole rows is several times faster than a strided any() over two dimensions.
    rows = blocks[:, 0].clone() if blocks.shape[1] > 1 else blocks[:, 0]
    for i in range(1, blocks.shape[1]):
        rows |= blocks[:, i]
    return rows.any(-1) if rows.shape[-1] > 1 else rows[..., 0]


def _encode_2_4(matrix: Tensor, mask: Tensor | None, op: str) -> tuple[Tensor, Tensor]:
    rows, cols = matrix.shape
    kept = matrix != 0 if mask is None else mask
    pad = -cols % 8
    if pad:
        matrix = torch.nn.functional.pad(matrix, (0, pad))
        kept = torch.nn.functional.pad(kept, (0, pad))
    groups_of_4 = matrix.reshape(rows, -1, 4)
    bits = kept.reshape(rows, -1, 4).to(torch.uint8)
    code = bits[..., 0] | bits[..., 1] << 1 | bits[..., 2] << 2 | bits[..., 3] << 3
    table = torch.tensor([_FIRST, _SECOND], dtype=torch.int8, device=matrix.device)
    places = table.T[code.int()]  # [rows, groups, 2]
    bad = places[..., 0] < 0
    if bool(bad.any()):
        row, group = (int(i) for i in bad.nonzero()[0])
        what = "weight" if mask is None else "mask"
        raise ValueError(
            f"{op}: {what} must keep at most 2 of each 4 adjacent inputs, got "
            f"{int(bits[row, group].sum())} in block ({row}, {group}): "
            f"row {row}, columns {4 * group}..{min(4 * group + 4, cols) - 1}; "
            "prune with pattern='2:4'"
        )
    values = torch.gather(groups_of_4, 2, places.long())
    # A filler place holds 0 whatever the dense weight had there.
    values = values.masked_fill_(~torch.gather(kept.reshape(rows, -1, 4), 2, places.long()), 0)
    quads = places.to(torch.uint8).reshape(rows, -1, 4)
    packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return values.reshape(rows, -1), packed


def encode(
    weight: Tensor, mask: Tensor | None, pattern: str, groups: int = 1, *, op: str = _OP
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The canonical layout of ``weight`` where ``mask`` is True.

    Args:
        weight: ``[N, K]`` or ``[O, I/g, kh, kw]``, any dtype.
        mask: bool of the weight's shape (or its matrix form), True = kept. None keeps the weight's
            non-zeros: for block patterns every block that holds one.
        pattern: one of ``PATTERNS``.
        groups: the convolution's groups, which blocks do not cross.
        op: the name that errors begin with.

    Returns:
        ``(values, crow_indices, col_indices)``, values in the weight's dtype; crow_indices is None for
        ``"2:4"``.

    Raises:
        TypeError: the mask is not bool.
        ValueError: unknown pattern, another shape or device, or a mask off its pattern (the first offending
            block is named).
    """
    block_shape(pattern, op=op)
    rows, cols = matrix_shape(weight.shape, groups, op=op)
    matrix = weight.detach().reshape(rows, cols)
    if mask is not None:
        mask = _check_mask(weight, mask, rows, cols, op)
    if pattern == "2:4":
        values, positions = _encode_2_4(matrix, mask, op)
        return values, None, positions
    kept = _kept_blocks(matrix, mask, pattern, groups, op)
    counts = torch.zeros(kept.shape[0] + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(kept.sum(1), 0, out=counts[1:])
    col = torch.arange(kept.shape[1], dtype=index_dtype(kept.shape[1] - 1), device=weight.device)
    col_indices = col.expand(kept.shape)[kept]
    height, width = block_shape(pattern)
    if pattern == "unstructured":
        values = matrix[kept]
    else:
        values = _blocked(matrix, pattern, groups, False).transpose(1, 2)[kept].reshape(-1, height, width)
    return values, counts.to(index_dtype(col_indices.shape[0])), col_indices


def decode(
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    pattern: str,
    shape: Sequence[int],
    groups: int = 1,
    *,
    check: bool = True,
    op: str = _OP,
) -> Tensor:
    """The dense weight of ``shape`` (``[N, K]`` or ``[O, I/g, kh, kw]``) in the values' dtype, 0 where not
    stored.

    ``check=False`` skips ``check_layout`` where the layout is known to be good. Raises as ``check_layout``
    does.
    """
    if check:
        check_layout(values, crow_indices, col_indices, pattern, shape, groups, op=op)
    rows, cols = matrix_shape(shape, groups, op=op)
    n_rows, n_cols = block_rows(rows, pattern, groups), block_cols(cols, pattern)
    if pattern == "2:4":
        dense = values.new_zeros(rows, n_cols, 4)
        places = unpack_positions(col_indices).reshape(rows, n_cols, 2).long()
        dense.scatter_(2, places, values.reshape(rows, -1, 2))
        return dense.reshape(rows, -1)[:, :cols].reshape(tuple(shape)).contiguous()
    if crow_indices is None:
        raise TypeError(f"{op}: crow_indices must be a tensor for pattern {pattern!r}, got None")
    height, width = block_shape(pattern)
    flat = block_row_indices(crow_indices) * n_cols + col_indices.long()
    blocks = values.new_zeros(n_rows * n_cols, height * width)
    blocks[flat] = values.reshape(-1, height * width)
    grid = blocks.reshape(n_rows, n_cols, height, width).transpose(1, 2)
    return _unblocked(grid, rows, cols, groups).reshape(tuple(shape))


def block_row_indices(crow_indices: Tensor) -> Tensor:
    """int64 ``[nblk]``: the block row of each stored block."""
    counts = crow_indices[1:].long() - crow_indices[:-1].long()
    return torch.repeat_interleave(counts)


def unpack_positions(positions: Tensor) -> Tensor:
    """uint8 ``[N, Kp/8]`` of packed 2-bit places -> uint8 ``[N, Kp/2]``."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=positions.device)
    return (positions[..., None] >> shifts & 3).reshape(positions.shape[0], -1)


def check_layout(
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    pattern: str,
    shape: Sequence[int],
    groups: int = 1,
    *,
    op: str = _OP,
) -> None:
    """Prove that the three tensors are a canonical layout of a weight of ``shape``.

    Checked: dtypes (values int8, or a floating type, finite; indices int16 or int32, positions uint8),
    shapes, one device, crow from 0 to the number of blocks and never falling, columns in range and strictly
    ascending in each row, and zeros beyond the matrix in tail blocks.

    Raises:
        TypeError: a wrong dtype, or crow_indices missing or given where it should not be.
        ValueError: anything else, naming the first offender.
    """
    block_shape(pattern, op=op)
    rows, cols = matrix_shape(shape, groups, op=op)
    if values.dtype != torch.int8 and not values.dtype.is_floating_point:
        raise TypeError(f"{op}: values must be int8 or floating, got {values.dtype}")
    if values.dtype.is_floating_point and not bool(torch.isfinite(values).all()):
        raise ValueError(f"{op}: values must be finite, got NaN or Inf; repair the weight first")
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if tensor is not None and tensor.device != values.device:
            raise ValueError(f"{op}: {name} must be on {values.device} as values are, got {tensor.device}")
    if pattern == "2:4":
        _check_2_4(values, crow_indices, col_indices, rows, cols, op)
        return
    if crow_indices is None:
        raise TypeError(f"{op}: crow_indices must be a tensor for pattern {pattern!r}, got None")
    _check_compressed(values, crow_indices, col_indices, pattern, rows, cols, groups, op)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], op: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(tensor.shape)}")


def _check_2_4(
    values: Tensor, crow_indices: Tensor | None, positions: Tensor, rows: int, cols: int, op: str
) -> None:
    if crow_indices is not None:
        raise TypeError(f"{op}: crow_indices must be None for pattern '2:4', got a tensor")
    if positions.dtype != torch.uint8:
        raise TypeError(f"{op}: col_indices (2:4 positions) must be uint8, got {positions.dtype}")
    padded = -(-cols // 8) * 8
    _check_shape("values", values, (rows, padded // 2), op)
    _check_shape("col_indices", positions, (rows, padded // 8), op)
    places = unpack_positions(positions).reshape(rows, -1, 2)
    bad = places[..., 0] >= places[..., 1]
    if bool(bad.any()):
        row, group = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{op}: col_indices must give strictly ascending positions in each group, got "
            f"{places[row, group].tolist()} in block ({row}, {group})"
        )
    tail = cols // 4
    if cols != padded and values.numel():
        start = torch.arange(tail, padded // 4, device=values.device) * 4
        beyond = start[None, :, None] + places[:, tail:] >= cols
        _check_tail(beyond & (values.reshape(rows, -1, 2)[:, tail:] != 0), op)


def _check_tail(bad: Tensor, op: str) -> None:
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{op}: values must be 0 beyond the weight's last row and column, got a non-zero at "
            f"tail block element {first}"
        )


def _check_compressed(
    values: Tensor, crow: Tensor, col: Tensor, pattern: str, rows: int, cols: int, groups: int, op: str
) -> None:
    for name, tensor in (("crow_indices", crow), ("col_indices", col)):
        if tensor.dtype not in (torch.int16, torch.int32):
            raise TypeError(f"{op}: {name} must be int16 or int32, got {tensor.dtype}")
    n_rows, n_cols = block_rows(rows, pattern, groups), block_cols(cols, pattern)
    height, width = block_shape(pattern)
    _check_shape("crow_indices", crow, (n_rows + 1,), op)
    blocks = int(col.shape[0]) if col.dim() else -1
    _check_shape("col_indices", col, (blocks,), op)
    _check_shape("values", values, (blocks,) if pattern == "unstructured" else (blocks, height, width), op)
    steps = crow[1:].long() - crow[:-1].long()
    if int(crow[0]) != 0 or int(crow[-1]) != blocks:
        raise ValueError(
            f"{op}: crow_indices must run from 0 to {blocks}, the number of col_indices, got "
            f"{int(crow[0])} to {int(crow[-1])}"
        )
    if n_rows and int(steps.min()) < 0:
        row = int((steps < 0).nonzero()[0])
        raise ValueError(f"{op}: crow_indices must never fall, got a fall after row {row}")
    if not blocks:
        return
    low, high = (int(i) for i in torch.aminmax(col))
    if low < 0 or high >= n_cols:
        raise ValueError(f"{op}: col_indices must be in 0..{n_cols - 1}, got {low if low < 0 else high}")
    row_of = block_row_indices(crow)
    order = row_of * n_cols + col.long()
    bad = order[1:] <= order[:-1]
    if bool(bad.any()):
        at = int(bad.nonzero()[0]) + 1
        raise ValueError(
            f"{op}: col_indices must ascend strictly in each row, got {int(col[at - 1])} then {int(col[at])} "
            f"in row {int(row_of[at])}"
        )
    per_group = rows // groups
    if per_group % height:
        in_group = -(-per_group // height)
        last = row_of % in_group == in_group - 1
        _check_tail(values[last][:, per_group % height :] != 0, op)
    if cols % width:
        _check_tail(values[col.long() == n_cols - 1][:, :, cols % width :] != 0, op)

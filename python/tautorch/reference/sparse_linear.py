"""Reference of ``sparse_linear``: the layout is decoded, or its stored entries are summed one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import Epilogue, check_float, check_input, stored_product
from .int8_linear import int8_linear
from .layouts import block_cols, block_row_indices, block_rows, block_shape, decode, unpack_positions

_OP = "sparse_linear"


def sparse_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None = None,
    *,
    pattern: str,
    out_features: int,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_only: bool = False,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Linear layer with a sparse weight ``[out_features, K]``, K from x.

    Args:
        x: ``[..., K]``, as for ``int8_linear``; float for float values.
        values, crow_indices, col_indices: the layout of ``layouts``, values int8 or floating.
        weight_scale: fp32 ``[out_features]`` for int8 values, None for float ones.
        pattern: "unstructured", "2:4", "4x1", "16x16", "32x32" or "64x64".
        out_features: N.

    The other arguments, the result and the errors are those of ``int8_linear``. A weight that is not stored
    takes no part: in float products an Inf or NaN of a dropped input does not reach the output.
    (A kernel that expands the layout multiplies it by 0, and gives NaN.)
    """
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., K], got a 0-dimensional tensor")
    k = x.shape[-1]
    shape = (out_features, k)
    if (values.dtype == torch.int8) != (weight_scale is not None):
        raise ValueError(f"{_OP}: weight_scale must be given for int8 values and only there")
    integer = weight_scale is not None and not weight_only
    epilogue = Epilogue(bias, activation, out_scale, out_zero_point, out_dtype)
    epilogue.check(_OP, raw=integer)
    if weight_scale is not None and integer:
        check_input(_OP, x, x_scale, x_zero_point)
        return int8_linear(
            x,
            decode(values, crow_indices, col_indices, pattern, shape, op=_OP),
            weight_scale,
            bias,
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            activation=activation,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
            out_dtype=out_dtype,
        )
    check_float(_OP, x, "float products")
    rows = x.reshape(x.shape[:-1].numel(), k)
    y = float_product(rows, values, crow_indices, col_indices, pattern, shape, op=_OP).to(torch.float32)
    if weight_scale is not None:
        y = y * weight_scale
    return epilogue.finish(y, x.dtype, channel=1).reshape(*x.shape[:-1], out_features)


def float_product(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    pattern: str,
    shape: Sequence[int],
    groups: int = 1,
    *,
    op: str = _OP,
) -> Tensor:
    """float64 ``[M, N]``: ``x`` ``[M, K]`` times the stored entries of a weight of ``shape``."""
    dense = decode(values, crow_indices, col_indices, pattern, shape, groups, op=op)
    matrix = dense.reshape(dense.shape[0], -1).double()
    y = x.double() @ matrix.T
    spoiled = ~torch.isfinite(x).all(-1)
    if bool(spoiled.any()):
        entries, rows, cols = stored_entries(values, crow_indices, col_indices, pattern, matrix.shape, groups)
        y[spoiled] = stored_product(x[spoiled], entries, rows, cols, matrix.shape[0])
    return y


def stored_entries(
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    pattern: str,
    shape: Sequence[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, rows, cols)`` of every stored entry, zeros too, inside the matrix ``shape`` [N, K]."""
    n, k = int(shape[0]), int(shape[1])
    height, width = block_shape(pattern)
    if crow_indices is None:
        positions = unpack_positions(col_indices).long()
        group = torch.arange(block_cols(k, pattern), device=values.device).repeat_interleave(2)
        cols = group * 4 + positions
        rows = torch.arange(n, device=values.device)[:, None].expand(cols.shape)
        inside = cols < k
        return values[inside], rows[inside], cols[inside]
    block_row = block_row_indices(crow_indices)
    in_group = block_rows(n, pattern, groups) // groups
    per_group = n // groups
    local = (block_row % in_group * height)[:, None, None] + torch.arange(height, device=values.device)[
        :, None
    ]
    rows = block_row[:, None, None] // in_group * per_group + local
    cols = (col_indices.long() * width)[:, None, None] + torch.arange(width, device=values.device)
    full = (block_row.shape[0], height, width)
    rows, cols = rows.expand(full), cols.expand(full)
    inside = (local < per_group) & (cols < k)
    return values.reshape(rows.shape)[inside], rows[inside], cols[inside]

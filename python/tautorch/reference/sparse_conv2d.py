"""Reference of ``sparse_conv2d``: the sparse matrix is ``[O, (I/g)*kh*kw]``, blocks inside each group."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Epilogue, Geometry, batched, check_float, check_input, over, pair
from .int8_conv2d import int8_conv2d
from .layouts import decode
from .sparse_linear import stored_entries

_OP = "sparse_conv2d"


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None = None,
    *,
    pattern: str,
    weight_shape: tuple[int, int, int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_only: bool = False,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """2-D convolution with a sparse weight.

    Args:
        x: as for ``int8_conv2d``; float for float values.
        values, crow_indices, col_indices: the layout of ``layouts`` with ``groups``, values int8 or floating.
        weight_scale: fp32 ``[O]`` for int8 values, None for float ones.
        pattern: "unstructured", "2:4", "4x1", "16x16", "32x32" or "64x64".
        weight_shape: ``(O, I/groups, kh, kw)``.

    The other arguments, the result and the errors are those of ``int8_conv2d``. A weight that is not stored
    takes no part: in float products an Inf or NaN under a dropped tap does not reach the output.
    (A kernel that expands the layout multiplies it by 0, and gives NaN.)
    """
    if (values.dtype == torch.int8) != (weight_scale is not None):
        raise ValueError(f"{_OP}: weight_scale must be given for int8 values and only there")
    dense = decode(values, crow_indices, col_indices, pattern, weight_shape, groups, op=_OP)
    integer = weight_scale is not None and not weight_only
    epilogue = Epilogue(bias, activation, out_scale, out_zero_point, out_dtype)
    epilogue.check(_OP, raw=integer)
    if weight_scale is not None and integer:
        check_input(_OP, x, x_scale, x_zero_point)
        return int8_conv2d(
            x,
            dense,
            weight_scale,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            activation=activation,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
            out_dtype=out_dtype,
        )
    check_float(_OP, x, "float products")
    images, unbatched = batched(_OP, x)
    out_channels, in_channels, kh, kw = weight_shape
    if images.shape[1] != in_channels * groups:
        raise ValueError(f"{_OP}: x must have {in_channels * groups} channels, got {images.shape[1]}")
    geometry = Geometry((kh, kw), pair(stride), pair(padding), pair(dilation), groups)
    patches, size = geometry.patches(_OP, images.double())
    matrix = dense.reshape(out_channels, -1).double()
    _, rows, cols = stored_entries(values, crow_indices, col_indices, pattern, matrix.shape, groups)
    stored = torch.zeros(matrix.shape, dtype=torch.bool, device=x.device)
    stored[rows, cols] = True
    y = _grouped_stored(patches, matrix, stored).to(torch.float32)
    if weight_scale is not None:
        y = y * over(weight_scale, y, 1)
    y = epilogue.finish(y, x.dtype, channel=1).reshape(images.shape[0], out_channels, *size)
    return y[0] if unbatched else y


def _grouped_stored(patches: Tensor, matrix: Tensor, stored: Tensor) -> Tensor:
    """float64 ``[B, g, L, K]`` x ``[g*n, K]`` -> ``[B, g*n, L]`` over the stored entries alone."""
    batch, groups, length, k = patches.shape
    weights = matrix.reshape(groups, -1, k).transpose(1, 2)
    finite = torch.isfinite(patches)
    if bool(finite.all()):
        product = torch.matmul(patches, weights)
    else:
        kept = stored.reshape(groups, 1, -1, k)
        terms = patches[:, :, :, None, :] * weights.transpose(1, 2)[:, None]
        product = torch.where(kept, terms, torch.zeros_like(terms)).sum(-1)
    return product.transpose(2, 3).reshape(batch, matrix.shape[0], length)

"""Reference of ``int8_conv2d``: patches, one integer product a group, the epilogue of ``int8_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import (
    Epilogue,
    Geometry,
    batched,
    centred_input,
    check_float,
    check_k,
    grouped_product,
    over,
    pair,
)

_OP = "int8_conv2d"


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
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
    """2-D convolution with int8 weights.

    Args:
        x: ``[B, I, H, W]`` or ``[I, H, W]`` float32, bfloat16 or float16 (quantised here: per sample, or
            statically where ``x_scale`` is given), or int8 with its scale. Padding is the real value 0.
        weight: int8 ``[O, I/groups, kh, kw]``.
        weight_scale: fp32 ``[O]``.
        bias: float ``[O]``.
        stride, padding, dilation: one int or (height, width).
        x_scale: fp32, one element; for int8 x one element or one a sample.

    The other arguments are those of ``int8_linear``. A sample with NaN or Inf gives a NaN sample.

    Returns:
        ``[B, O, OH, OW]``, or ``[O, OH, OW]`` for unbatched x.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    epilogue = Epilogue(bias, activation, out_scale, out_zero_point, out_dtype)
    epilogue.check(_OP, raw=not weight_only)
    images, unbatched = batched(_OP, x)
    out_channels, in_channels, *kernel = weight.shape
    if images.shape[1] != in_channels * groups:
        raise ValueError(f"{_OP}: x must have {in_channels * groups} channels, got {images.shape[1]}")
    geometry = Geometry((kernel[0], kernel[1]), pair(stride), pair(padding), pair(dilation), groups)
    matrix = weight.reshape(out_channels, -1)
    if weight_only:
        check_float(_OP, x, "weight_only")
        patches, size = geometry.patches(_OP, images.double())
        y = grouped_product(patches, matrix).to(torch.float32)
    else:
        check_k(_OP, weight=matrix)
        centred, scale = centred_input(_OP, images, x_scale, x_zero_point, samples=True)
        patches, size = geometry.patches(_OP, centred)
        acc = grouped_product(patches, matrix).to(torch.int32)
        if out_dtype == torch.int32:
            return _image(acc, size, unbatched)
        y = acc.to(torch.float32) * over(scale, acc, 0)
    y = y * over(weight_scale, y, 1)
    return _image(epilogue.finish(y, x.dtype, channel=1), size, unbatched)


def _image(y: Tensor, size: tuple[int, int], unbatched: bool) -> Tensor:
    y = y.reshape(*y.shape[:2], *size)
    return y[0] if unbatched else y

"""Reference of ``lowrank_conv2d``: a kxk convolution to r channels a group, then a 1x1 one.

Denton et al., arXiv:1404.0736; Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and
Low Power Mobile Applications", ICLR 2016, arXiv:1511.06530.
"""

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
from .lowrank_linear import check_factors
from .quantizer import quantize_rows

_OP = "lowrank_conv2d"


def lowrank_conv2d(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> Tensor:
    """``conv2d(conv2d(x, down, stride, padding, dilation, groups), up, bias, groups=groups)`` in one call.

    Args:
        x: ``[B, I, H, W]`` or ``[I, H, W]``, as for ``int8_conv2d``; float for float factors.
        down: ``[groups*r, I/groups, kh, kw]``, float, or int8 with ``down_scale``.
        up: ``[O, r, 1, 1]``, float, or int8 with ``up_scale``.
        bias: float ``[O]``.
        down_scale: fp32 ``[groups*r]``.
        up_scale: fp32 ``[O]``.
        out_dtype: as for ``int8_conv2d``; int32 gives the accumulators of the 1x1 product (int8 factors
        only).

    The intermediate is fp32; with int8 factors it is quantised dynamically per pixel and group. The other
    arguments and the result are those of ``int8_conv2d``.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    quantised = check_factors(_OP, down, up, down_scale, up_scale)
    epilogue = Epilogue(bias, activation, out_scale, out_zero_point, out_dtype)
    epilogue.check(_OP, raw=quantised)
    images, unbatched = batched(_OP, x)
    channels, in_channels, *kernel = down.shape
    if images.shape[1] != in_channels * groups:
        raise ValueError(f"{_OP}: x must have {in_channels * groups} channels, got {images.shape[1]}")
    geometry = Geometry((kernel[0], kernel[1]), pair(stride), pair(padding), pair(dilation), groups)
    first, second = down.reshape(channels, -1), up.reshape(up.shape[0], -1)
    if down_scale is None or up_scale is None:
        check_float(_OP, x, "float factors")
        patches, size = geometry.patches(_OP, images.double())
        inner = grouped_product(patches, first).to(torch.float32)
        y = grouped_product(_pixels(inner, groups).double(), second).to(torch.float32)
    else:
        check_k(_OP, down=first, up=second)
        centred, scale = centred_input(_OP, images, x_scale, x_zero_point, samples=True)
        patches, size = geometry.patches(_OP, centred)
        acc = grouped_product(patches, first).to(torch.int32)
        inner = acc.to(torch.float32) * over(scale, acc, 0) * over(down_scale, acc, 1)
        q, inner_scale = quantize_rows(_pixels(inner, groups))  # scale [B, g, L]
        acc = grouped_product(q.double(), second).to(torch.int32)
        y = acc.to(torch.float32) * inner_scale.repeat_interleave(up.shape[0] // groups, 1)
        y = y * over(up_scale, y, 1)
        if out_dtype == torch.int32:
            y = acc
    if out_dtype != torch.int32:
        y = epilogue.finish(y, x.dtype, channel=1)
    y = y.reshape(images.shape[0], up.shape[0], *size)
    return y[0] if unbatched else y


def _pixels(inner: Tensor, groups: int) -> Tensor:
    """``[B, g*r, L]`` -> ``[B, g, L, r]``: the rows of the second product."""
    batch, channels, length = inner.shape
    return inner.reshape(batch, groups, channels // groups, length).transpose(2, 3)

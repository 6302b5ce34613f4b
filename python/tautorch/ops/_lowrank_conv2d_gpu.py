"""lowrank_conv2d on CUDA tensors: by Triton, as the kernel table says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Problem
from tautorch.reference import lowrank_conv2d as reference

from . import _gpu, caches, tails
from . import geometry as conv

OP = "lowrank_conv2d"
_factors = caches.PackCache()


def run(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    geometry: conv.Geometry,
    tail: tails.Tail,
) -> Tensor:
    """The operator for arguments that have passed its checks; x is on a CUDA device.

    ``scales`` are those of down and up; the geometry is the product's.
    """
    for name, t in (("down", down), ("up", up)):
        _gpu.refuse_pack(OP, name, t)
        _gpu.check_lowest(OP, name, t, t[0].numel())
    n, rank = up.shape[:2]
    details = _gpu.details(
        x.get_device(),
        groups=geometry.groups,
        rank=rank,
        int8=scales[0] is not None,
        rows=conv.samples(x) * math.prod(geometry.out_size(*x.shape[-2:])),
    )
    kernel = dispatch.choose(Problem(OP, "cuda", n, geometry.k, details))
    dispatch.note_used(OP, kernel)
    arguments = _gpu.keywords(tail)
    if kernel == "reference":
        y = reference.lowrank_conv2d(
            x, down, up, bias, down_scale=scales[0], up_scale=scales[1], **geometry.keywords(), **arguments
        )
        return conv.laid_out(y, x, geometry)
    from tautorch.triton_kernels import lowrank_conv2d as kernels  # imports Triton: optional, and slow

    with torch.cuda.device(x.device):
        dtype = torch.int8 if scales[0] is not None else x.dtype
        y = kernels.lowrank_conv2d(
            _gpu.as_images(x),
            _gpu.once(_factors, down, lambda: _channels_last(down, dtype), dtype),
            _gpu.once(_factors, up, lambda: _channels_last(up, dtype), dtype).reshape(n, rank),
            _gpu.contiguous(bias),
            down_scale=_gpu.contiguous(scales[0]),
            up_scale=_gpu.contiguous(scales[1]),
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            down_sums=None if tail.x_zero_point is None else _gpu.row_sums(down),
            **arguments,
        )
        return _gpu.in_format_of(x, y)


def _channels_last(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``[O, kh, kw, I]`` of a canonical factor."""
    return factor.detach().to(dtype).permute(0, 2, 3, 1).contiguous()

"""int8_conv2d on CUDA tensors by Triton: from tensors to the kernel's arguments and back."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _gpu, caches, tails
from . import geometry as conv

_weights = caches.PackCache()


def run(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    geometry: conv.Geometry,
    tail: tails.Tail,
) -> Tensor:
    """The operator for one group; the output in x's memory format."""
    from tautorch.triton_kernels import int8_conv2d as kernels  # imports Triton: optional, and slow

    with torch.cuda.device(x.device):
        y = kernels.int8_conv2d(
            _gpu.as_images(x),
            _gpu.once(_weights, weight, lambda: weight.detach().permute(0, 2, 3, 1).contiguous()),
            _gpu.adjacent(weight_scale),
            _gpu.contiguous(bias),
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            row_sums=None if tail.x_zero_point is None else _gpu.row_sums(weight),
            **_gpu.keywords(tail),
        )
        return _gpu.in_format_of(x, y)

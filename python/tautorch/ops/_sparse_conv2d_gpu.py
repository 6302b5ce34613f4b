"""sparse_conv2d on CUDA tensors: pattern 2:4, by the CUDA extension, where the kernel table says so."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Problem
from tautorch.reference import sparse_conv2d as reference

from . import _gpu, tails
from ._int8_conv2d_gpu import extension
from ._sparse_24_gpu import packed_places
from .geometry import Geometry, laid_out

OP = "sparse_conv2d"


def run(
    x: Tensor,
    layout: tuple[Tensor, Tensor | None, Tensor | None],
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    geometry: Geometry,
    tail: tails.Tail,
) -> Tensor:
    """The operator for arguments that have passed its checks; x is on a CUDA device.

    ``layout`` is the values with their row and column indices.
    """
    values, crow, col = layout
    _gpu.refuse_pack(OP, "values", values)
    _gpu.check_devices(
        OP,
        x,
        x_scale=tail.x_scale,
        x_zero_point=tail.x_zero_point,
        out_scale=tail.out_scale,
        out_zero_point=tail.out_zero_point,
    )
    details = _gpu.details(
        x.get_device(),
        groups=geometry.groups,
        taps=geometry.taps,
        pattern=pattern,
        int8=weight_scale is not None,
        weight_only=tail.weight_only,
        rows=x.shape[:-3].numel() * math.prod(geometry.out_size(*x.shape[-2:])),
    )
    shape = (geometry.weight_shape[0], geometry.k)
    kernel = dispatch.choose(Problem(OP, "cuda", *shape, details))
    if kernel == "reference":
        assert col is not None
        dispatch.note_used(OP, kernel)
        y = reference.sparse_conv2d(
            x, values, crow, col, weight_scale, bias, pattern=pattern, weight_shape=geometry.weight_shape,
            **geometry.keywords(), **tail._asdict(),
        )  # fmt: skip
        return laid_out(y, x, geometry)
    assert col is not None and weight_scale is not None  # by the operator's checks and the kernel's row
    places = col
    _gpu.check_lowest(OP, "values", values, geometry.k)

    def packed(stream: int) -> Tensor:
        return packed_places(OP, values, places, shape, 0, x.get_device(), stream)

    with torch.cuda.device(x.device):
        return extension(OP, kernel, x, packed, weight_scale, bias, geometry, tail)

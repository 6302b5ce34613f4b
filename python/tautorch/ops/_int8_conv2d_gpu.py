"""int8_conv2d on CUDA tensors, as the kernel table says."""

from __future__ import annotations

from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Problem
from tautorch.reference import int8_conv2d as reference

from . import _gpu
from . import _int8_conv2d_triton as _triton
from . import library as lib
from .geometry import Geometry

OP = "int8_conv2d"


def run(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry, tail: lib.Tail
) -> Tensor:
    """The operator for arguments that have passed its checks; x is on a CUDA device."""
    _gpu.refuse_pack(OP, "weight", weight)
    _gpu.check_devices(
        OP,
        x,
        x_scale=tail.x_scale,
        x_zero_point=tail.x_zero_point,
        out_scale=tail.out_scale,
        out_zero_point=tail.out_zero_point,
    )
    details = _gpu.details(
        x.get_device(), groups=geometry.groups, taps=geometry.taps, weight_only=tail.weight_only
    )
    kernel = dispatch.choose(Problem(OP, "cuda", geometry.weight_shape[0], geometry.k, details))
    if kernel == "reference":
        dispatch.note_used(OP, kernel)
        return reference.int8_conv2d(x, weight, weight_scale, bias, **geometry.keywords(), **tail._asdict())
    dispatch.note_used(OP, kernel)
    return _triton.run(x, weight, weight_scale, bias, geometry, tail)

"""lowrank_linear on CUDA tensors: by Triton, as the kernel table says."""

from __future__ import annotations

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Problem
from tautorch.reference import lowrank_linear as reference

from . import _gpu, caches, tails
from . import library as lib

OP = "lowrank_linear"
_operands = caches.PackCache()


def run(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    residual: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, str | None],
    tail: tails.Tail,
) -> Tensor:
    """The operator for arguments that have passed its checks; x is on a CUDA device.

    ``scales`` are those of down and up, ``residual`` its values, indices, scale and pattern.
    """
    values, crow, col, residual_scale, pattern = residual
    for name, t in (("down", down), ("up", up), ("residual", values)):
        _gpu.refuse_pack(OP, name, t)
    _gpu.check_devices(OP, x, up_scale=scales[1])
    (r, k), n = down.shape, up.shape[0]
    for name, t, terms in (("down", down, k), ("up", up, r), ("residual", values, k)):
        if t is not None:
            _gpu.check_lowest(OP, name, t, terms)
    more: dict[str, object] = {"rank": r, "weight_dtype": "float32" if scales[0] is None else "int8"}
    if values is not None:
        more["residual"] = pattern or "int8"
    index = x.get_device()
    kernel = dispatch.choose(Problem(OP, "cuda", n, k, _gpu.details(index, rows=lib.row_count(x), **more)))
    dispatch.note_used(OP, kernel)
    arguments = _gpu.keywords(tail)
    if kernel == "reference":
        return reference.lowrank_linear(
            x, down, up, bias, down_scale=scales[0], up_scale=scales[1], residual=values,
            residual_crow_indices=crow, residual_col_indices=col, residual_scale=residual_scale,
            residual_pattern=pattern, **arguments,
        )  # fmt: skip
    from tautorch.triton_kernels import lowrank_linear as kernels  # imports Triton: optional, and slow

    with torch.cuda.device(x.device):
        dtype = torch.int8 if scales[0] is not None else x.dtype
        zero_point = tail.x_zero_point is not None
        return kernels.lowrank_linear(
            x,
            operand(down, dtype),
            operand(up, dtype),
            _gpu.contiguous(bias),
            down_scale=_gpu.contiguous(scales[0]),
            up_scale=_gpu.contiguous(scales[1]),
            residual=None if values is None else operand(values, torch.int8),
            residual_scale=_gpu.contiguous(residual_scale),
            down_sums=_gpu.row_sums(down) if zero_point else None,
            residual_sums=_gpu.row_sums(values) if zero_point and values is not None else None,
            **arguments,
        )


def operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the kernels read it: of ``dtype``, elements of a row adjacent. Converted once."""
    weight_is_good = weight.dtype == dtype and (weight.shape[1] <= 1 or weight.stride(1) == 1)
    if weight_is_good:
        return weight.detach()
    return _gpu.once(_operands, weight, lambda: weight.detach().to(dtype).contiguous(), dtype)

"""int8_conv2d on CUDA tensors: by the CUDA extension or by Triton, as the kernel table says."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Problem
from tautorch.reference import int8_conv2d as reference

from . import _gpu, caches, packing, tails
from . import _int8_conv2d_triton as _triton
from . import geometry as conv
from .geometry import Geometry

OP = "int8_conv2d"
_packs = caches.PackCache()


def run(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry, tail: tails.Tail
) -> Tensor:
    """The operator for arguments that have passed its checks; x is on a CUDA device."""
    _gpu.refuse_pack(OP, "weight", weight)
    _gpu.check_tail_devices(OP, x, tail)
    if not tail.weight_only:
        _gpu.check_lowest(OP, "weight", weight, weight[0].numel())
    details = _gpu.details(
        x.get_device(),
        groups=geometry.groups,
        taps=geometry.taps,
        weight_only=tail.weight_only,
        rows=x.shape[:-3].numel() * math.prod(geometry.out_size(*x.shape[-2:])),
    )
    kernel = dispatch.choose(Problem(OP, "cuda", geometry.weight_shape[0], geometry.k, details))
    if kernel == "reference":
        dispatch.note_used(OP, kernel)
        y = reference.int8_conv2d(x, weight, weight_scale, bias, **geometry.keywords(), **tail._asdict())
        return conv.laid_out(y, x, geometry)
    if kernel == "triton":
        dispatch.note_used(OP, kernel)
        return _triton.run(x, weight, weight_scale, bias, geometry, tail)

    def packed(stream: int) -> Tensor:
        return _packed(weight, x.get_device(), stream)

    return extension(OP, kernel, x, packed, weight_scale, bias, geometry, tail)


def extension(
    op: str,
    kernel: str,
    x: Tensor,
    packed_for: Callable[[int], Tensor],
    weight_scale: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    tail: tails.Tail,
) -> Tensor:
    """The extension's ``op`` by "cuda", which chooses by shape, or by one of its kernels.

    ``packed_for`` gives the weight as the kernels read it, made on a stream where it is not there yet.
    """
    if x.dim() == 3:
        whole = x.unsqueeze(0)
        return extension(op, kernel, whole, packed_for, weight_scale, bias, geometry, tail).squeeze(0)
    ext, index, dtype = dispatch.cuda, x.get_device(), tail.dtype(x)
    batch, channels, height, width = x.shape
    n = geometry.weight_shape[0]
    codes, keep = tail.codes(x, weight_scale, bias, False)
    stream = torch.cuda.current_stream(index).cuda_stream
    packed = packed_for(stream)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    # Pixels of the output start on 16 bytes; where n does not give that, the kernel writes wider ones.
    ldy = packing.round_up(n, 16 // dtype.itemsize)
    y = torch.empty((batch, *geometry.out_size(height, width), ldy), dtype=dtype, device=x.device)
    size = getattr(ext, f"{op}_workspace")(batch, height * width * channels)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    kernels = getattr(ext, f"{op}_kernels")()
    ran = getattr(ext, f"{op}_run")(
        getattr(ext, f"{op}_plan")(packed.data_ptr(), n, geometry.plan_arguments(), codes),
        -1 if kernel == "cuda" else kernels.index(kernel),
        pixels.data_ptr(),
        tails.DTYPE_CODE[x.dtype],
        batch,
        height,
        width,
        y.data_ptr(),
        ldy,
        tails.DTYPE_CODE[dtype],
        workspace.data_ptr(),
        index,
        stream,
    )
    dispatch.note_used(op, kernels[ran])
    # Freed memory goes back to this stream's pool: what reuses it is queued behind the kernel.
    del keep, workspace
    pixels_first = y[..., :n].permute(0, 3, 1, 2)
    if ldy == n and conv.channels_last(x):
        return pixels_first
    return conv.output(x, geometry, dtype).copy_(pixels_first)


def _packed(weight: Tensor, index: int, stream: int) -> Tensor:
    """The weight in the order in which the kernels read it, with the sums of its rows."""

    def make() -> Tensor:
        rows = weight.detach().permute(0, 2, 3, 1).contiguous()
        n, k = weight.shape[0], weight[0].numel()
        total = dispatch.cuda.int8_conv2d_layout(n, k)["total"]
        packed = torch.empty(total, dtype=torch.uint8, device=weight.device)
        dispatch.cuda.int8_conv2d_pack(rows.data_ptr(), n, k, packed.data_ptr(), index, stream)
        return packed

    return _gpu.once(_packs, weight, make)

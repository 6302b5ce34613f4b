"""sparse_linear of pattern 2:4 on CUDA tensors, by the CUDA extension."""

from __future__ import annotations

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.reference.layouts import check_layout

from . import _gpu
from . import library as lib
from ._gpu_product import product

OP = "sparse_linear"
_packs = lib.PackCache()


def run(
    kernel: str,
    x: Tensor,
    values: Tensor,
    places: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    tail: lib.Tail,
) -> Tensor:
    """The operator by ``kernel`` of the extension's table; x and the layout are on a CUDA device."""
    _gpu.check_devices(
        OP,
        x,
        x_scale=tail.x_scale,
        x_zero_point=tail.x_zero_point,
        out_scale=tail.out_scale,
        out_zero_point=tail.out_zero_point,
    )
    ext, index, k = dispatch.cuda, x.get_device(), x.shape[-1]
    codes, keep = tail.codes(x, weight_scale, bias, False)
    stream = torch.cuda.current_stream(index).cuda_stream
    _gpu.check_lowest(OP, "values", values, k)
    kernels, rows = ext.sparse_linear_kernels(), lib.row_count(x)
    shape = (out_features, k)
    wgmma = ext.sparse_linear_wgmma(
        ext.sparse_linear_choose(*_gpu.facts(index), rows, *shape) if kernel == "cuda" else kernel
    )
    packed = packed_places(OP, values, places, shape, wgmma, index, stream)
    plan = ext.sparse_linear_plan(packed.data_ptr(), *shape, wgmma, codes)
    chosen = -1 if kernel == "cuda" else kernels.index(kernel)
    y = product(OP, kernels, chosen, plan, x, out_features, tail.dtype(x), False, stream)
    del keep
    return y


def packed_places(
    op: str, values: Tensor, places: Tensor, shape: tuple[int, int], wgmma: bool, index: int, stream: int
) -> Tensor:
    """The weight in the order in which the kernels read it; its places are checked when it is made."""
    if torch.cuda.is_current_stream_capturing() and _packs.peek(values, (shape, wgmma), (places,)) is None:
        raise ValueError(
            f"{op}: col_indices are checked at the first call with them, which a graph cannot capture; "
            "call the layer once before capturing (tautorch.warmup)"
        )

    def make() -> Tensor:
        check_layout(values, None, places, "2:4", shape, op=op)
        n, kept = values.shape
        total = dispatch.cuda.sparse_linear_layout(n, 2 * kept, wgmma)["total"]
        packed = torch.empty(total, dtype=torch.uint8, device=values.device)
        held = values.detach().contiguous(), places.detach().contiguous()
        dispatch.cuda.sparse_linear_pack(
            held[0].data_ptr(), held[1].data_ptr(), n, kept, packed.data_ptr(), wgmma, index, stream
        )
        return packed

    return _gpu.once(_packs, values, make, (shape, wgmma), (places,))

"""sparse_linear of pattern 2:4 on CUDA tensors, by the CUDA extension."""

from __future__ import annotations

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.reference.layouts import check_layout

from . import _gpu, caches, tails
from . import library as lib
from ._gpu_product import product

OP = "sparse_linear"
_packs = caches.PackCache()


def run(
    kernel: str,
    x: Tensor,
    values: Tensor,
    places: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    tail: tails.Tail,
) -> Tensor:
    """The operator by ``kernel`` of the extension's table; x and the layout are on a CUDA device.

    Without ``weight_scale`` x is multiplied as it comes, bf16 or fp16, by values of its type:
    others are rounded to it when they are packed.
    """
    _gpu.check_tail_devices(OP, x, tail)
    ext, index, k = dispatch.cuda, x.get_device(), x.shape[-1]
    floats = weight_scale is None
    dtype = x.dtype if floats else torch.int8
    codes, keep = tail.codes(x, weight_scale, bias, floats)
    stream = torch.cuda.current_stream(index).cuda_stream
    _gpu.check_lowest(OP, "values", values, k)
    kernels, rows = ext.sparse_linear_kernels(), lib.row_count(x)
    shape = (out_features, k)
    if kernel == "cuda":
        best = ext.sparse_linear_choose(*_gpu.facts(index), rows, *shape, tails.DTYPE_CODE[dtype])
        order = ext.sparse_linear_order(best)
    else:
        order = ext.sparse_linear_order(kernel)
    packed = packed_places(OP, values, places, shape, order, index, stream, dtype)
    plan = ext.sparse_linear_plan(packed.data_ptr(), *shape, order, codes)
    chosen = -1 if kernel == "cuda" else kernels.index(kernel)
    held = [packed, *keep]
    return product(OP, kernels, chosen, plan, x, out_features, tail.dtype(x), floats, stream, held)


def packed_places(
    op: str,
    values: Tensor,
    places: Tensor,
    shape: tuple[int, int],
    order: int,
    index: int,
    stream: int,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """The weight in the ``order`` in which the kernels read it; its places are checked when it is made."""
    key = (shape, order, dtype)
    if torch.cuda.is_current_stream_capturing() and _packs.peek(values, key, (places,)) is None:
        raise ValueError(
            f"{op}: col_indices are checked at the first call with them, which a graph cannot capture; "
            "call the layer once before capturing (tautorch.warmup)"
        )

    def make() -> Tensor:
        check_layout(values, None, places, "2:4", shape, op=op)
        n, kept = values.shape
        total = dispatch.cuda.sparse_linear_layout(n, 2 * kept, order)["total"]
        packed = torch.empty(total, dtype=torch.uint8, device=values.device)
        held = values.detach().to(dtype).contiguous(), places.detach().contiguous()
        dispatch.cuda.sparse_linear_pack(
            held[0].data_ptr(), held[1].data_ptr(), n, kept, packed.data_ptr(), order, index, stream
        )
        return packed

    return _gpu.once(_packs, values, make, key, (places,))

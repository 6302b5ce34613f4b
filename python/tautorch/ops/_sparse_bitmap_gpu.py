"""sparse_linear of unstructured and 4x1 int8 weights on CUDA tensors, by the CUDA extension."""

from __future__ import annotations

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.reference.layouts import block_row_indices, check_layout

from . import _gpu, caches, tails
from . import library as lib
from ._gpu_product import product

OP = "sparse_linear"
ORDER = 3  # SparseOrder::bitmap
_packs = caches.PackCache()


def run(
    kernel: str,
    x: Tensor,
    layout: tuple[Tensor, Tensor | None, Tensor],
    pattern: str,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    tail: tails.Tail,
) -> Tensor:
    """The operator by ``kernel`` of the extension's table; x and the layout are on a CUDA device."""
    _gpu.check_tail_devices(OP, x, tail)
    ext, index = dispatch.cuda, x.get_device()
    shape = (out_features, x.shape[-1])
    codes, keep = tail.codes(x, weight_scale, bias, False)
    _gpu.check_lowest(OP, "values", layout[0], shape[1])
    kernels = ext.sparse_linear_kernels()
    if kernel == "cuda":
        kernel = ext.sparse_linear_bitmap(lib.row_count(x))
    packed = _packed(layout, pattern, shape)
    plan = ext.sparse_linear_plan(packed.data_ptr(), *shape, ORDER, codes)
    stream = torch.cuda.current_stream(index).cuda_stream
    chosen = kernels.index(kernel)
    held = [packed, *keep]
    return product(OP, kernels, chosen, plan, x, out_features, tail.dtype(x), False, stream, held)


def _packed(layout: tuple[Tensor, Tensor | None, Tensor], pattern: str, shape: tuple[int, int]) -> Tensor:
    """The weight as the kernels read it; its indices are checked when it is made."""
    values, crow, col = layout
    key = (pattern, shape)
    if torch.cuda.is_current_stream_capturing() and _packs.peek(values, key, (crow, col)) is None:
        raise ValueError(
            f"{OP}: col_indices are checked at the first call with them, which a graph cannot capture; "
            "call the layer once before capturing (tautorch.warmup)"
        )

    def make() -> Tensor:
        check_layout(values, crow, col, pattern, shape, op=OP)
        assert crow is not None  # by that check
        return pack(*entries(values.detach(), crow, col, shape[0]), shape)

    return _gpu.once(_packs, values, make, key, (crow, col))


def entries(values: Tensor, crow: Tensor, col: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, rows, columns) of the single weights of an unstructured or 4x1 layout of ``n`` outputs."""
    row, column = block_row_indices(crow), col.long()
    if values.dim() == 1:
        return values, row, column
    height = values.shape[1]
    rows = (row[:, None] * height + torch.arange(height, device=row.device)).reshape(-1)
    inside = rows < n
    return values.reshape(-1)[inside], rows[inside], column.repeat_interleave(height)[inside]


def pack(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int]) -> Tensor:
    """Single int8 weights in the layout of ``sparse_linear_bitmap_cuda.h``."""
    parts = dispatch.cuda.sparse_linear_bitmap_layout(*shape)
    step = column // 64
    unit = row // 16 * parts["steps"] + step
    lane = unit * 32 + row % 8 * 4 + column % 64 // 16
    half, element = row % 16 // 8, column % 16
    order = torch.argsort((lane * 2 + half) * 16 + element)
    count = torch.zeros(parts["tiles"] * parts["steps"], dtype=torch.int64, device=values.device)
    count.index_add_(0, unit, torch.ones_like(unit))
    offsets = torch.zeros(count.numel() + 1, dtype=torch.int64, device=values.device)
    torch.cumsum((count + 15) // 16, 0, out=offsets[1:])
    sorted_unit = unit[order]
    inside = torch.arange(order.numel(), device=values.device) - (count.cumsum(0) - count)[sorted_unit]
    bits = torch.zeros(count.numel() * 32, dtype=torch.int64, device=values.device)
    bits.index_add_(0, lane, 1 << (16 * half + 4 * (element % 4) + element // 4))
    sums = torch.zeros(shape[0], dtype=torch.int32, device=values.device)
    sums.index_add_(0, row, values.int())

    packed = torch.zeros(parts["values_off"] + 16 * int(offsets[-1]), dtype=torch.uint8, device=values.device)
    kept = packed[parts["values_off"] :].view(torch.int8)
    kept[offsets[sorted_unit] * 16 + inside] = values[order]
    _put(packed, 0, torch.where(bits < 2**31, bits, bits - 2**32).int())
    _put(packed, parts["offsets_off"], offsets.int())
    _put(packed, parts["sums_off"], sums)
    return packed


def _put(packed: Tensor, offset: int, numbers: Tensor) -> None:
    data = numbers.view(torch.uint8)
    packed[offset : offset + data.numel()] = data

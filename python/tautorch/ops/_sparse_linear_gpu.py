"""sparse_linear on CUDA tensors: by the CUDA extension or by Triton, as the kernel table says."""

from __future__ import annotations

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Problem
from tautorch.reference import sparse_linear as reference
from tautorch.reference.layouts import block_row_indices, check_layout

from . import _gpu, caches, tails
from . import _sparse_24_gpu as two_of_four
from . import _sparse_bitmap_gpu as bitmap
from . import library as lib

OP = "sparse_linear"
_checked = caches.PackCache()
_floats = caches.PackCache()


def run(
    x: Tensor,
    layout: tuple[Tensor, Tensor | None, Tensor | None],
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    tail: tails.Tail,
) -> Tensor:
    """The operator for arguments that have passed its checks; x is on a CUDA device.

    ``layout`` is the values with their row and column indices.
    """
    values, crow, col = layout
    _gpu.refuse_pack(OP, "values", values)
    shape = (out_features, x.shape[-1])
    details = _gpu.details(
        x.get_device(),
        rows=lib.row_count(x),
        pattern=pattern,
        weight_dtype="float32" if weight_scale is None else "int8",
        weight_only=tail.weight_only,
        x_dtype=tails.DTYPE_CODE[x.dtype],
    )
    kernel = dispatch.choose(Problem(OP, "cuda", *shape, details))
    if kernel not in ("reference", "triton"):
        assert col is not None  # by the operator's checks
        if pattern != "2:4":
            assert weight_scale is not None  # by the table
            return bitmap.run(kernel, x, (values, crow, col), pattern, weight_scale, bias, out_features, tail)
        return two_of_four.run(kernel, x, values, col, weight_scale, bias, out_features, tail)
    dispatch.note_used(OP, kernel)
    if kernel == "reference":
        assert col is not None
        return reference.sparse_linear(
            x, values, crow, col, weight_scale, bias, pattern=pattern, out_features=out_features,
            **tail._asdict(),
        )  # fmt: skip
    from tautorch.triton_kernels import sparse_linear as kernels  # imports Triton: optional, and slow

    with torch.cuda.device(x.device):
        if weight_scale is not None and not tail.weight_only:
            _gpu.check_lowest(OP, "values", values, shape[1])
        sums = check(values, crow, col, pattern, shape)
        assert crow is not None and col is not None  # by check
        arguments = tail._asdict()
        arguments["x_scale"] = _gpu.contiguous(tail.x_scale)
        return kernels.sparse_linear(
            x,
            operand(values, values.dtype if weight_scale is not None else x.dtype),
            _gpu.adjacent(crow),
            _gpu.adjacent(col),
            _gpu.contiguous(weight_scale),
            _gpu.contiguous(bias),
            pattern=pattern,
            out_features=out_features,
            row_sums=sums,
            **arguments,
        )


def check(
    values: Tensor, crow: Tensor | None, col: Tensor | None, pattern: str, shape: tuple[int, int]
) -> Tensor:
    """int32 sums of the weight's rows (empty for float values), after its layout was checked, once.

    The kernel trusts the indices, and checking them waits for the device.
    """
    key = (pattern, shape)
    if torch.cuda.is_current_stream_capturing() and _checked.peek(values, key, (crow, col)) is None:
        raise ValueError(
            f"{OP}: col_indices are checked at the first call with them, which a graph cannot capture; "
            "call the layer once before capturing (tautorch.warmup)"
        )

    def first() -> Tensor:
        assert col is not None
        check_layout(values, crow, col, pattern, shape, op=OP)
        if crow is None or values.dtype != torch.int8:
            return torch.zeros(0, dtype=torch.int32, device=values.device)
        block = values.shape[-1]
        sums = torch.zeros(crow.shape[0] - 1, block, dtype=torch.int32, device=values.device)
        sums.index_add_(0, block_row_indices(crow), values.sum(2, dtype=torch.int32))
        return sums.reshape(-1)[: shape[0]].contiguous()

    return _gpu.once(_checked, values, first, key, (crow, col))


def operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as the kernel reads them: of ``dtype`` and contiguous. Converted once."""
    if values.dtype == dtype and values.is_contiguous():
        return values.detach()
    return _gpu.once(_floats, values, lambda: values.detach().to(dtype).contiguous(), dtype)

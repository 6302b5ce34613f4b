"""One call of a linear kernel of the CUDA extension, from tensors to addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from tautorch import dispatch

from . import library as lib


def product(
    op: str,
    kernels: list[str],
    kernel: int,
    plan: bytes,
    x: Tensor,
    n: int,
    dtype: torch.dtype,
    weight_only: bool,
    stream: int,
) -> Tensor:
    """``x`` [..., K] by the extension's kernels of ``op``: [..., n] of ``dtype``.

    ``kernel`` is an index into ``kernels``; -1 chooses by shape. The caller holds what the plan points
    to until this returns: memory that is freed then goes back to the stream's pool, behind the kernel.
    """
    ext, k, m, index = dispatch.cuda, x.shape[-1], x.shape[:-1].numel(), x.get_device()
    rows = x.reshape(m, k)
    as_it_is = x.dtype == torch.int8 or weight_only
    if as_it_is and ((k > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < k)):
        rows = rows.contiguous()  # the extension copies rows that are apart, not columns or overlapping rows
    # stride_m, stride_k; a dimension of one element has any stride. The last 16 bytes of a
    # single int8 row could end past its memory, so it is not said to be padded.
    alone = k if m == 1 and x.dtype == torch.int8 else lib.round_up(k, 16)
    strides = (rows.stride(0) if m > 1 else alone, rows.stride(1) if k > 1 else 1)
    # Rows of the output start on 16 bytes; where n does not give that, the kernel writes wider ones.
    ldy = lib.round_up(n, 16 // dtype.itemsize)
    y = torch.empty((m, ldy), dtype=dtype, device=x.device)
    asked = (
        plan,
        kernel,
        rows.data_ptr(),
        lib.DTYPE_CODE[x.dtype],
        m,
        *strides,
        lib.DTYPE_CODE[dtype],
        index,
    )
    size = getattr(ext, f"{op}_workspace")(*asked)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    ran = getattr(ext, f"{op}_run")(*asked, y.data_ptr(), ldy, workspace.data_ptr(), stream)
    dispatch.note_used(op, kernels[ran])
    return (y if ldy == n else y[:, :n].contiguous()).view(*x.shape[:-1], n)

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The row quantiser in Triton: float [M, K] -> int8 [M, K] and an fp32 scale per row, by the contract."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import _INF, _NAN, _TINY, _rint

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _quantize_rows(
    x_ptr,
    q_ptr,
    scale_ptr,
    static_scale_ptr,
    zero_point_ptr,
    K,
    stride_xm,
    stride_xk,
    stride_qm,
    STATIC: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per row: a pass for amax and finiteness, a pass (out of cache) that rounds and stores."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xm
    q_row = q_ptr + row * stride_qm
    cols = tl.arange(0, BLOCK_K)

    peak = tl.zeros([BLOCK_K], dtype=tl.float32)
    bad = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + cols
        v = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=k < K, other=0.0).to(tl.float32)
        v = tl.abs(v)
        finite = v < _INF
        peak = tl.maximum(peak, tl.where(finite, v, 0.0))
        bad = bad | tl.where(finite, 0, 1)
    amax = tl.max(peak, axis=0)
    row_is_bad = tl.max(bad, axis=0) > 0

    zero_point = 0
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr)
    if STATIC:
        scale = tl.load(static_scale_ptr)
        inv = tl.div_rn(1.0, scale)
    else:
        zero_row = amax < _TINY
        divisor = tl.where(zero_row, 1.0, amax)
        scale = tl.where(zero_row, 1.0, tl.div_rn(divisor, 127.0))
        inv = tl.where(zero_row, 0.0, tl.div_rn(127.0, divisor))
    tl.store(scale_ptr + row, tl.where(row_is_bad, _NAN, scale))

    for start in range(0, K, BLOCK_K):
        k = start + cols
        v = tl.load(x_row + k.to(tl.int64) * stride_xk, mask=k < K, other=0.0).to(tl.float32)
        v = tl.where(row_is_bad, 0.0, v) * inv
        if STATIC:
            # Clamping first, far outside int8 even after the zero point, keeps the sum below exact.
            r = _rint(tl.minimum(tl.maximum(v, -512.0), 512.0)).to(tl.int32) + zero_point
            r = tl.minimum(tl.maximum(r, -128), 127)
        else:
            r = _rint(tl.minimum(tl.maximum(v, -127.0), 127.0)).to(tl.int32)
        tl.store(q_row + k, r.to(tl.int8), mask=k < K)


def quantize_rows(
    x: Tensor, x_scale: Tensor | None = None, x_zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Float [M, K] (any strides) -> int8 [M, K] and fp32 [M].

    Dynamic when ``x_scale`` is None, else static with ``x_scale`` fp32 [1] and ``x_zero_point`` int32 [1] or
    None.
    A row with NaN or Inf gets the scale NaN and q 0 (static: the zero point).
    """
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"int8_linear: x must be fp32, bf16 or fp16 [M, K], got {x.dtype} {tuple(x.shape)}")
    m, k = x.shape
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m == 0:
        return q, scale
    block = min(4096, max(64, triton.next_power_of_2(k)))
    _quantize_rows[(m,)](
        x,
        q,
        scale,
        x_scale,
        x_zero_point,
        k,
        x.stride(0),
        x.stride(1),
        k,
        STATIC=x_scale is not None,
        HAS_ZERO_POINT=x_scale is not None and x_zero_point is not None,
        BLOCK_K=block,
        num_warps=8 if block >= 4096 else 4,
        enable_fp_fusion=False,
    )
    return q, scale

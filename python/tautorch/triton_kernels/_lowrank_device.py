# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What the low-rank kernels call on the device, between the first product's sums and the output.

How these sums came about (rows of a matrix, windows of an image) is the kernels' business.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import _INF, _NAN, _TINY, _activate, _rint, _store


@triton.jit
def _quantize_tile(v):
    """fp32 [rows, r] -> int8 of its shape and one scale per row, by the contract; columns past r hold 0."""
    magnitude = tl.abs(v)
    finite = magnitude < _INF
    amax = tl.max(tl.where(finite, magnitude, 0.0), axis=1)
    bad = tl.max(tl.where(finite, 0, 1), axis=1) > 0
    zero = amax < _TINY
    divisor = tl.where(zero, 1.0, amax)
    scale = tl.where(zero, 1.0, tl.div_rn(divisor, tl.full(divisor.shape, 127.0, tl.float32)))
    inverse = tl.where(zero, 0.0, tl.div_rn(tl.full(divisor.shape, 127.0, tl.float32), divisor))
    v = tl.where(bad[:, None], 0.0, v) * inverse[:, None]
    q = _rint(tl.minimum(tl.maximum(v, -127.0), 127.0)).to(tl.int8)
    return q, tl.where(bad, _NAN, scale)


@triton.jit
def _scaled(acc, x_scale_ptr, scale_ptr, scale_of, offs_m, offs_r, M, R, PER_ROW: tl.constexpr):
    """int32 accumulators -> fp32: (acc * x_scale[scale_of[m]]) * scale[r], 0 in columns past R."""
    if PER_ROW:
        x_scale = tl.load(x_scale_ptr + scale_of, mask=offs_m < M, other=0.0)[:, None]
    else:
        x_scale = tl.load(x_scale_ptr)
    scale = tl.load(scale_ptr + offs_r, mask=offs_r < R, other=0.0)
    h = (acc.to(tl.float32) * x_scale) * scale[None, :]
    return tl.where((offs_r < R)[None, :], h, 0.0)


@triton.jit
def _inner(
    acc,
    x_scale_ptr,
    down_scale_ptr,
    zero_point_ptr,
    down_sums_ptr,
    scale_of,
    offs_m,
    offs_r,
    M,
    R,
    SCALE_PER_ROW: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
):
    """int32 sums of the first product -> the second's int8 operand and one scale per row."""
    if HAS_ZERO_POINT:
        sums = tl.load(down_sums_ptr + offs_r, mask=offs_r < R, other=0)
        acc -= tl.load(zero_point_ptr) * sums[None, :]
    h = _scaled(acc, x_scale_ptr, down_scale_ptr, scale_of, offs_m, offs_r, M, R, SCALE_PER_ROW)
    return _quantize_tile(h)


@triton.jit
def _end_down(
    acc,
    tile,
    split,
    x_scale_ptr,
    down_scale_ptr,
    zero_point_ptr,
    down_sums_ptr,
    partial_ptr,
    counter_ptr,
    h_ptr,
    h_scale_ptr,
    scale_of,
    offs_m,
    offs_r,
    M,
    R,
    stride_hm,
    INT8: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program's sums of the first product, a part of them if SPLITS > 1, to h."""
    last = True
    if SPLITS > 1:
        # Parts are whole tiles, so nothing is masked.
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        first = partial_ptr + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_R)
        tl.store(first + split * (BLOCK_M * BLOCK_R) + place, acc)
        tl.debug_barrier()  # every thread's part is written before one thread counts the program in
        last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.load(first + place, cache_modifier=".cg")
            for s in range(1, SPLITS):
                acc += tl.load(first + s * (BLOCK_M * BLOCK_R) + place, cache_modifier=".cg")
            tl.store(counter_ptr + tile, 0)  # as the next launch wants it
        mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :]
        if INT8:
            q, scale = _inner(
                acc, x_scale_ptr, down_scale_ptr, zero_point_ptr, down_sums_ptr, scale_of, offs_m, offs_r, M,
                R, SCALE_PER_ROW, HAS_ZERO_POINT,
            )  # fmt: skip
            tl.store(h_ptrs, q, mask=mask)
            tl.store(h_scale_ptr + offs_m, scale, mask=offs_m < M)
        else:
            tl.store(h_ptrs, acc.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _end_fused(
    acc,
    split,
    up_ptr,
    x_scale_ptr,
    down_scale_ptr,
    up_scale_ptr,
    zero_point_ptr,
    down_sums_ptr,
    bias_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    y_ptr,
    scale_of,
    offs_m,
    offs_r,
    M,
    N,
    R,
    stride_un,
    stride_ym,
    INT8: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RAW: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A row tile's sums of the first product, in registers, to every SPLITS-th of its tiles of y."""
    if INT8:
        h, h_scale = _inner(
            acc, x_scale_ptr, down_scale_ptr, zero_point_ptr, down_sums_ptr, scale_of, offs_m, offs_r, M, R,
            SCALE_PER_ROW, HAS_ZERO_POINT,
        )  # fmt: skip
    else:
        h = acc.to(up_ptr.dtype.element_ty)
    for first in range(split * BLOCK_N, N, SPLITS * BLOCK_N):
        offs_n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (offs_n < N)[None, :] & (offs_r < R)[:, None]
        u = tl.load(up_ptr + offs_n[None, :] * stride_un + offs_r[:, None], mask=mask, other=0)
        if INT8:
            inner = tl.dot(h, u, out_dtype=tl.int32)
            if RAW:
                mask_y = (offs_m < M)[:, None] & (offs_n < N)[None, :]
                tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], inner, mask=mask_y)
            y = (inner.to(tl.float32) * h_scale[:, None]) * tl.load(
                up_scale_ptr + offs_n, mask=offs_n < N, other=0.0
            )[None, :]
        else:
            y = tl.dot(h, u, input_precision="ieee")
        if not RAW:
            _finish(
                y, bias_ptr, out_scale_ptr, out_zero_point_ptr, y_ptr, offs_m, offs_n, M, N, stride_ym,
                HAS_BIAS, HAS_OUT_ZERO_POINT, ACTIVATION, REQUANTIZE,
            )  # fmt: skip


@triton.jit
def _finish(
    y,
    bias_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    y_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
):
    mask_n = offs_n < N
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = _activate(y, ACTIVATION)
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    _store(y, y_ptrs, mask, out_scale_ptr, out_zero_point_ptr, REQUANTIZE, HAS_OUT_ZERO_POINT)

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""lowrank_linear's kernels: ``_fused``, one launch; ``_down`` then ``_up``, two with h in L2.

``_up`` is lowrank_conv2d's second launch too: its rows are pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import _tile
from ._lowrank_device import _end_down, _end_fused, _finish, _scaled


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    offs_m,
    offs_n,
    begin,
    end,
    M,
    N,
    stride_am,
    stride_bn,
    acc,
    BLOCK_K: tl.constexpr,
):
    """acc + a[offs_m, begin:end] b[offs_n, begin:end]^T; fp32 operands multiply in IEEE fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + (begin + offs_k)[None, :]
    b_ptrs = b_ptr + offs_n[None, :] * stride_bn + (begin + offs_k)[:, None]
    for start in range(begin, end, BLOCK_K):
        mask_k = offs_k < end - start
        a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0)
        b = tl.load(b_ptrs, mask=mask_n & mask_k[:, None], other=0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["M"])
def _down(
    x_ptr,
    down_ptr,
    x_scale_ptr,
    down_scale_ptr,
    zero_point_ptr,
    down_sums_ptr,
    partial_ptr,
    counter_ptr,
    h_ptr,
    h_scale_ptr,
    M,
    R,
    K,
    stride_xm,
    stride_dr,
    stride_hm,
    INT8: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = x down^T; int8: requantised per row (then R <= BLOCK_R). SPLITS programs share a tile's K."""
    pid = tl.program_id(0)
    tile = pid // SPLITS
    split = pid % SPLITS
    tiles_r = tl.cdiv(R, BLOCK_R)
    offs_m = (tile // tiles_r * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = (tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    begin = tl.minimum(split * share, K)
    end = tl.minimum(begin + share, K)
    if INT8:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc = _product(x_ptr, down_ptr, offs_m, offs_r, begin, end, M, R, stride_xm, stride_dr, acc, BLOCK_K)
    _end_down(
        acc, tile, split, x_scale_ptr, down_scale_ptr, zero_point_ptr, down_sums_ptr, partial_ptr,
        counter_ptr, h_ptr, h_scale_ptr, offs_m, offs_m, offs_r, M, R, stride_hm, INT8, SCALE_PER_ROW,
        HAS_ZERO_POINT, SPLITS, BLOCK_M, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _up(
    h_ptr,
    up_ptr,
    h_scale_ptr,
    up_scale_ptr,
    q_ptr,
    residual_ptr,
    q_scale_ptr,
    residual_scale_ptr,
    zero_point_ptr,
    residual_sums_ptr,
    bias_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    y_ptr,
    M,
    N,
    R,
    K,
    stride_hm,
    stride_un,
    stride_qm,
    stride_rn,
    stride_ym,
    INT8: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RAW: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = act(h up^T [* h_scale up_scale] + (q residual^T) * q_scale residual_scale + bias)."""
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if RESIDUAL:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        acc = _product(q_ptr, residual_ptr, offs_m, offs_n, 0, K, M, N, stride_qm, stride_rn, acc, BLOCK_K)
        if HAS_ZERO_POINT:
            sums = tl.load(residual_sums_ptr + offs_n, mask=offs_n < N, other=0)
            acc -= tl.load(zero_point_ptr) * sums[None, :]
        y = _scaled(acc, q_scale_ptr, residual_scale_ptr, offs_m, offs_m, offs_n, M, N, SCALE_PER_ROW)
    if INT8:
        inner = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        inner = _product(h_ptr, up_ptr, offs_m, offs_n, 0, R, M, N, stride_hm, stride_un, inner, BLOCK_R)
        if RAW:
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], inner, mask=mask)
        else:
            y += _scaled(inner, h_scale_ptr, up_scale_ptr, offs_m, offs_m, offs_n, M, N, True)
    else:
        y = _product(h_ptr, up_ptr, offs_m, offs_n, 0, R, M, N, stride_hm, stride_un, y, BLOCK_R)
    if not RAW:
        _finish(
            y, bias_ptr, out_scale_ptr, out_zero_point_ptr, y_ptr, offs_m, offs_n, M, N, stride_ym,
            HAS_BIAS, HAS_OUT_ZERO_POINT, ACTIVATION, REQUANTIZE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _fused(
    x_ptr,
    down_ptr,
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
    M,
    N,
    R,
    K,
    stride_xm,
    stride_dr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Both products in one program; R <= BLOCK_R. SPLITS programs share a row tile's N, each with an h."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    offs_m = (pid // SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    if INT8:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc = _product(x_ptr, down_ptr, offs_m, offs_r, 0, K, M, R, stride_xm, stride_dr, acc, BLOCK_K)
    _end_fused(
        acc, split, up_ptr, x_scale_ptr, down_scale_ptr, up_scale_ptr, zero_point_ptr, down_sums_ptr,
        bias_ptr, out_scale_ptr, out_zero_point_ptr, y_ptr, offs_m, offs_m, offs_r, M, N, R, stride_un,
        stride_ym, INT8, SCALE_PER_ROW, HAS_ZERO_POINT, HAS_BIAS, HAS_OUT_ZERO_POINT, ACTIVATION, RAW,
        REQUANTIZE, SPLITS, BLOCK_N,
    )  # fmt: skip

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""int8_linear in Triton, the portable GPU path: int8 [M, K] times int8 [N, K] transposed, exact int32 sums.

Float x goes through ``_quantize_rows`` first; weight-only layers are in ``_int8_linear_weight_only``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tautorch import tuning

from ._device import ACTIVATIONS, _activate, _store, _tile
from ._int8_linear_tiles import OUT_DTYPES, Config, candidates, check_last_stride, check_rows, choose
from ._int8_linear_weight_only import weight_only_matmul
from ._quantize_rows import quantize_rows

MAX_K = 66311
"""Largest K for which 255 * 127 * K fits in int32."""


@triton.jit(do_not_specialize=["M"])
def _int8_linear(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    zero_point_ptr,
    column_sums_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    SCALE_PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RAW: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[m, n] = act(acc * x_scale[m] * w_scale[n] + bias[n]), acc = sum_k (x[m, k] - zero_point) w[n, k]."""
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        mask_k = offs_k < K - start
        a = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0)
        b = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    if HAS_ZERO_POINT:
        sums = tl.load(column_sums_ptr + offs_n, mask=mask_n, other=0)
        acc -= tl.load(zero_point_ptr) * sums[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if RAW:
        tl.store(y_ptrs, acc, mask=mask)
    else:
        if SCALE_PER_ROW:
            x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        else:
            x_scale = tl.load(x_scale_ptr)
        w_scale = tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)
        y = (acc.to(tl.float32) * x_scale) * w_scale[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = _activate(y, ACTIVATION)
        _store(y, y_ptrs, mask, out_scale_ptr, out_zero_point_ptr, REQUANTIZE, HAS_OUT_ZERO_POINT)


def _capability(t: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(t.device) if t.is_cuda else (8, 0)


def matmul(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_zero_point: Tensor | None = None,
    column_sums: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    config: Config | None = None,
) -> Tensor:
    """int8 ``q`` [M, K] times int8 ``weight`` [N, K] transposed, with the epilogue, to ``out_dtype`` [M, N].

    ``x_scale`` is fp32 of 1 or M values, ``weight_scale`` fp32 [N], ``bias`` float [N]. ``column_sums``,
    int32 [N], holds sum_k weight[n, k]; it is made here when a zero point needs it and it was not given.
    ``out_dtype`` int32 gives the raw accumulators; int8 needs ``out_scale``.
    """
    check_last_stride("x", q)
    check_last_stride("weight", weight)
    (m, k), n = q.shape, weight.shape[0]
    if weight.shape[1] != k:
        raise ValueError(f"int8_linear: weight must be [N, K] with K={k} (from x), got {tuple(weight.shape)}")
    if k > MAX_K:
        raise ValueError(f"int8_linear: K must be at most {MAX_K} for exact int32 sums, got {k}")
    if out_dtype not in OUT_DTYPES or (out_dtype == torch.int8) != (out_scale is not None):
        given = "None" if out_scale is None else "a tensor"
        raise ValueError(
            f"int8_linear: out_dtype must be int8 with an out_scale and float or int32 without, got "
            f"{out_dtype} and out_scale {given}"
        )
    check_rows(m)
    y = torch.empty((m, n), dtype=out_dtype, device=q.device)
    if m == 0 or n == 0:
        return y
    if x_zero_point is not None and column_sums is None:
        column_sums = weight.sum(dim=1, dtype=torch.int32)

    def launch(c: Config) -> None:
        _int8_linear[(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n),)](
            q,
            weight,
            x_scale,
            weight_scale,
            bias,
            x_zero_point,
            column_sums,
            out_scale,
            out_zero_point,
            y,
            m,
            n,
            k,
            q.stride(0),
            weight.stride(0),
            y.stride(0),
            SCALE_PER_ROW=x_scale.numel() != 1,
            HAS_BIAS=bias is not None,
            HAS_ZERO_POINT=x_zero_point is not None,
            HAS_OUT_ZERO_POINT=out_zero_point is not None,
            ACTIVATION=ACTIVATIONS[activation],
            RAW=out_dtype == torch.int32,
            REQUANTIZE=out_scale is not None,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            GROUP_M=c.group_m,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            enable_fp_fusion=False,
        )

    if config is None:
        tuning.launch(
            q,
            ("int8_linear", tuning.rows_of(m), n, k),
            lambda: choose(m, n, k, _capability(q)),
            lambda: candidates(m),
            lambda found: tuning.tile(Config, found),
            launch,
        )
    else:
        launch(config)
    return y


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_only: bool = False,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    column_sums: Tensor | None = None,
) -> Tensor:
    """The operator's functional form on the Triton kernels: x [..., K] float or int8 -> [..., N].

    Arguments as in the operator; ``column_sums`` (int32 [N]) spares recomputing the weight's row sums under a
    static zero point. Dtypes and values are the caller's to check; what would read out of bounds is refused.
    """
    k, n = weight.shape[1], weight.shape[0]
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"int8_linear: x must be [..., {k}] (from weight), got {tuple(x.shape)}")
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    if x.is_floating_point() and weight_only:
        y = weight_only_matmul(
            rows if rows.stride(1) == 1 else rows.contiguous(),
            weight,
            weight_scale,
            bias,
            activation=activation,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
            out_dtype=out_dtype,
        )
        return y.reshape(*x.shape[:-1], n)
    if x.is_floating_point():
        dtype = out_dtype or x.dtype
        rows, row_scale = quantize_rows(rows, x_scale, x_zero_point)
        if x_scale is None:
            x_zero_point = None
    else:
        if x_scale is None:
            raise ValueError("int8_linear: int8 x needs x_scale, got None; pass the scale that made x")
        dtype = out_dtype or torch.float32
        row_scale = x_scale
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = matmul(
        rows,
        row_scale,
        weight,
        weight_scale,
        bias,
        x_zero_point=x_zero_point,
        column_sums=column_sums,
        activation=activation,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=torch.int8 if out_scale is not None else dtype,
    )
    return y.reshape(*x.shape[:-1], n)

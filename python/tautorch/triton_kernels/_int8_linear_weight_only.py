# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""int8_linear's weight-only product in Triton: float [M, K] times int8 [N, K] transposed, fp32 sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tautorch import tuning

from ._device import ACTIVATIONS, _activate, _store, _tile
from ._int8_linear_tiles import (
    OUT_DTYPES,
    Config,
    candidates,
    check_last_stride,
    check_rows,
    choose_weight_only,
)


@triton.jit(do_not_specialize=["M"])
def _weight_only_linear(
    x_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[m, n] = act(sum_k(x[m, k] w[n, k]) * w_scale[n] + bias[n]); int8 is exact in bf16, fp16 and fp32."""
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        mask_k = offs_k < K - start
        a = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0)
        acc = tl.dot(a, b.to(x_ptr.dtype.element_ty), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    w_scale = tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)
    y = acc * w_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = _activate(y, ACTIVATION)
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    _store(y, y_ptrs, mask, out_scale_ptr, out_zero_point_ptr, REQUANTIZE, HAS_OUT_ZERO_POINT)


def weight_only_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """Float ``x`` [M, K] times int8 ``weight`` [N, K] transposed, summed in fp32, to ``out_dtype`` (x's)."""
    check_last_stride("x", x)
    check_last_stride("weight", weight)
    (m, k), n = x.shape, weight.shape[0]
    if weight.shape[1] != k:
        raise ValueError(f"int8_linear: weight must be [N, K] with K={k} (from x), got {tuple(weight.shape)}")
    dtype = torch.int8 if out_scale is not None else out_dtype or x.dtype
    if dtype not in OUT_DTYPES or dtype == torch.int32 or (dtype == torch.int8) != (out_scale is not None):
        raise ValueError(
            f"int8_linear: out_dtype must be float where weight_only, got {dtype}; give out_scale for int8"
        )
    check_rows(m)
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return y

    def launch(c: Config) -> None:
        _weight_only_linear[(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n),)](
            x,
            weight,
            weight_scale,
            bias,
            out_scale,
            out_zero_point,
            y,
            m,
            n,
            k,
            x.stride(0),
            weight.stride(0),
            y.stride(0),
            HAS_BIAS=bias is not None,
            HAS_OUT_ZERO_POINT=out_zero_point is not None,
            ACTIVATION=ACTIVATIONS[activation],
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
            x,
            ("weight_only", tuning.rows_of(m), n, k, x.dtype),
            lambda: choose_weight_only(m, x.element_size()),
            lambda: candidates(m) if x.element_size() < 4 else [],
            lambda found: tuning.tile(Config, found),
            launch,
        )
    else:
        launch(config)
    return y

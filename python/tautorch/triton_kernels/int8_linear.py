# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""int8_linear in Triton: the portable GPU path, and its row quantiser.

Three kernels:

* ``_quantize_rows``: float [M, K] -> int8 [M, K] and an fp32 scale per row, by the quantiser contract.
* ``_int8_linear``: int8 [M, K] times int8 [N, K] transposed, exact int32 accumulation, the whole epilogue.
* ``_weight_only_linear``: float [M, K] times int8 [N, K] transposed, fp32 accumulation, the same epilogue.

Integers are exact because every float operation before rounding is one IEEE operation: ``div_rn``, products
that no addition can contract with (the launchers pass ``enable_fp_fusion=False``), and rounding to nearest
even by adding and subtracting 1.5 * 2**23, which is exact for the clamped range. libdevice's ``rint`` would
do the same but does not exist in the interpreter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tautorch import tuning

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
MAX_K = 66311
"""Largest K for which 255 * 127 * K fits in int32."""
MAX_ROWS = 2**31 - 256
"""A tile is at most 256 rows high, and its last row is counted in 32 bits."""
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32)

# tl.constexpr globals, because a jitted function may read no plain ones.
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23
_TINY = tl.constexpr(2.0**-100)
_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@triton.jit
def _rint(v):
    """Nearest integer, ties to even, of |v| <= 2**21."""
    return (v + _ROUND) - _ROUND


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


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """fp32 activation by its number in ACTIVATIONS. relu keeps NaN."""
    if ACTIVATION == 1:
        y = tl.where(y < 0.0, 0.0, y)
    if ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == 3:
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u))
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    if ACTIVATION == 4:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _store(
    y,
    y_ptrs,
    mask,
    out_scale_ptr,
    out_zero_point_ptr,
    REQUANTIZE: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
):
    """fp32 tile -> output dtype; to int8 through out_scale where REQUANTIZE. NaN becomes the zero point."""
    if REQUANTIZE:
        v = y * tl.div_rn(1.0, tl.load(out_scale_ptr))
        v = tl.where(v != v, 0.0, v)
        r = _rint(tl.minimum(tl.maximum(v, -512.0), 512.0)).to(tl.int32)
        if HAS_OUT_ZERO_POINT:
            r += tl.load(out_zero_point_ptr)
        r = tl.minimum(tl.maximum(r, -128), 127)
        tl.store(y_ptrs, r.to(tl.int8), mask=mask)
    else:
        tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's tile: GROUP_M row tiles share each column tile while it is in L2."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % (GROUP_M * tiles_n)) % size_m
    pid_n = (pid % (GROUP_M * tiles_n)) // size_m
    return pid_m, pid_n


@triton.jit
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


@triton.jit
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


@dataclass(frozen=True)
class Config:
    """One tile: block sizes, warps per program and software-pipelining depth."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


def choose(m: int, n: int, k: int, capability: tuple[int, int] = (8, 0)) -> Config:
    """The tile for an int8 [m, k] x [n, k] product, from the arguments alone: no tuning at run time."""
    if m <= 16:
        return Config(16, 64 if n >= 64 else 32, 256 if k >= 256 else 64, 4, 4)
    if m <= 64:
        return Config(64, 64, 128, 4, 4)
    if m <= 128 or n <= 128:
        return Config(64, 128, 128, 4, 3)
    if capability[0] >= 9 and m >= 512 and n >= 256:
        return Config(128, 256, 128, 8, 3)
    return Config(128, 128, 128, 8, 3)


def choose_weight_only(m: int, element_size: int) -> Config:
    """The tile for float [m, k] activations of ``element_size`` bytes; small for fp32, on the plain cores."""
    if element_size == 4:
        return Config(16, 32, 32, 4, 2) if m <= 16 else Config(32, 32, 32, 4, 2)
    if m <= 16:
        return Config(16, 64, 128, 4, 4)
    return Config(64, 128, 64, 4, 3)


def candidates(m: int) -> list[Config]:
    """What measuring tries beside the rule's choice: what suits the rows, wider and narrower."""
    if m <= 16:
        return [Config(16, 32, 256, 4, 4), Config(16, 64, 128, 4, 5), Config(16, 128, 128, 4, 4)]
    if m <= 64:
        return [Config(32, 64, 128, 4, 4), Config(64, 32, 256, 4, 3), Config(64, 128, 128, 4, 4)]
    found = [Config(64, 128, 128, 4, 4), Config(64, 256, 128, 8, 3), Config(128, 128, 128, 8, 4)]
    return [*found, Config(128, 128, 64, 4, 4), Config(128, 256, 64, 8, 4), Config(128, 256, 128, 8, 3)]


def _capability(t: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(t.device) if t.is_cuda else (8, 0)


def _check_last_stride(name: str, t: Tensor) -> None:
    if t.dim() != 2 or (t.shape[1] > 1 and t.stride(1) != 1):
        raise ValueError(
            f"int8_linear: {name} must be 2-D with adjacent elements in a row, got shape {tuple(t.shape)} "
            f"and strides {t.stride()}; call .contiguous()"
        )


def _check_rows(m: int) -> None:
    if m > MAX_ROWS:
        raise ValueError(f"int8_linear: x must have at most {MAX_ROWS} rows, got {m}; split the batch")


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
    _check_last_stride("x", q)
    _check_last_stride("weight", weight)
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
    _check_rows(m)
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
    _check_last_stride("x", x)
    _check_last_stride("weight", weight)
    (m, k), n = x.shape, weight.shape[0]
    if weight.shape[1] != k:
        raise ValueError(f"int8_linear: weight must be [N, K] with K={k} (from x), got {tuple(weight.shape)}")
    dtype = torch.int8 if out_scale is not None else out_dtype or x.dtype
    if dtype not in OUT_DTYPES or dtype == torch.int32 or (dtype == torch.int8) != (out_scale is not None):
        raise ValueError(
            f"int8_linear: out_dtype must be float where weight_only, got {dtype}; give out_scale for int8"
        )
    _check_rows(m)
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

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""sparse_linear with BxB blocks (16, 32, 64) in Triton: int8 and float values, block rows as in torch's BSR.

A program computes a tile of rows by one block row: it walks over the stored blocks of that row, ``CHUNK`` of
them at a time, so that small blocks still fill the matrix instructions' K. Dropped blocks are neither read
nor multiplied, and what x holds there does not reach the output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tautorch import tuning

from ._device import ACTIVATIONS, _activate, _store, _tile
from ._quantize_rows import quantize_rows

BLOCKS = (16, 32, 64)


@triton.jit(do_not_specialize=["M"])
def _block_sparse(
    x_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    zero_point_ptr,
    sums_ptr,
    out_scale_ptr,
    out_zero_point_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_ym,
    INT8: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_W_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RAW: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = act(sum over the stored blocks of x[:, block] values^T, scaled as in int8_linear, + bias)."""
    pid_m, block_row = _tile(M, N, BLOCK_M, B, GROUP_M)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = tl.arange(0, B)
    offs_n = (block_row * B + inside).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    begin = tl.load(crow_ptr + block_row).to(tl.int32)
    end = tl.load(crow_ptr + block_row + 1).to(tl.int32)
    # Columns of CHUNK blocks side by side: the block of each, and its column in the block.
    place = tl.arange(0, CHUNK * B)
    which = place // B
    column = place % B
    x_rows = x_ptr + offs_m[:, None] * stride_xm

    if INT8:
        acc = tl.zeros([BLOCK_M, B], dtype=tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, B], dtype=tl.float32)
    for at in range(begin, end, CHUNK):
        stored = which < end - at
        block_col = tl.load(col_ptr + at + which, mask=stored, other=0).to(tl.int32)
        # A block's columns are adjacent and start at a multiple of B: loads may be wide.
        offs_k = tl.max_contiguous(tl.multiple_of(block_col * B + column, B), B)
        good = stored & (offs_k < K)
        a = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & good[None, :], other=0)
        offs_v = (at + which).to(tl.int64) * (B * B) + column
        b = tl.load(values_ptr + offs_v[:, None] + inside[None, :] * B, mask=stored[:, None], other=0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)

    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_ZERO_POINT:
        sums = tl.load(sums_ptr + offs_n, mask=mask_n, other=0)
        acc -= tl.load(zero_point_ptr) * sums[None, :]
    if RAW:
        tl.store(y_ptrs, acc, mask=mask)
    else:
        y = acc.to(tl.float32)
        if INT8:
            if SCALE_PER_ROW:
                y *= tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
            else:
                y *= tl.load(x_scale_ptr)
        if HAS_W_SCALE:
            y *= tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = _activate(y, ACTIVATION)
        _store(y, y_ptrs, mask, out_scale_ptr, out_zero_point_ptr, REQUANTIZE, HAS_OUT_ZERO_POINT)


@dataclass(frozen=True)
class Config:
    """One tile: rows, blocks a step, warps per program and software-pipelining depth."""

    block_m: int
    chunk: int
    num_warps: int
    num_stages: int
    group_m: int = 8


def choose(m: int, block: int, element_size: int) -> Config:
    """The tile for ``m`` rows of ``element_size`` bytes a value: 128 bytes of a row of x at a step."""
    if element_size == 4:  # the plain cores
        return Config(16 if m <= 16 else 32, max(1, 32 // block), 4, 2)
    chunk = max(1, 128 // (block * element_size))
    if m <= 16:
        return Config(16, chunk, 4, 4)
    return Config(64 if m <= 64 else 128, chunk, 4, 4)


def candidates(m: int, block: int, element_size: int) -> list[Config]:
    """What measuring tries beside the rule's choice: other steps, depths and heights."""
    c = choose(m, block, element_size)
    found = [replace(c, num_stages=3), replace(c, chunk=2 * c.chunk, num_stages=3)]
    if element_size < 4 and c.chunk > 1 and c.chunk * block >= 64:
        found.append(replace(c, chunk=c.chunk // 2, num_stages=6))
    if c.block_m > 16 and element_size < 4:
        found += [replace(c, block_m=64), replace(c, block_m=128, num_warps=8)]
    return found


def sparse_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None = None,
    *,
    pattern: str,
    out_features: int,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_only: bool = False,
    row_sums: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """The operator on Triton, for arguments that passed its checks and a layout that passed ``check_layout``.

    ``values`` [blocks, B, B] are contiguous; float ones have x's dtype. ``row_sums``: int32 [N], of the
    weight's rows, needed with a zero point.
    """
    block, n, k = int(pattern.partition("x")[0]), out_features, x.shape[-1]
    if block not in BLOCKS:
        raise ValueError(f"sparse_linear: pattern must be 16x16, 32x32 or 64x64, got {pattern!r}")
    dtype = torch.int8 if out_scale is not None else out_dtype
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    rows = x.reshape(x.shape[:-1].numel(), k)
    m = rows.shape[0]
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return y.reshape(*x.shape[:-1], n)
    int8 = values.dtype == torch.int8 and not weight_only
    if int8 and rows.is_floating_point():
        given = x_scale
        rows, x_scale = quantize_rows(rows, x_scale, x_zero_point)
        if given is None:
            x_zero_point = None
    elif k > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()

    def launch(c: Config) -> None:
        tiles = triton.cdiv(m, c.block_m) * triton.cdiv(n, block)
        if tiles >= 2**31:
            raise ValueError(f"sparse_linear: x must have fewer rows, got {tiles} tiles; split the batch")
        with_zero_point = int8 and x_zero_point is not None
        _block_sparse[(tiles,)](
            rows, values, crow_indices, col_indices, x_scale if int8 else None, weight_scale, bias,
            x_zero_point if with_zero_point else None, row_sums if with_zero_point else None, out_scale,
            out_zero_point, y, m, n, k, rows.stride(0), y.stride(0),
            INT8=int8, SCALE_PER_ROW=int8 and x_scale is not None and x_scale.numel() != 1,
            HAS_W_SCALE=weight_scale is not None, HAS_BIAS=bias is not None, HAS_ZERO_POINT=with_zero_point,
            HAS_OUT_ZERO_POINT=out_zero_point is not None, ACTIVATION=ACTIVATIONS[activation],
            RAW=dtype == torch.int32, REQUANTIZE=out_scale is not None, B=block, CHUNK=c.chunk,
            BLOCK_M=c.block_m, GROUP_M=c.group_m, num_warps=c.num_warps, num_stages=c.num_stages,
            enable_fp_fusion=False,
        )  # fmt: skip

    if config is None:
        tuning.launch(
            x,
            ("sparse_linear", pattern, tuning.rows_of(m), n, k, rows.dtype, values.dtype),
            lambda: choose(m, block, rows.element_size()),
            lambda: candidates(m, block, rows.element_size()),
            lambda found: tuning.tile(Config, found),
            launch,
        )
    else:
        launch(config)
    return y.reshape(*x.shape[:-1], n)

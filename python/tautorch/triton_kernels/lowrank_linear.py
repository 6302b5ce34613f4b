# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""lowrank_linear in Triton: ``y = act(up (down x) + residual x + bias)`` with float or int8 factors.

Two ways to run it, chosen by shape:

* ``_fused``: one launch. A program keeps the intermediate of its rows in registers and walks over N. It
  reads both factors whole, so it pays only where they are small.
* ``_down`` then ``_up``: two launches, the intermediate in L2. ``_down`` has few output tiles, so it splits
  K; the program that comes last to a tile adds the parts in order (no float atomics: the same sums every
  run).

int8 factors: the intermediate is quantised per row by the quantiser contract, in the registers of
``_fused`` and ``_down``; the launchers pass ``enable_fp_fusion=False``. An int8 residual is multiplied
first, in ``_up``: its int32 accumulator is scaled in registers and the low-rank product added to it there.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tautorch import tuning

from . import int8_linear as dense
from ._lowrank_launch import (
    Residual,
    Tail,
    grid,
    inner_product,
    int8_options,
    multiprocessors,
    parts,
    up_product,
)
from ._lowrank_linear_kernels import _down, _fused
from ._lowrank_tiles import MAX_TILE_RANK, Config, Stage, candidates, choose, parse, tile_rank
from ._quantize_rows import quantize_rows

OP = "lowrank_linear"


def down_product(
    x: Tensor,
    down: Tensor,
    config: Stage,
    *,
    x_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    down_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``x`` [M, K] times ``down`` [r, K] transposed: ``x.dtype`` [M, r], or int8 and its scales fp32 [M]."""
    (m, k), r = x.shape, down.shape[0]
    int8 = x.dtype == torch.int8
    if int8 and r > config.block_n:
        assert x_scale is not None and down_scale is not None
        h = dense.matmul(x, x_scale, down, down_scale, x_zero_point=x_zero_point, column_sums=down_sums)
        return quantize_rows(h)
    h, h_scale = inner_product(m, r, x.dtype, x.device)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(r, config.block_n)
    if tiles == 0:
        return h, h_scale
    partial, counters = parts(tiles, config, int8, x.device)
    values, (zero_point, sums) = int8_options(x_scale, x_zero_point, down_sums, int8)
    _down[grid(OP, tiles * config.splits)](
        x, down, x_scale, down_scale, zero_point, sums, partial, counters, h, h_scale, m, r, k,
        x.stride(0), down.stride(0), h.stride(0),
        **values, SPLITS=config.splits, BLOCK_M=config.block_m, BLOCK_R=config.block_n,
        BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return h, h_scale


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    down_sums: Tensor | None = None,
    residual_sums: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """The operator on Triton kernels, for arguments that passed its checks; x [..., K] -> [..., N].

    Factors and residual have adjacent elements in a row; float factors have x's dtype, which the intermediate
    takes too. ``down_sums``, ``residual_sums``: int32 sums of rows, needed with a zero point.
    """
    (r, k), n = down.shape, up.shape[0]
    dtype = torch.int8 if out_scale is not None else out_dtype
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    tail = Tail(bias, activation, out_scale, out_zero_point, dtype)
    rows = x.reshape(x.shape[:-1].numel(), k)
    m = rows.shape[0]
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return y.reshape(*x.shape[:-1], n)
    int8 = down.dtype == torch.int8
    if config is None:
        size, added, processors = down.element_size(), residual is not None, multiprocessors(x)

        def launch(c: Config) -> Tensor:
            return lowrank_linear(
                x, down, up, bias, down_scale=down_scale, up_scale=up_scale, x_scale=x_scale,
                x_zero_point=x_zero_point, residual=residual, residual_scale=residual_scale,
                down_sums=down_sums, residual_sums=residual_sums, activation=activation, out_scale=out_scale,
                out_zero_point=out_zero_point, out_dtype=out_dtype, config=c,
            )  # fmt: skip

        return tuning.launch(
            x,
            (OP, tuning.rows_of(m), n, k, r, down.dtype, added),
            lambda: choose(m, n, k, r, size, added, processors),
            lambda: candidates(m, n, k, r, size, added, processors),
            parse,
            launch,
        )
    if config.down is None and (residual is not None or tile_rank(r, 2) > MAX_TILE_RANK):
        raise ValueError(f"{OP}: one launch takes no residual and r <= 256, got r={r}")
    q, q_scale = rows, x_scale
    if rows.is_floating_point() and (int8 or residual is not None):
        q, q_scale = quantize_rows(rows, x_scale, x_zero_point)
        if x_scale is None:
            x_zero_point = None
    operand = q if int8 else rows
    if k > 1 and operand.stride(1) != 1:
        operand = operand.contiguous()
    if q.dtype == torch.int8:
        q = operand if int8 else q
    if config.down is None:
        _run_fused(
            operand, down, up, q_scale if int8 else None, down_scale, up_scale, x_zero_point, down_sums, tail,
            config.up, y,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], n)
    h, h_scale = down_product(
        operand,
        down,
        config.down,
        x_scale=q_scale if int8 else None,
        down_scale=down_scale,
        x_zero_point=x_zero_point,
        down_sums=down_sums,
    )
    extra = None
    if residual is not None:
        extra = Residual(q, residual, q_scale, residual_scale, x_zero_point, residual_sums)
    up_product(OP, h, h_scale, up, up_scale, extra, tail, config.up, y)
    return y.reshape(*x.shape[:-1], n)


def _run_fused(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    x_scale: Tensor | None,
    down_scale: Tensor | None,
    up_scale: Tensor | None,
    x_zero_point: Tensor | None,
    down_sums: Tensor | None,
    tail: Tail,
    c: Stage,
    y: Tensor,
) -> None:
    (m, k), n, r = x.shape, up.shape[0], down.shape[0]
    values, (zero_point, sums) = int8_options(x_scale, x_zero_point, down_sums, x.dtype == torch.int8)
    _fused[grid(OP, triton.cdiv(m, c.block_m) * c.splits)](
        x, down, up, x_scale, down_scale, up_scale, zero_point, sums, tail.bias, tail.out_scale,
        tail.out_zero_point, y, m, n, r, k, x.stride(0), down.stride(0), up.stride(0), y.stride(0),
        **values, **tail.options(), SPLITS=c.splits, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        BLOCK_K=c.block_k, BLOCK_R=tile_rank(r, x.element_size()), num_warps=c.num_warps,
        num_stages=c.num_stages, enable_fp_fusion=False,
    )  # fmt: skip

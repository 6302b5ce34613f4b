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

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tautorch import tuning

from . import int8_linear as dense
from .int8_linear import ACTIVATIONS, _activate, _rint, _store, _tile, quantize_rows

MAX_TILE_RANK = 256
"""The largest rank whose intermediate fits one tile; int8 factors beyond it take a launch to quantise."""

_TINY = tl.constexpr(2.0**-100)
_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


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
def _scaled(acc, x_scale_ptr, scale_ptr, offs_m, offs_r, M, R, SCALE_PER_ROW: tl.constexpr):
    """int32 accumulators -> fp32: (acc * x_scale[m]) * scale[r], 0 in columns past R."""
    if SCALE_PER_ROW:
        x_scale = tl.load(x_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    else:
        x_scale = tl.load(x_scale_ptr)
    scale = tl.load(scale_ptr + offs_r, mask=offs_r < R, other=0.0)
    h = (acc.to(tl.float32) * x_scale) * scale[None, :]
    return tl.where((offs_r < R)[None, :], h, 0.0)


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


@triton.jit
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
            if HAS_ZERO_POINT:
                sums = tl.load(down_sums_ptr + offs_r, mask=offs_r < R, other=0)
                acc -= tl.load(zero_point_ptr) * sums[None, :]
            h = _scaled(acc, x_scale_ptr, down_scale_ptr, offs_m, offs_r, M, R, SCALE_PER_ROW)
            q, scale = _quantize_tile(h)
            tl.store(h_ptrs, q, mask=mask)
            tl.store(h_scale_ptr + offs_m, scale, mask=offs_m < M)
        else:
            tl.store(h_ptrs, acc.to(h_ptr.dtype.element_ty), mask=mask)


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


@triton.jit
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
        y = _scaled(acc, q_scale_ptr, residual_scale_ptr, offs_m, offs_n, M, N, SCALE_PER_ROW)
    if INT8:
        inner = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        inner = _product(h_ptr, up_ptr, offs_m, offs_n, 0, R, M, N, stride_hm, stride_un, inner, BLOCK_R)
        if RAW:
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], inner, mask=mask)
        else:
            y += _scaled(inner, h_scale_ptr, up_scale_ptr, offs_m, offs_n, M, N, True)
    else:
        y = _product(h_ptr, up_ptr, offs_m, offs_n, 0, R, M, N, stride_hm, stride_un, y, BLOCK_R)
    if not RAW:
        _finish(
            y, bias_ptr, out_scale_ptr, out_zero_point_ptr, y_ptr, offs_m, offs_n, M, N, stride_ym,
            HAS_BIAS, HAS_OUT_ZERO_POINT, ACTIVATION, REQUANTIZE,
        )  # fmt: skip


@triton.jit
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
    if INT8:
        if HAS_ZERO_POINT:
            sums = tl.load(down_sums_ptr + offs_r, mask=offs_r < R, other=0)
            acc -= tl.load(zero_point_ptr) * sums[None, :]
        v = _scaled(acc, x_scale_ptr, down_scale_ptr, offs_m, offs_r, M, R, SCALE_PER_ROW)
        h, h_scale = _quantize_tile(v)
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


@dataclass(frozen=True)
class Stage:
    """Tile of one launch; ``splits`` programs share a tile's K (down) or a row tile's N (fused)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    group_m: int = 8


@dataclass(frozen=True)
class Config:
    """``down`` None: one launch, of ``up``'s tile."""

    down: Stage | None
    up: Stage


def tile_rank(r: int, element_size: int) -> int:
    """Columns of a tile that holds ``r`` of them: a power of two, no less than a matrix instruction's K."""
    return max(32 if element_size == 1 else 16, int(triton.next_power_of_2(r)))


def fits_one_tile(r: int, element_size: int) -> bool:
    """Whether one program can hold the intermediate of a row tile."""
    return element_size < 4 and tile_rank(r, element_size) <= MAX_TILE_RANK


def choose(
    m: int, n: int, k: int, r: int, element_size: int, residual: bool = False, multiprocessors: int = 132
) -> Config:
    """Tiles from the arguments alone; element_size 1: int8 factors."""
    config = two_launches(m, n, k, r, element_size, residual, multiprocessors)
    # In one launch every row tile reads both factors from L2: only small ones are worth it.
    small = r * (k + n) * element_size <= 1 << 18
    if residual or not small or not fits_one_tile(r, element_size):
        return config
    return one_launch(m, n, k, r, element_size, multiprocessors)


def one_launch(m: int, n: int, k: int, r: int, element_size: int, multiprocessors: int = 132) -> Config:
    """The tile of ``_fused``."""
    wide = tile_rank(r, element_size) > 128
    block_m = 16 if m <= 16 * multiprocessors else 32 if m <= 32 * multiprocessors or wide else 64
    block_n = 64
    splits = max(1, min(multiprocessors // triton.cdiv(max(m, 1), block_m), triton.cdiv(n, block_n), 16))
    return Config(None, Stage(block_m, block_n, 64 if wide else 128 // element_size, 4, 3, splits))


def two_launches(
    m: int, n: int, k: int, r: int, element_size: int, residual: bool = False, multiprocessors: int = 132
) -> Config:
    """The tiles of ``_down`` and ``_up``."""
    if element_size == 4:  # the plain cores
        down, up = Stage(32, 32, 32, 4, 2), Stage(32, 32, 32, 4, 2)
    else:
        whole = tile_rank(r, element_size)
        block_r = min(whole, MAX_TILE_RANK if element_size == 1 else 128)
        block_m = 16 if m <= 16 else 64 if m <= 64 * multiprocessors or block_r > 128 else 128
        block_k = 128 // element_size
        warps = 8 if block_m * block_r >= 64 * 128 or (block_m, block_r) == (16, 128) else 4
        down = Stage(block_m, block_r, block_k, warps, 4 if block_r <= 128 else 3)
        if residual:
            # 128 x 128 at most; int8 factors have a second accumulator beside the residual's.
            tile = dense.choose(m, n, k, (8, 0))
            if element_size == 1 and tile.block_m * tile.block_n >= 64 * 128:
                tile = replace(tile, block_m=64, block_n=128, num_warps=8)
            up = Stage(tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)
        elif m <= 16:
            up = Stage(16, 64, 32, 4, 2)
        elif m <= 64:
            up = Stage(64, 64, 32, 4, 2)
        else:
            up = Stage(128, 128, 32, 8, 2)
    tiles = triton.cdiv(max(m, 1), down.block_m) * triton.cdiv(max(r, 1), down.block_n)
    # Each part at least four steps long, and no more parts than multiprocessors.
    splits = min(multiprocessors // tiles, k // (4 * down.block_k), 32)
    return Config(replace(down, splits=max(1, splits)), up)


def candidates(
    m: int, n: int, k: int, r: int, element_size: int, residual: bool, multiprocessors: int
) -> list[Config]:
    """What measuring tries beside the rule's choice: the other way, other splits, other tiles of ``_up``."""
    two = two_launches(m, n, k, r, element_size, residual, multiprocessors)
    assert two.down is not None
    found = [two]
    for splits in {max(1, two.down.splits // 2), min(2 * two.down.splits, max(1, k // two.down.block_k))}:
        found.append(Config(replace(two.down, splits=splits), two.up))
    if element_size < 4:
        for up in (Stage(64, 128, two.up.block_k, 4, 3), Stage(64, 64, two.up.block_k, 4, 3)):
            found.append(Config(two.down, up))
    if not residual and fits_one_tile(r, element_size):
        one = one_launch(m, n, k, r, element_size, multiprocessors)
        found += [one, Config(None, replace(one.up, splits=max(1, one.up.splits // 2)))]
        found.append(Config(None, replace(one.up, block_m=64, num_warps=8, splits=one.up.splits)))
    return found


def parse(values: Any) -> Config:
    """A choice from a table of ``tuning``."""
    down, up = values
    return Config(None if down is None else tuning.tile(Stage, down), tuning.tile(Stage, up))


_zeros: dict[tuple[int, int], Tensor] = {}


def _counters(count: int, device: torch.device) -> Tensor:
    """int32 zeros, which ``_down`` leaves as zeros. One per stream: its launches follow each other."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A graph has its own, cleared at every replay.
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    kept = _zeros.get(key)
    if kept is None or kept.numel() < count:
        kept = _zeros[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept


def _grid(programs: int) -> tuple[int]:
    if programs >= 2**31:
        raise ValueError(f"lowrank_linear: x must have fewer rows, got {programs} tiles; split the batch")
    return (programs,)


def _int8_options(
    x_scale: Tensor | None, zero_point: Tensor | None, sums: Tensor | None, int8: bool
) -> tuple[dict[str, Any], tuple[Tensor | None, Tensor | None]]:
    with_zero_point = int8 and zero_point is not None
    per_row = int8 and x_scale is not None and x_scale.numel() != 1
    values = {"INT8": int8, "SCALE_PER_ROW": per_row, "HAS_ZERO_POINT": with_zero_point}
    return values, ((zero_point, sums) if with_zero_point else (None, None))


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
    wide = triton.cdiv(r, 16) * 16  # rows start on 16 bytes
    h = torch.empty((m, wide), dtype=x.dtype, device=x.device)[:, :r]
    h_scale = torch.empty(m, dtype=torch.float32, device=x.device) if int8 else None
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(r, config.block_n)
    if tiles == 0:
        if h_scale is not None:
            h_scale.fill_(1.0)
        return h, h_scale
    partial = counters = None
    if config.splits > 1:
        size = tiles * config.splits * config.block_m * config.block_n
        partial = torch.empty(size, dtype=torch.int32 if int8 else torch.float32, device=x.device)
        counters = _counters(tiles, x.device)
    values, (zero_point, sums) = _int8_options(x_scale, x_zero_point, down_sums, int8)
    _down[_grid(tiles * config.splits)](
        x, down, x_scale, down_scale, zero_point, sums, partial, counters, h, h_scale, m, r, k,
        x.stride(0), down.stride(0), wide,
        **values, SPLITS=config.splits, BLOCK_M=config.block_m, BLOCK_R=config.block_n,
        BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return h, h_scale


@dataclass(frozen=True)
class Tail:
    """Bias, activation and output of a call."""

    bias: Tensor | None
    activation: str
    out_scale: Tensor | None
    out_zero_point: Tensor | None
    out_dtype: torch.dtype

    def options(self) -> dict[str, Any]:
        """Compile-time constants of ``_up`` and ``_fused``."""
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_OUT_ZERO_POINT": self.out_zero_point is not None,
            "ACTIVATION": ACTIVATIONS[self.activation],
            "RAW": self.out_dtype == torch.int32,
            "REQUANTIZE": self.out_scale is not None,
        }


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
        size, added, processors = down.element_size(), residual is not None, _multiprocessors(x)

        def launch(c: Config) -> Tensor:
            return lowrank_linear(
                x, down, up, bias, down_scale=down_scale, up_scale=up_scale, x_scale=x_scale,
                x_zero_point=x_zero_point, residual=residual, residual_scale=residual_scale,
                down_sums=down_sums, residual_sums=residual_sums, activation=activation, out_scale=out_scale,
                out_zero_point=out_zero_point, out_dtype=out_dtype, config=c,
            )  # fmt: skip

        return tuning.launch(
            x,
            ("lowrank_linear", tuning.rows_of(m), n, k, r, down.dtype, added),
            lambda: choose(m, n, k, r, size, added, processors),
            lambda: candidates(m, n, k, r, size, added, processors),
            parse,
            launch,
        )
    if config.down is None and (residual is not None or tile_rank(r, 2) > MAX_TILE_RANK):
        raise ValueError(f"lowrank_linear: one launch takes no residual and r <= 256, got r={r}")
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
    c = config.up
    values, (zero_point, sums) = _int8_options(q_scale, x_zero_point, residual_sums, residual is not None)
    has_residual = values.pop("INT8")
    with_residual = (q, residual, q_scale, residual_scale) if has_residual else (None,) * 4
    block_r = min(tile_rank(r, h.element_size()), 128 // h.element_size())
    _up[_grid(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n))](
        h, up, h_scale, up_scale, *with_residual, zero_point, sums, bias, out_scale, out_zero_point, y, m, n,
        r, k, h.stride(0), up.stride(0), q.stride(0), residual.stride(0) if residual is not None else 0,
        y.stride(0),
        **values, **tail.options(), INT8=int8, RESIDUAL=has_residual, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        BLOCK_K=c.block_k, BLOCK_R=block_r, GROUP_M=c.group_m, num_warps=c.num_warps,
        num_stages=c.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
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
    values, (zero_point, sums) = _int8_options(x_scale, x_zero_point, down_sums, x.dtype == torch.int8)
    _fused[_grid(triton.cdiv(m, c.block_m) * c.splits)](
        x, down, up, x_scale, down_scale, up_scale, zero_point, sums, tail.bias, tail.out_scale,
        tail.out_zero_point, y, m, n, r, k, x.stride(0), down.stride(0), up.stride(0), y.stride(0),
        **values, **tail.options(), SPLITS=c.splits, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
        BLOCK_K=c.block_k, BLOCK_R=tile_rank(r, x.element_size()), num_warps=c.num_warps,
        num_stages=c.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def _multiprocessors(x: Tensor) -> int:
    if not x.is_cuda:
        return 132
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""lowrank_conv2d in Triton: a kh x kw convolution to r channels, then a 1x1 one; one group, channels-last.

lowrank_linear with windows for rows: its tiles, its ways to share K and its second launch.

* ``_fused``: one launch. A program keeps the r channels of its pixels in registers and walks over outputs.
* ``_down``, then lowrank_linear's ``_up``: two launches, the r channels in L2.

int8 factors: x is quantised by sample, the r channels by pixel, in the registers of ``_fused`` and ``_down``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tautorch import tuning

from . import _lowrank_tiles as tiles
from ._lowrank_device import _end_down, _end_fused
from ._lowrank_launch import Tail, grid, inner_product, int8_options, multiprocessors, parts, up_product
from ._lowrank_tiles import MAX_TILE_RANK, Config, Stage, parse, tile_rank
from ._quantize_rows import quantize_rows
from ._windows import Windows, _window_product, empty_output, image_of
from .int8_conv2d import int8_conv2d

OP = "lowrank_conv2d"


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
    stride_hm,
    C,
    H,
    W,
    OH,
    OW,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    INT8: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h [M, R]: windows times down [R, kh, kw, C]; int8: requantised by pixel (then R <= BLOCK_R)."""
    pid = tl.program_id(0)
    tile = pid // SPLITS
    split = pid % SPLITS
    tiles_r = tl.cdiv(R, BLOCK_R)
    row = tile // tiles_r * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = (tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    steps = KERNEL_H * KERNEL_W * tl.cdiv(C, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    begin = tl.minimum(split * share, steps)
    end = tl.minimum(begin + share, steps)
    if INT8:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc = _window_product(
        x_ptr, down_ptr, zero_point_ptr, row, offs_r, begin, end, M, R, C, H, W, OH, OW, acc, STRIDE_H,
        STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, KERNEL_H, KERNEL_W, HAS_ZERO_POINT, BLOCK_K,
    )  # fmt: skip
    _end_down(
        acc, tile, split, x_scale_ptr, down_scale_ptr, zero_point_ptr, down_sums_ptr, partial_ptr,
        counter_ptr, h_ptr, h_scale_ptr, row // (OH * OW), row.to(tl.int64), offs_r, M, R, stride_hm, INT8,
        SCALE_PER_ROW, HAS_ZERO_POINT, SPLITS, BLOCK_M, BLOCK_R,
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
    stride_un,
    C,
    H,
    W,
    OH,
    OW,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
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
    """Both products; R <= BLOCK_R. SPLITS programs share a tile of pixels' outputs, each with an h."""
    pid = tl.program_id(0)
    row = pid // SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    if INT8:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc = _window_product(
        x_ptr, down_ptr, zero_point_ptr, row, offs_r, 0, KERNEL_H * KERNEL_W * tl.cdiv(C, BLOCK_K), M, R, C,
        H, W, OH, OW, acc, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, KERNEL_H, KERNEL_W,
        HAS_ZERO_POINT, BLOCK_K,
    )  # fmt: skip
    _end_fused(
        acc, pid % SPLITS, up_ptr, x_scale_ptr, down_scale_ptr, up_scale_ptr, zero_point_ptr, down_sums_ptr,
        bias_ptr, out_scale_ptr, out_zero_point_ptr, y_ptr, row // (OH * OW), row.to(tl.int64), offs_r, M, N,
        R, stride_un, N, INT8, SCALE_PER_ROW, HAS_ZERO_POINT, HAS_BIAS, HAS_OUT_ZERO_POINT, ACTIVATION, RAW,
        REQUANTIZE, SPLITS, BLOCK_N,
    )  # fmt: skip


def for_channels(config: Config, c: int, element_size: int) -> Config:
    """A tile with steps no longer than ``c`` channels fill: a step lies in one tap."""
    longest = tile_rank(c, element_size)
    down, up = config.down, config.up
    if down is not None:
        # By 8 warps, ptxas spills 16 bytes of 64 x 128's addresses on compute capability 8.9.
        warps = 4 if (down.block_m, down.block_n) == (64, 128) else down.num_warps
        down = replace(down, block_k=min(down.block_k, longest), num_warps=warps)
    return Config(down, replace(up, block_k=min(up.block_k, longest)))


def choose(windows: Windows, n: int, r: int, element_size: int, multiprocessors: int = 132) -> Config:
    """lowrank_linear's choice for as many rows and as long an inner product."""
    k = windows.taps * windows.c
    config = tiles.choose(windows.rows, n, k, r, element_size, False, multiprocessors)
    return for_channels(config, windows.c, element_size)


def candidates(windows: Windows, n: int, r: int, element_size: int, multiprocessors: int) -> list[Config]:
    """What measuring tries beside the rule's choice: what lowrank_linear does."""
    k = windows.taps * windows.c
    found = tiles.candidates(windows.rows, n, k, r, element_size, False, multiprocessors)
    return [for_channels(config, windows.c, element_size) for config in found]


def lowrank_conv2d(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    down_sums: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """The operator on Triton, for arguments that passed its checks and one group.

    Args:
        x: ``[B, C, H, W]``; other memory than channels-last is copied.
        down: ``[r, kh, kw, C]``, contiguous: the canonical one with its channels last.
        up: ``[O, r]``, elements of a row adjacent. Float factors have x's dtype; the intermediate takes it.
        down_sums: int32 ``[r]`` of down's rows, needed with a zero point.

    Returns:
        ``[B, O, OH, OW]`` in channels-last memory.
    """
    (r, kh, kw, _), n = down.shape, up.shape[0]
    windows = Windows.of(OP, x, (kh, kw), stride, padding, dilation)
    dtype = torch.int8 if out_scale is not None else out_dtype
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    tail = Tail(bias, activation, out_scale, out_zero_point, dtype)
    y = empty_output(windows, n, dtype, x.device)
    if windows.rows == 0:
        return y.permute(0, 3, 1, 2)
    int8, size, processors = down.dtype == torch.int8, down.element_size(), multiprocessors(x)
    image, x_scale, x_zero_point = image_of(x, int8, x_scale, x_zero_point)
    values, (zero_point, sums) = int8_options(x_scale, x_zero_point, down_sums, int8)

    def one_launch(c: Stage) -> None:
        if tile_rank(r, 2) > MAX_TILE_RANK:
            raise ValueError(f"{OP}: one launch takes r <= {MAX_TILE_RANK}, got r={r}")
        _fused[grid(OP, triton.cdiv(windows.rows, c.block_m) * c.splits)](
            image, down, up, x_scale, down_scale, up_scale, zero_point, sums, bias, out_scale, out_zero_point,
            y, windows.rows, n, r, up.stride(0), *windows.sizes(), **windows.options(),
            **values, **tail.options(), SPLITS=c.splits, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
            BLOCK_K=c.block_k, BLOCK_R=tile_rank(r, size), num_warps=c.num_warps, num_stages=c.num_stages,
            enable_fp_fusion=False,
        )  # fmt: skip

    def first_launch(c: Stage) -> tuple[Tensor, Tensor | None]:
        m = windows.rows
        if int8 and r > c.block_n:
            assert x_scale is not None and down_scale is not None
            h = int8_conv2d(
                image.permute(0, 3, 1, 2), down, down_scale, stride=stride, padding=padding,
                dilation=dilation, x_scale=x_scale, x_zero_point=zero_point, row_sums=sums,
                out_dtype=torch.float32,
            )  # fmt: skip
            return quantize_rows(h.permute(0, 2, 3, 1).reshape(m, r))
        h, h_scale = inner_product(m, r, image.dtype, x.device)
        count = triton.cdiv(m, c.block_m) * triton.cdiv(r, c.block_n)
        partial, counters = parts(count, c, int8, x.device)
        _down[grid(OP, count * c.splits)](
            image, down, x_scale, down_scale, zero_point, sums, partial, counters, h, h_scale, m, r,
            h.stride(0), *windows.sizes(), **windows.options(),
            **values, SPLITS=c.splits, BLOCK_M=c.block_m, BLOCK_R=c.block_n, BLOCK_K=c.block_k,
            num_warps=c.num_warps, num_stages=c.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
        return h, h_scale

    def launch(c: Config) -> None:
        if c.down is None:
            one_launch(c.up)
        else:
            up_product(OP, *first_launch(c.down), up, up_scale, None, tail, c.up, y.reshape(windows.rows, n))

    if config is None:
        tuning.launch(
            x,
            (OP, tuning.rows_of(windows.rows), n, r, *windows.key(), down.dtype),
            lambda: choose(windows, n, r, size, processors),
            lambda: candidates(windows, n, r, size, processors),
            parse,
            launch,
        )
    else:
        launch(config)
    return y.permute(0, 3, 1, 2)

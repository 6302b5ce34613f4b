# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""int8_conv2d in Triton: implicit GEMM over channels-last int8, one group, the whole epilogue.

Rows are output pixels, columns output channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tautorch import tuning

from ._device import ACTIVATIONS, _activate, _store, _tile
from ._int8_linear_tiles import Config
from ._windows import Windows, _window_product, empty_output, image_of


@triton.jit(do_not_specialize=["M"])
def _int8_conv2d(
    x_ptr,
    w_ptr,
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
    SCALE_PER_SAMPLE: tl.constexpr,
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
    """y[b, oh, ow, o]: x [B, H, W, C] and w [O, kh, kw, C] contiguous, M = B OH OW."""
    pid_m, pid_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = row.to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    acc = _window_product(
        x_ptr, w_ptr, zero_point_ptr, row, offs_n, 0, KERNEL_H * KERNEL_W * tl.cdiv(C, BLOCK_K), M, N, C, H,
        W, OH, OW, acc, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, KERNEL_H, KERNEL_W,
        HAS_ZERO_POINT, BLOCK_K,
    )  # fmt: skip

    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_ZERO_POINT:
        acc -= tl.load(zero_point_ptr) * tl.load(sums_ptr + offs_n, mask=mask_n, other=0)[None, :]
    if RAW:
        tl.store(y_ptrs, acc, mask=mask)
    else:
        if SCALE_PER_SAMPLE:
            x_scale = tl.load(x_scale_ptr + row // (OH * OW), mask=mask_m, other=0.0)[:, None]
        else:
            x_scale = tl.load(x_scale_ptr)
        y = (acc.to(tl.float32) * x_scale) * tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = _activate(y, ACTIVATION)
        _store(y, y_ptrs, mask, out_scale_ptr, out_zero_point_ptr, REQUANTIZE, HAS_OUT_ZERO_POINT)


def choose(m: int, n: int, c: int) -> Config:
    """The tile for ``m`` output pixels, ``n`` output and ``c`` input channels."""
    block_k = min(128, max(32, int(triton.next_power_of_2(c))))
    if m <= 64 or n <= 64:
        return Config(64, 64, block_k, 4, 4)
    if m * n <= 128 * 128 * 132:  # smaller tiles where large ones leave multiprocessors idle
        return Config(64, 128, block_k, 4, 3)
    return Config(128, 128, block_k, 8, 3)


def candidates(m: int, n: int, c: int) -> list[Config]:
    """What measuring tries beside the rule's choice."""
    found = [Config(64, 64, 128, 4, 4), Config(64, 128, 128, 4, 3), Config(128, 128, 128, 8, 3)]
    found += [Config(128, 64, 128, 4, 3), Config(128, 128, 64, 8, 4)]
    return [replace(f, block_k=min(f.block_k, choose(m, n, c).block_k)) for f in found]


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    row_sums: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """The operator on Triton, for arguments that passed its checks and one group.

    Args:
        x: ``[B, C, H, W]``; other memory than channels-last is copied.
        weight: int8 ``[O, kh, kw, C]``, contiguous: the canonical one with its channels last.
        row_sums: int32 ``[O]`` of the weight, needed with a zero point.

    Returns:
        ``[B, O, OH, OW]`` in channels-last memory.
    """
    n, kh, kw, c = weight.shape
    windows = Windows.of("int8_conv2d", x, (kh, kw), stride, padding, dilation)
    dtype = torch.int8 if out_scale is not None else out_dtype
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    m = windows.rows
    y = empty_output(windows, n, dtype, x.device)
    if m == 0:
        return y.permute(0, 3, 1, 2)
    image, x_scale, x_zero_point = image_of(x, True, x_scale, x_zero_point)
    assert x_scale is not None

    def launch(t: Config) -> None:
        _int8_conv2d[(triton.cdiv(m, t.block_m) * triton.cdiv(n, t.block_n),)](
            image, weight, x_scale, weight_scale, bias, x_zero_point,
            row_sums if x_zero_point is not None else None, out_scale, out_zero_point, y, m, n,
            *windows.sizes(), **windows.options(),
            SCALE_PER_SAMPLE=x_scale.numel() != 1, HAS_BIAS=bias is not None,
            HAS_ZERO_POINT=x_zero_point is not None, HAS_OUT_ZERO_POINT=out_zero_point is not None,
            ACTIVATION=ACTIVATIONS[activation], RAW=dtype == torch.int32, REQUANTIZE=out_scale is not None,
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_K=t.block_k, GROUP_M=t.group_m,
            num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=False,
        )  # fmt: skip

    if config is None:
        tuning.launch(
            x,
            ("int8_conv2d", tuning.rows_of(m), n, *windows.key()),
            lambda: choose(m, n, c),
            lambda: candidates(m, n, c),
            lambda found: tuning.tile(Config, found),
            launch,
        )
    else:
        launch(config)
    return y.permute(0, 3, 1, 2)

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What the convolutions share in Triton: windows of a channels-last image as the rows of a product.

Rows are output pixels. Padding is read as the zero point, so that the correction by the weight's sums holds
for every pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._int8_linear_tiles import MAX_ROWS
from ._quantize_rows import quantize_rows


@triton.jit
def _window_product(
    x_ptr,
    w_ptr,
    zero_point_ptr,
    row,
    offs_n,
    begin,
    end,
    M,
    N,
    C,
    H,
    W,
    OH,
    OW,
    acc,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + steps begin to end of windows [row] times w [offs_n]: over taps and, in each, chunks of channels.

    x [B, H, W, C] and w [N, kh, kw, C] are contiguous; fp32 operands multiply in IEEE fp32.
    """
    mask_m = row < M
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    image = (row // (OH * OW)).to(tl.int64) * H
    top = row // OW % OH * STRIDE_H - PAD_H
    left = row % OW * STRIDE_W - PAD_W
    if HAS_ZERO_POINT:
        zero = tl.load(zero_point_ptr)
    chunks = tl.cdiv(C, BLOCK_K)
    wide = KERNEL_H * KERNEL_W * C
    for step in range(begin, end):
        tap = step // chunks
        channel = step % chunks * BLOCK_K + offs_k
        mask_k = channel < C
        h = top + tap // KERNEL_W * DILATION_H
        w = left + tap % KERNEL_W * DILATION_W
        inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = ((image + h) * W + w)[:, None] * C + channel[None, :]
        a = tl.load(x_ptr + at, mask=inside[:, None] & mask_k[None, :], other=0)
        if HAS_ZERO_POINT:
            a = tl.where(inside[:, None], a, zero.to(tl.int8))
        weight = offs_n[None, :] * wide + (tap * C + channel)[:, None]
        b = tl.load(w_ptr + weight, mask=mask_n[None, :] & mask_k[:, None], other=0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


class Windows(NamedTuple):
    """Sizes of a convolution's rows; ``C`` to ``OW`` are arguments of the kernels in this order."""

    batch: int
    c: int
    h: int
    w: int
    oh: int
    ow: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls,
        op: str,
        x: Tensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Windows:
        """Of x [B, C, H, W]; ValueError where its output pixels cannot be counted in 32 bits."""
        b, c, h, w = x.shape
        oh, ow = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip((h, w), kernel, stride, padding, dilation, strict=True)
        )
        if b * oh * ow > MAX_ROWS:
            raise ValueError(
                f"{op}: x must give at most {MAX_ROWS} pixels, got {b * oh * ow}; split the batch"
            )
        return cls(b, c, h, w, oh, ow, kernel, stride, padding, dilation)

    @property
    def rows(self) -> int:
        """Output pixels."""
        return self.batch * self.oh * self.ow

    @property
    def taps(self) -> int:
        """kh * kw."""
        return self.kernel[0] * self.kernel[1]

    def sizes(self) -> tuple[int, int, int, int, int]:
        """C, H, W, OH, OW."""
        return self[1:6]

    def options(self) -> dict[str, int]:
        """Compile-time constants."""
        names = ("KERNEL", "STRIDE", "PAD", "DILATION")
        return {
            f"{name}_{side}": pair[i]
            for name, pair in zip(names, self[6:], strict=True)
            for i, side in enumerate("HW")
        }

    def key(self) -> tuple[int, ...]:
        """What tells one from another when tiles are looked up."""
        return (*self.sizes()[:3], *self.kernel, *self.stride, *self.padding, *self.dilation)


def image_of(
    x: Tensor, int8: bool, x_scale: Tensor | None, x_zero_point: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [B, C, H, W] as contiguous [B, H, W, C], quantised by sample if ``int8`` and floating.

    Returns:
        The image, its scales, its zero point.
    """
    image = x.permute(0, 2, 3, 1).contiguous()
    if not int8 or not image.is_floating_point():
        return image, x_scale, x_zero_point
    q, scale = quantize_rows(image.reshape(image.shape[0], -1), x_scale, x_zero_point)
    return q.reshape(image.shape), scale, None if x_scale is None else x_zero_point


def empty_output(windows: Windows, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, OH, OW, n], not yet written."""
    return torch.empty((windows.batch, windows.oh, windows.ow, n), dtype=dtype, device=device)

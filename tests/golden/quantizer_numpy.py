"""The quantiser and the operators' integers in numpy alone: nothing here is shared with the product.

Inputs come from splitmix64 (Steele, Lea, Flood 2014), so that no library's generator can change them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = np.float32
Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]


def bits(count: int, seed: int) -> npt.NDArray[np.uint64]:
    """``count`` words of splitmix64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def integers(shape: tuple[int, ...], low: int, high: int, seed: int) -> Int:
    """int64 in [low, high]."""
    span = np.uint64(high - low + 1)
    return (bits(int(np.prod(shape)), seed) % span).astype(np.int64).reshape(shape) + low


def floats(shape: tuple[int, ...], seed: int) -> Float:
    """fp32 in (-1, 1) times a power of two of its row; every value a multiple of 2**-23 of that power."""
    mantissa = integers(shape, -(2**23) + 1, 2**23 - 1, seed).astype(F32)
    exponent = integers((shape[0],), -40, 10, seed + 1).reshape(-1, *[1] * (len(shape) - 1))
    return np.ldexp(mantissa, exponent - 23).astype(F32)


def quantize_rows(x: Float) -> tuple[Int, Float]:
    """Dynamic quantisation of [M, K]: q and scale [M]."""
    q, scale = np.zeros(x.shape, np.int64), np.ones(x.shape[0], F32)
    for m, row in enumerate(x):
        if not np.isfinite(row).all():
            scale[m] = np.nan
            continue
        amax = np.abs(row).max(initial=F32(0))
        if amax >= F32(2.0**-100):
            scale[m] = amax / F32(127)
            q[m] = np.clip(np.rint(row * (F32(127) / amax)), -127, 127)
    return q, scale


def quantize_static(x: Float, scale: Float, zero_point: int) -> Int:
    """Static quantisation of [M, K]: q; a row with NaN or Inf is all zero point."""
    q = np.full(x.shape, zero_point, np.int64)
    for m, row in enumerate(x):
        if np.isfinite(row).all():
            q[m] = np.clip(np.rint(row * (F32(1) / scale)) + F32(zero_point), -128, 127)
    return q


def keep(shape: tuple[int, int], pattern: str, groups: int, seed: int) -> npt.NDArray[np.bool_]:
    """A mask of [N, K] that obeys ``pattern``: about half of the blocks."""
    n, k = shape
    if pattern == "2:4":
        mask = np.zeros(shape, bool)
        for row, group in np.ndindex(n, -(-k // 4)):
            first, second = integers((2,), 0, 3, seed + row * 8191 + group)
            for place in {int(first), int(second)}:
                if 4 * group + place < k:
                    mask[row, 4 * group + place] = True
        return mask
    height, width = {"unstructured": (1, 1), "4x1": (4, 1)}.get(pattern) or (
        int(pattern[:2]),
        int(pattern[:2]),
    )
    per_group = n // groups
    drawn = integers((groups, -(-per_group // height), -(-k // width)), 0, 1, seed).astype(bool)
    full = drawn.repeat(height, axis=1)[:, :per_group].repeat(width, axis=2)[:, :, :k]
    return full.reshape(shape)


def convolve(x: Int, weight: Int, stride: int, padding: int, dilation: int, groups: int) -> Int:
    """int64 [B, O, OH, OW] of centred x [B, I, H, W]: shifted slices added tap by tap."""
    o, i, kh, kw = weight.shape
    b, _, h, w = x.shape
    oh = (h + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
    ow = (w + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
    padded = np.zeros((b, x.shape[1], h + 2 * padding, w + 2 * padding), np.int64)
    padded[:, :, padding : padding + h, padding : padding + w] = x
    out = np.zeros((b, o, oh, ow), np.int64)
    for ky, kx in np.ndindex(kh, kw):
        top, left = ky * dilation, kx * dilation
        taps = padded[
            :, :, top : top + (oh - 1) * stride + 1 : stride, left : left + (ow - 1) * stride + 1 : stride
        ]
        for g in range(groups):
            part, rows = taps[:, g * i : (g + 1) * i], slice(g * (o // groups), (g + 1) * (o // groups))
            out[:, rows] += np.einsum("bihw,oi->bohw", part, weight[rows, :, ky, kx])
    return out

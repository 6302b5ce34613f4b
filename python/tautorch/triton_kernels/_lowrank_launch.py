# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What the launchers of the low-rank kernels share: counters, options, h, and the second launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._device import ACTIVATIONS
from ._lowrank_linear_kernels import _up
from ._lowrank_tiles import Stage, tile_rank

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


def parts(
    tiles: int, config: Stage, int8: bool, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Where programs that share a tile leave their parts, and their counters; None where none do."""
    if config.splits == 1:
        return None, None
    size = tiles * config.splits * config.block_m * config.block_n
    partial = torch.empty(size, dtype=torch.int32 if int8 else torch.float32, device=device)
    return partial, _counters(tiles, device)


def grid(op: str, programs: int) -> tuple[int]:
    """ValueError where the device cannot count the programs."""
    if programs >= 2**31:
        raise ValueError(f"{op}: x must have fewer rows, got {programs} tiles; split the batch")
    return (programs,)


def int8_options(
    x_scale: Tensor | None, zero_point: Tensor | None, sums: Tensor | None, int8: bool
) -> tuple[dict[str, Any], tuple[Tensor | None, Tensor | None]]:
    """Compile-time constants of an int8 product, and the zero point with the sums that it takes, or None."""
    with_zero_point = int8 and zero_point is not None
    per_row = int8 and x_scale is not None and x_scale.numel() != 1
    values = {"INT8": int8, "SCALE_PER_ROW": per_row, "HAS_ZERO_POINT": with_zero_point}
    return values, ((zero_point, sums) if with_zero_point else (None, None))


@dataclass(frozen=True)
class Tail:
    """Bias, activation and output of a call."""

    bias: Tensor | None
    activation: str
    out_scale: Tensor | None
    out_zero_point: Tensor | None
    out_dtype: torch.dtype

    def options(self) -> dict[str, Any]:
        """Compile-time constants of the last launch."""
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_OUT_ZERO_POINT": self.out_zero_point is not None,
            "ACTIVATION": ACTIVATIONS[self.activation],
            "RAW": self.out_dtype == torch.int32,
            "REQUANTIZE": self.out_scale is not None,
        }


class Residual(NamedTuple):
    """An int8 product that the second launch adds: x [M, K] and weight [N, K], their scales, zero point."""

    q: Tensor
    weight: Tensor
    q_scale: Tensor | None
    weight_scale: Tensor | None
    zero_point: Tensor | None
    sums: Tensor | None


def inner_product(m: int, r: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """h [M, r], not yet written, whose rows start on 16 bytes, and its scales if it is int8."""
    h = torch.empty((m, triton.cdiv(r, 16) * 16), dtype=dtype, device=device)[:, :r]
    scale = torch.empty(m, dtype=torch.float32, device=device) if dtype == torch.int8 else None
    if m and not r and scale is not None:
        scale.fill_(1.0)
    return h, scale


def up_product(
    op: str,
    h: Tensor,
    h_scale: Tensor | None,
    up: Tensor,
    up_scale: Tensor | None,
    residual: Residual | None,
    tail: Tail,
    c: Stage,
    y: Tensor,
) -> None:
    """The second launch: y [M, N] from h [M, r] and up [N, r]."""
    (m, r), n = h.shape, up.shape[0]
    added = residual is not None
    q, weight, q_scale, weight_scale, zero_point, sums = residual or (None,) * 6
    values, (zero_point, sums) = int8_options(q_scale, zero_point, sums, added)
    del values["INT8"]
    block_r = min(tile_rank(r, h.element_size()), 128 // h.element_size())
    k, strides = (
        (q.shape[1], (q.stride(0), weight.stride(0))) if q is not None and weight is not None else (0, (0, 0))
    )
    _up[grid(op, triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n))](
        h, up, h_scale, up_scale, q, weight, q_scale, weight_scale, zero_point, sums, tail.bias,
        tail.out_scale, tail.out_zero_point, y, m, n, r, k, h.stride(0), up.stride(0), *strides, y.stride(0),
        **values, **tail.options(), INT8=h.dtype == torch.int8, RESIDUAL=added, BLOCK_M=c.block_m,
        BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=block_r, GROUP_M=c.group_m, num_warps=c.num_warps,
        num_stages=c.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def multiprocessors(x: Tensor) -> int:
    """Of the device of x; the interpreter's are an H200's."""
    if not x.is_cuda:
        return 132
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)

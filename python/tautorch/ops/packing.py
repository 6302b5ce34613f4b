"""Packed weights: memory for them, dense packs, and their headers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tautorch import _C

# The kinds of csrc/kernels/common/pack.h.
DENSE_I8, DENSE_F32, DENSE_W8, SPARSE_I8, SPARSE_F32, DEPTHWISE_I8, PAIRS_I8, GROUPED_I8 = range(8)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def with_memory(tensor: Tensor) -> Tensor:
    """The tensor, which a kernel writes to; RuntimeError under a mode that makes tensors without memory."""
    if tensor.numel() and (isinstance(tensor, FakeTensor) or not tensor.data_ptr()):
        raise RuntimeError(
            f"tautorch: weights are packed and unpacked in memory, got a {type(tensor).__name__} without; "
            "do it before FakeTensorMode"
        )
    return tensor


def pack_buffer(size: int) -> Tensor:
    """uint8 ``[size]`` for packed weights; large ones start on a huge page, which packing then asks for."""
    huge = 2 << 20
    if size < huge:
        return with_memory(torch.empty(size, dtype=torch.uint8, device="cpu"))
    whole = with_memory(torch.empty(size + huge, dtype=torch.uint8, device="cpu"))
    return whole[-whole.data_ptr() % huge :][:size]


def dense_pack(
    kernel: str, kind: int, w: Tensor, groups: int, n: int, k: int, taps: int, strides: tuple[int, int, int]
) -> Tensor:
    """Packed weights (uint8) of contiguous ``w``, element (n, k, tap) at the given strides."""
    out = pack_buffer(_C.dense_pack_bytes(kernel, kind, groups, n, k, taps))
    _C.dense_pack(kernel, kind, groups, n, k, taps, w.data_ptr(), *strides, out.data_ptr())
    return out


def pack_info(packed: Tensor) -> dict[str, int | str]:
    """Header of packed weights; raises ValueError where a tensor is none, or no contiguous bytes."""
    if packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(
            f"packed weights must be contiguous uint8 [bytes], got {list(packed.shape)} with strides "
            f"{packed.stride()}; clone them"
        )
    return _C.pack_info(packed.data_ptr(), packed.numel())


def check_pack(
    op: str, name: str, packed: Tensor, outputs: int, weights: int, groups: int | None = None
) -> None:
    """Raise ValueError where a pack has other outputs, or another number of weights, than its arguments say.

    Kernels size their reads and writes by the pack.
    """
    info = pack_info(packed)
    n, k, taps, held = (int(info[key]) for key in ("n", "k", "taps", "groups"))
    if (held * n, held * n * k * taps) != (outputs, weights):
        raise ValueError(
            f"{op}: packed {name} must hold {outputs} outputs and {weights} weights, got {held * n} and "
            f"{held * n * k * taps}; pack it again"
        )
    if groups is not None and held != groups:
        raise ValueError(f"{op}: packed {name} must have {groups} groups, got {held}; pack it again")

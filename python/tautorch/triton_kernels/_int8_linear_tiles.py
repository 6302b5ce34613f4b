"""Tiles of int8_linear's Triton kernels, and the checks that both products share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 2**31 - 256
"""A tile is at most 256 rows high, and its last row is counted in 32 bits."""
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32)


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


def check_last_stride(name: str, t: Tensor) -> None:
    """ValueError unless rows of a 2-D tensor have adjacent elements."""
    if t.dim() != 2 or (t.shape[1] > 1 and t.stride(1) != 1):
        raise ValueError(
            f"int8_linear: {name} must be 2-D with adjacent elements in a row, got shape {tuple(t.shape)} "
            f"and strides {t.stride()}; call .contiguous()"
        )


def check_rows(m: int) -> None:
    """ValueError where rows cannot be counted in 32 bits."""
    if m > MAX_ROWS:
        raise ValueError(f"int8_linear: x must have at most {MAX_ROWS} rows, got {m}; split the batch")

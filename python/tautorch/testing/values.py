"""Nasty numbers: the sizes around tiles, and the values that break quantisers and kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILES: tuple[int, ...] = (4, 8, 16, 32, 64)
"""Widths that the kernels' registers, panels and K steps come in."""


def around(tile: int) -> tuple[int, int, int, int]:
    """The sizes at which a tile of ``tile`` goes wrong: 1, T-1, T, T+1."""
    return 1, tile - 1, tile, tile + 1


LINEAR_SIZES: tuple[tuple[int, int, int], ...] = (
    (0, 5, 7),
    (1, 1, 1),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (4, 7, 8),
    (5, 8, 9),
    (6, 9, 15),
    (7, 15, 16),
    (8, 16, 17),
    (9, 17, 31),
    (1, 31, 32),
    (13, 32, 33),
    (15, 33, 63),
    (16, 63, 64),
    (17, 64, 65),
    (1, 65, 127),
    (31, 67, 129),
    (33, 97, 131),
    (65, 48, 257),
    (2, 129, 300),
    (12, 16, 512),
    (1, 257, 1021),
)
"""(M, N, K): around every tile, primes, empty, one row."""

CONV_SIZES: tuple[dict[str, object], ...] = (
    {"x": (1, 1, 1, 1), "w": (1, 1, 1, 1)},
    {"x": (0, 3, 5, 5), "w": (4, 3, 3, 3)},
    {"x": (1, 3, 5, 5), "w": (5, 3, 3, 3), "padding": 1},
    {"x": (2, 4, 7, 9), "w": (17, 4, 3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"x": (1, 16, 8, 8), "w": (16, 16, 3, 3), "padding": 1},
    {"x": (3, 17, 6, 5), "w": (33, 17, 1, 1)},
    {"x": (1, 8, 9, 9), "w": (12, 4, 3, 3), "padding": 2, "dilation": 2, "groups": 2},
    {"x": (2, 6, 7, 7), "w": (6, 1, 3, 3), "padding": 1, "groups": 6},
    {"x": (1, 33, 5, 5), "w": (33, 1, 5, 5), "padding": 2, "stride": 2, "groups": 33},
    {"x": (1, 5, 11, 3), "w": (7, 5, 5, 3), "padding": (4, 1), "dilation": (2, 1)},
    {"x": (1, 32, 4, 4), "w": (64, 32, 3, 3), "padding": 1, "stride": 2},
    {"x": (2, 12, 5, 6), "w": (20, 3, 2, 2), "groups": 4, "stride": 3, "padding": 3},
)
"""Input and weight shapes ([B, I, H, W], [O, I/g, kh, kw]) and the convolution's arguments."""

INT8_PATTERNS: tuple[str, ...] = ("random", "lowest", "highest", "extremes", "equal", "zeros")
FLOAT_PATTERNS: tuple[str, ...] = (
    "normal",
    "zeros",
    "equal",
    "tiny",
    "threshold",
    "ties",
    "mixed",
    "nan_row",
    "inf_row",
)


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, so that cases do not depend on the order they are made in."""
    return torch.Generator().manual_seed(seed)


def int8_values(shape: tuple[int, ...], pattern: str = "random", *, seed: int = 0, low: int = -128) -> Tensor:
    """int8 tensor of ``shape`` in [low, 127]; weights take ``low=-127``."""
    if pattern == "lowest":
        return torch.full(shape, low, dtype=torch.int8)
    if pattern == "highest":
        return torch.full(shape, 127, dtype=torch.int8)
    if pattern == "equal":
        return torch.full(shape, 77, dtype=torch.int8)
    if pattern == "zeros":
        return torch.zeros(shape, dtype=torch.int8)
    drawn = torch.randint(low, 128, shape, generator=generator(seed), dtype=torch.int8)
    if pattern == "extremes":
        return torch.where(drawn < 0, low, 127).to(torch.int8)
    if pattern == "random":
        return drawn
    raise ValueError(f"int8_values: pattern must be one of {', '.join(INT8_PATTERNS)}, got {pattern!r}")


def float_values(shape: tuple[int, ...], pattern: str = "normal", *, seed: int = 0) -> Tensor:
    """fp32 tensor of ``shape``.

    ``tiny`` lies below the quantiser's 2**-100, ``threshold`` on it and one step either side, ``ties`` lands
    on halves once scaled, ``mixed`` spreads rows over 40 binades, ``nan_row`` and ``inf_row`` spoil the first
    leading index (and hold an ordinary rest).
    """
    normal = torch.randn(shape, generator=generator(seed))
    if pattern == "normal" or normal.numel() == 0:
        return normal
    if pattern == "zeros":
        return torch.zeros(shape)
    if pattern == "equal":
        return torch.full(shape, -0.37)
    if pattern == "tiny":
        return normal.clamp(-1, 1) * 2.0**-101
    if pattern == "threshold":
        edge = torch.tensor(2.0**-100)
        steps = torch.stack([torch.nextafter(edge, torch.tensor(0.0)), edge, torch.nextafter(edge, edge * 2)])
        return (
            (steps.repeat(math.ceil(shape[0] / 3))[: shape[0]])
            .reshape(-1, *[1] * (len(shape) - 1))
            .expand(shape)
            .clone()
        )
    if pattern == "ties":
        ties = torch.randint(-253, 254, shape, generator=generator(seed)).float() / 2
        ties.reshape(shape[0], -1)[:, 0] = 127.0  # the row's scale is 1, so k + 1/2 stays a tie
        return ties
    if pattern == "mixed":
        exponents = torch.randint(-20, 21, (shape[0],), generator=generator(seed + 1)).float()
        return normal * torch.exp2(exponents).reshape(-1, *[1] * (len(shape) - 1))
    if pattern in ("nan_row", "inf_row"):
        normal.reshape(shape[0], -1)[0, -1] = math.nan if pattern == "nan_row" else -math.inf
        return normal
    raise ValueError(f"float_values: pattern must be one of {', '.join(FLOAT_PATTERNS)}, got {pattern!r}")


def sparse_mask(
    shape: tuple[int, ...], pattern: str, keep: float, *, groups: int = 1, seed: int = 0
) -> Tensor:
    """bool mask of ``shape`` that obeys ``pattern``, about ``keep`` of it True ("2:4" keeps 0 to 2 of 4)."""
    rows, cols = shape[0], math.prod(shape[1:])
    gen = generator(seed)
    if pattern == "2:4":
        drawn = torch.rand(rows, -(-cols // 4), 4, generator=gen)
        rank = drawn.argsort(-1).argsort(-1)
        mask = ((rank < 2) & (torch.rand(drawn.shape, generator=gen) < 2 * keep)).reshape(rows, -1)[:, :cols]
        return mask.reshape(shape).contiguous()
    height, width = {"unstructured": (1, 1), "4x1": (4, 1)}.get(pattern) or tuple(
        map(int, pattern.split("x"))
    )
    per_group = rows // groups
    blocks = torch.rand(groups, -(-per_group // height), -(-cols // width), generator=gen) < keep
    full = blocks.repeat_interleave(height, 1)[:, :per_group].repeat_interleave(width, 2)[:, :, :cols]
    return full.reshape(shape).contiguous()

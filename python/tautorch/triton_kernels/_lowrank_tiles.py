# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Tiles of the low-rank kernels: one launch or two, and of which sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton

from tautorch import tuning

from . import _int8_linear_tiles as dense

MAX_TILE_RANK = 256
"""The largest rank whose intermediate fits one tile; int8 factors beyond it take a launch to quantise."""


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

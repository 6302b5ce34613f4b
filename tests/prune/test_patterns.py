"""Masks against a block-by-block computation in numpy, and what bad input gets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tautorch.prune import make_global_masks, make_mask

SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((8, 12), 1),
    ((1, 1), 1),
    ((13, 7), 1),
    ((65, 33), 1),
    ((12, 3, 3, 3), 1),
    ((12, 3, 3, 3), 2),
    ((10, 2, 1, 1), 5),
    ((34, 5, 3, 1), 2),
]
BLOCKS = {
    "unstructured": (1, 1),
    "4x1": (4, 1),
    "16x16": (16, 16),
    "32x32": (32, 32),
    "64x64": (64, 64),
}


def blocks_of(shape: tuple[int, ...], groups: int, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Every block as (rows, columns) of the matrix view, group by group, row by row."""
    rows, cols = shape[0] // groups, math.prod(shape[1:])
    return [
        (slice(g * rows + r, g * rows + min(r + size[0], rows)), slice(c, min(c + size[1], cols)))
        for g in range(groups)
        for r in range(0, rows, size[0])
        for c in range(0, cols, size[1])
    ]


def removed_by_hand(
    score: np.ndarray[Any, Any], groups: int, size: tuple[int, int], sparsity: float
) -> np.ndarray[Any, Any]:
    """The kept mask of the matrix: floor(sparsity * blocks) of the lowest means are gone."""
    matrix = score.reshape(score.shape[0], -1)
    blocks = blocks_of(score.shape, groups, size)
    means = [matrix[block].mean() for block in blocks]
    keep = np.ones(matrix.shape, dtype=bool)
    for index in sorted(range(len(blocks)), key=lambda i: means[i])[
        : math.floor(sparsity * len(blocks) + 1e-9)
    ]:
        keep[blocks[index]] = False
    return keep.reshape(score.shape)


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.99])
def test_the_lowest_blocks_go(
    pattern: str, shape: tuple[int, ...], groups: int, sparsity: float, rng: np.random.Generator
) -> None:
    score = rng.random(shape)
    mask = make_mask(torch.from_numpy(score), pattern, sparsity, groups)
    assert mask.dtype == torch.bool
    assert mask.shape == shape
    np.testing.assert_array_equal(mask.numpy(), removed_by_hand(score, groups, BLOCKS[pattern], sparsity))
    assert mask.any()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_n_of_m_keeps_the_n_highest_of_each_m(
    pattern: str, shape: tuple[int, ...], groups: int, rng: np.random.Generator
) -> None:
    n, m = map(int, pattern.split(":"))
    score = rng.random(shape)
    mask = make_mask(torch.from_numpy(score), pattern, 1 - n / m, groups).reshape(shape[0], -1).numpy()
    matrix = score.reshape(shape[0], -1)
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], m):
            part, kept = matrix[row, start : start + m], mask[row, start : start + m]
            assert set(np.flatnonzero(kept)) == set(np.argsort(part)[::-1][:n])


def test_rows_rank_alone(rng: np.random.Generator) -> None:
    score = rng.random((9, 8)) * np.arange(1, 10)[:, None]
    mask = make_mask(torch.from_numpy(score), "unstructured", 0.5, ranking="row").numpy()
    assert (mask.sum(1) == 4).all()
    for row in range(9):
        assert score[row][mask[row]].min() > score[row][~mask[row]].max()
    blocks = make_mask(torch.from_numpy(score), "4x1", 0.5, ranking="row").numpy()
    assert (blocks.sum(1) == 4).all()
    assert (blocks[0:4] == blocks[0]).all()
    assert (blocks[4:8] == blocks[4]).all()


def test_equal_scores_go_in_order() -> None:
    assert make_mask(torch.ones(2, 4), "unstructured", 0.5).tolist() == [[False] * 4, [True] * 4]
    assert make_mask(torch.ones(1, 4), "2:4", 0.5).tolist() == [[False, False, True, True]]


def test_a_short_tail_block_competes_by_its_mean() -> None:
    score = torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0]])
    assert make_mask(score, "4x1", 0.5).flatten().tolist() == [False] * 4 + [True]


def test_global_ranking_compares_layers_and_spares_the_best_block(rng: np.random.Generator) -> None:
    big, small = rng.random((8, 8)) + 1, rng.random((4, 8)) * 0.1
    masks = make_global_masks(
        {"big": torch.from_numpy(big), "small": torch.from_numpy(small)}, "4x1", 0.5, {"big": 1, "small": 1}
    )
    # 96 weights, 48 to go: all of small but its best block (28), then 5 blocks of big.
    kept_small = masks["small"].numpy()
    assert kept_small.sum() == 4
    assert kept_small[0].argmax() == small.mean(0).argmax()
    assert (~masks["big"]).sum() == 20
    means = np.concatenate([big[:4].mean(0), big[4:].mean(0)])
    gone = np.concatenate([~masks["big"].numpy()[0], ~masks["big"].numpy()[4]])
    assert set(np.flatnonzero(gone)) == set(np.argsort(means)[:5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pattern": "3x3"}, ValueError, r"make_mask: pattern must be .* got '3x3'"),
        ({"pattern": "4:2"}, ValueError, "pattern must be"),
        ({"pattern": "4:4"}, ValueError, "pattern must be"),
        ({"pattern": None}, ValueError, "pattern must be"),
        ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": -0.1}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": math.nan}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": "half"}, TypeError, "sparsity must be a number"),
        ({"pattern": "2:4", "sparsity": 0.75}, ValueError, "sparsity must be 0.5 for pattern 2:4"),
        ({"groups": 3}, ValueError, "groups must divide the 8 outputs, got 3"),
        ({"groups": 0}, ValueError, "groups must divide"),
        ({"ranking": "best"}, ValueError, "ranking must be one of"),
        ({"ranking": "global"}, ValueError, 'ranking must be "local" or "row"'),
        ({"score": torch.full((8, 8), math.nan)}, ValueError, "score must be finite"),
        ({"score": torch.ones(8)}, ValueError, "score must be"),
        ({"score": torch.ones(0, 8)}, ValueError, "score must be"),
        ({"score": torch.ones(8, 8, dtype=torch.int32)}, TypeError, "score must be a floating point tensor"),
        ({"score": [[1.0]]}, TypeError, "score must be a floating point tensor"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"score": torch.rand(8, 8), "pattern": "4x1", "sparsity": 0.5, "groups": 1}
    with pytest.raises(error, match=message):
        make_mask(**(arguments | change))

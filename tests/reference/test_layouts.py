"""Canonical layouts against loops over blocks, and every error a bad layout or mask earns."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tautorch.reference.layouts import (
    PATTERNS,
    block_shape,
    check_layout,
    decode,
    encode,
    index_dtype,
    unpack_positions,
)
from tautorch.testing.values import float_values, int8_values, sparse_mask

BLOCKED = [p for p in PATTERNS if p != "2:4"]


def by_hand(
    weight: Tensor, mask: Tensor, pattern: str, groups: int
) -> tuple[list[int], list[int], list[Tensor]]:
    """crow, col and blocks of a CSR/BSR layout by plain loops."""
    height, width = block_shape(pattern)
    n = weight.shape[0]
    matrix, kept = weight.reshape(n, -1), mask.reshape(n, -1)
    per_group = n // groups
    crow, col, blocks = [0], [], []
    for start in range(0, n, per_group):
        for row in range(start, start + per_group, height):
            stop = min(row + height, start + per_group)
            for c in range(0, matrix.shape[1], width):
                if kept[row:stop, c : c + width].any():
                    block = torch.zeros(height, width, dtype=weight.dtype)
                    part = matrix[row:stop, c : c + width]
                    block[: part.shape[0], : part.shape[1]] = part
                    col.append(c // width)
                    blocks.append(block)
            crow.append(len(col))
    return crow, col, blocks


SHAPES = [
    ((1, 1), 1),
    ((4, 1), 1),
    ((5, 7), 1),
    ((66, 130), 1),
    ((18, 3, 3, 3), 1),
    ((18, 3, 3, 3), 3),
    ((12, 5), 2),
]


@pytest.mark.parametrize("pattern", BLOCKED)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_encode_matches_loops(pattern: str, shape: tuple[int, ...], groups: int) -> None:
    weight = int8_values(shape, seed=1)
    mask = sparse_mask(shape, pattern, 0.5, groups=groups, seed=2)
    values, crow, col = encode(weight, mask, pattern, groups)
    expected_crow, expected_col, blocks = by_hand(weight, mask, pattern, groups)
    assert crow is not None
    assert crow.tolist() == expected_crow
    assert col.tolist() == expected_col
    height, width = block_shape(pattern)
    stacked = torch.stack(blocks) if blocks else torch.empty(0, height, width, dtype=torch.int8)
    assert torch.equal(values, stacked.reshape(-1) if pattern == "unstructured" else stacked)
    assert crow.dtype == col.dtype == torch.int16
    assert torch.equal(decode(values, crow, col, pattern, shape, groups), weight * mask)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (2, 8), (9, 13), (4, 3, 3, 3)])
def test_two_of_four_matches_loops(shape: tuple[int, ...]) -> None:
    weight = float_values(shape, seed=1)
    mask = sparse_mask(shape, "2:4", 0.4, seed=2)
    values, crow, positions = encode(weight, mask, "2:4")
    n, k = shape[0], weight[0].numel()
    padded = -(-k // 8) * 8
    assert crow is None
    assert values.shape == (n, padded // 2)
    assert positions.shape == (n, padded // 8)
    assert positions.dtype == torch.uint8
    matrix, kept = weight.reshape(n, k), mask.reshape(n, k)
    for row in range(n):
        for group in range(padded // 4):
            places = [p for p in range(4) if 4 * group + p < k and kept[row, 4 * group + p]]
            free = [p for p in range(4) if p not in places]
            chosen = sorted(places + free[: 2 - len(places)])
            for i, place in enumerate(chosen):
                at = 2 * group + i
                assert int(positions[row, at // 4]) >> (2 * (at % 4)) & 3 == place
                stored = matrix[row, 4 * group + place] if place in places else 0
                assert values[row, at] == stored
    assert torch.equal(decode(values, None, positions, "2:4", shape), weight * mask)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 90),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_round_trip(pattern: str, groups: int, rows: int, cols: int, keep: float, seed: int) -> None:
    shape = (rows * groups, cols)
    weight = float_values(shape, seed=seed)
    mask = sparse_mask(shape, pattern, keep, groups=groups, seed=seed + 1)
    layout = encode(weight, mask, pattern, groups)
    check_layout(*layout, pattern, shape, groups)
    assert torch.equal(decode(*layout, pattern, shape, groups), weight * mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_mask_keeps_what_is_not_zero(pattern: str) -> None:
    shape = (37, 41)
    weight = float_values(shape, seed=1) * sparse_mask(shape, pattern, 0.3, seed=4)
    values, crow, col = encode(weight, None, pattern)
    assert torch.equal(decode(values, crow, col, pattern, shape), weight)
    with_mask = encode(weight, sparse_mask(shape, pattern, 0.3, seed=4), pattern)
    if pattern != "2:4":  # a filler's place may differ there
        assert torch.equal(values, with_mask[0])
        assert torch.equal(col, with_mask[2])


def test_a_kept_zero_stays_stored() -> None:
    values, _, col = encode(torch.zeros(1, 3), torch.tensor([[False, True, True]]), "unstructured")
    assert col.tolist() == [1, 2]
    assert values.tolist() == [0, 0]


def test_wide_indices_take_int32() -> None:
    assert index_dtype(32767) == torch.int16
    assert index_dtype(32768) == torch.int32
    weight = torch.ones(2, 32769, dtype=torch.int8)
    values, crow, col = encode(weight, None, "unstructured")
    assert crow is not None
    assert (crow.dtype, col.dtype) == (torch.int32, torch.int32)
    assert torch.equal(decode(values, crow, col, "unstructured", weight.shape), weight)
    narrow = encode(weight[:, :32768], torch.arange(32768).expand(2, -1) < 3, "unstructured")
    assert narrow[2].dtype == torch.int16


BROKEN = {
    "4x1": ((10, 6), (9, 2), "block (2, 2): rows 8..9, columns 2..2"),
    "16x16": ((40, 40), (17, 33), "block (1, 2): rows 16..31, columns 32..39"),
    "32x32": ((40, 40), (5, 35), "block (0, 1): rows 0..31, columns 32..39"),
    "64x64": ((70, 10), (69, 3), "block (1, 0): rows 64..69, columns 0..9"),
}


@pytest.mark.parametrize("pattern", BROKEN)
def test_mask_off_its_pattern_names_the_first_block(pattern: str) -> None:
    shape, at, message = BROKEN[pattern]
    mask = torch.ones(shape, dtype=torch.bool)
    mask[at] = False
    with pytest.raises(
        ValueError, match=re.escape(f"my_op: mask must keep or drop each {pattern} block")
    ) as info:
        encode(torch.ones(shape), mask, pattern, op="my_op")
    assert message in str(info.value)


def test_blocks_do_not_cross_groups() -> None:
    mask = torch.zeros(12, 3, dtype=torch.bool)
    mask[4:8] = True  # a 4x1 block of the whole, half a block of either group of 6
    encode(torch.ones(12, 3), mask, "4x1", 1)
    with pytest.raises(ValueError, match=re.escape("block (2, 0): rows 6..9")):
        encode(torch.ones(12, 3), mask | (torch.arange(12) < 6)[:, None], "4x1", 2)


def test_three_of_four_is_an_error() -> None:
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[1, 4:7] = True
    with pytest.raises(
        ValueError, match=re.escape("at most 2 of each 4 adjacent inputs, got 3 in block (1, 1)")
    ):
        encode(torch.ones(3, 10), mask, "2:4")
    with pytest.raises(ValueError, match=re.escape("weight must keep at most 2")):
        encode(torch.ones(3, 10), None, "2:4")


def test_mask_errors() -> None:
    weight = torch.ones(4, 4)
    with pytest.raises(ValueError, match="mask must have the weight's shape"):
        encode(weight, torch.ones(4, 5, dtype=torch.bool), "4x1")
    with pytest.raises(TypeError, match="mask must be bool"):
        encode(weight, torch.ones(4, 4), "4x1")
    with pytest.raises(ValueError, match=r"pattern must be one of .*, got '8x8'"):
        encode(weight, None, "8x8")
    with pytest.raises(ValueError, match="groups must divide the 4 outputs, got groups=3"):
        encode(weight, None, "4x1", 3)
    with pytest.raises(ValueError, match="2 or more dimensions"):
        encode(torch.ones(4), None, "4x1")


def layout_of(pattern: str, shape: tuple[int, int] = (10, 70)) -> list[Tensor | None]:
    return list(
        encode(torch.ones(shape), None if pattern != "2:4" else sparse_mask(shape, "2:4", 0.5), pattern)
    )


@pytest.mark.parametrize("pattern", BLOCKED)
def test_bad_compressed_layouts(pattern: str) -> None:
    shape = (10, 70)

    def check(message: str, error: type[Exception] = ValueError, **changes: Tensor | None) -> None:
        values, crow, col = layout_of(pattern)
        parts = {"values": values, "crow": crow, "col": col, **changes}
        with pytest.raises(error, match=message):
            check_layout(parts["values"], parts["crow"], parts["col"], pattern, shape, op="my_op")  # type: ignore[arg-type]

    values, crow, col = layout_of(pattern)
    assert values is not None and crow is not None and col is not None
    check_layout(values, crow, col, pattern, shape)
    check("my_op: crow_indices must be a tensor", TypeError, crow=None)
    check("crow_indices must be int16 or int32, got torch.int64", TypeError, crow=crow.long())
    check("col_indices must be int16 or int32", TypeError, col=col.float())
    check("values must be int8 or floating, got torch.int32", TypeError, values=values.int())
    check("crow_indices must have shape", crow=crow[:-1])
    check("values must have shape", values=values[:-1])
    check("crow_indices must run from 0 to", crow=crow + 1)
    check("col_indices must be in 0..", col=torch.where(torch.arange(len(col)) == 0, -1, col).to(col.dtype))
    check("col_indices must be in 0..", col=torch.where(torch.arange(len(col)) == 0, 999, col).to(col.dtype))
    if len(col) > 1:
        check(
            "col_indices must ascend strictly in each row, got 1 then 1",
            col=col.clone().index_fill_(0, torch.tensor([0]), 1),
        )
    if len(crow) > 2:
        check("crow_indices must never fall", crow=crow.index_fill(0, torch.tensor([1]), int(crow[-1]) + 1))
    spoiled = values.clone()
    spoiled.reshape(-1)[0] = float("nan")
    check("values must be finite", values=spoiled)
    check("on meta|on cpu", col=col.to("meta"))


@pytest.mark.parametrize("pattern", ["4x1", "16x16", "32x32", "64x64"])
def test_tail_blocks_hold_zeros(pattern: str) -> None:
    values, crow, col = layout_of(pattern)
    assert values is not None and col is not None
    values[-1, -1] = 1  # rows 10.. do not exist
    with pytest.raises(ValueError, match="values must be 0 beyond the weight's last row and column"):
        check_layout(values, crow, col, pattern, (10, 70))


def test_bad_two_of_four() -> None:
    shape = (10, 68)  # the last group of 4 is all padding
    values, _, positions = layout_of("2:4", shape)
    assert values is not None and positions is not None
    check_layout(values, None, positions, "2:4", shape)
    with pytest.raises(TypeError, match="crow_indices must be None"):
        check_layout(values, torch.zeros(11, dtype=torch.int16), positions, "2:4", shape)
    with pytest.raises(TypeError, match="must be uint8"):
        check_layout(values, None, positions.int(), "2:4", shape)
    with pytest.raises(ValueError, match="values must have shape"):
        check_layout(values[:, :-1], None, positions, "2:4", shape)
    with pytest.raises(ValueError, match="strictly ascending positions"):
        check_layout(values, None, torch.zeros_like(positions), "2:4", shape)
    beyond = values.clone()
    beyond[3, -1] = 1
    with pytest.raises(ValueError, match="values must be 0 beyond"):
        check_layout(beyond, None, positions, "2:4", shape)


def test_positions_unpack_from_the_low_bits() -> None:
    assert unpack_positions(torch.tensor([[0b11100100]], dtype=torch.uint8)).tolist() == [[0, 1, 2, 3]]

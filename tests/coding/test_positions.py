"""Relative positions by hand, masks by contexts, and what is chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tautorch.coding import scan
from tautorch.coding.channel import Reader, Scale, Writer
from tautorch.coding.positions import _symbol_counts, gap_symbols, pass_positions, plain_gap_bytes


def naive_gaps(mask: np.ndarray, bits: int) -> list[int]:
    """Section 2 of the paper, one weight at a time."""
    most, zeros, out = 2**bits - 1, 0, []
    for kept in mask.reshape(-1):
        if kept:
            out.append(zeros)
            zeros = 0
            continue
        zeros += 1
        if zeros == most:
            out.append(most)
            zeros = 0
    last = max((i for i, s in enumerate(out) if s < most), default=-1)
    return out[: last + 1]  # nothing follows the last kept weight


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.7, 1.0])
def test_gaps_are_the_papers(bits: int, density: float) -> None:
    mask = (np.random.default_rng(1).random((13, 57)) < density).astype(np.uint8)
    assert gap_symbols(mask, bits).tolist() == naive_gaps(mask, bits)


def test_figure_2_of_the_paper() -> None:
    """3-bit differences, a zero filled in where the gap exceeds the bound."""
    mask = np.zeros((1, 16), np.uint8)
    mask[0, [1, 4, 15]] = 1
    assert gap_symbols(mask, 3).tolist() == [1, 2, 7, 3]


def test_plain_gap_bytes_by_hand() -> None:
    mask = (np.random.default_rng(2).random((40, 100)) < 0.05).astype(np.uint8)
    by_hand = min(math.ceil(len(naive_gaps(mask, b)) * (b + 4) / 8) for b in range(2, 9))
    assert plain_gap_bytes(mask, 4) == by_hand


def written(mask: np.ndarray) -> tuple[np.ndarray, int]:
    writer = Writer()
    pass_positions(writer, mask)
    data = writer.finish()
    reader = Reader(data)
    found = pass_positions(reader, np.zeros_like(mask))
    reader.finish()
    return found, len(data)


def masks() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    even = generator.random((60, 90)) < 0.1
    columns = generator.random((60, 90)) < np.repeat(generator.random(9) ** 4, 10)
    rows = columns[:, :60].T.copy()
    runs = np.repeat(generator.random((60, 9)) < 0.2, 10, axis=1)
    return {
        "even": even,
        "columns": columns,
        "rows": rows,
        "runs": runs,
        "none": np.zeros((60, 90), bool),
        "all": np.ones((60, 90), bool),
        "line": even.reshape(1, -1),
        "thin": even.reshape(-1, 2),
    }


@pytest.mark.parametrize("name", masks())
def test_masks_come_back(name: str) -> None:
    mask = masks()[name].astype(np.uint8)
    found, _ = written(mask)
    assert np.array_equal(found, mask)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_symbols_are_counted_from_gaps(name: str, bits: int) -> None:
    mask, most = masks()[name].astype(np.uint8), 2**bits - 1
    gaps = np.bincount(np.diff(np.flatnonzero(mask), prepend=-1) - 1, minlength=1)
    expected = np.bincount(naive_gaps(mask, bits), minlength=most + 1)
    assert _symbol_counts(gaps, most).tolist() == expected.tolist()


def test_contexts_are_chosen_where_they_are_smaller() -> None:
    for name, share in (("columns", 0.8), ("runs", 0.5)):
        mask = masks()[name].astype(np.uint8)
        ones = int(mask.sum())
        p = ones / mask.size
        even = -(ones * math.log2(p) + (mask.size - ones) * math.log2(1 - p)) / 8
        assert written(mask)[1] < share * even, name


@pytest.mark.parametrize("options", [scan.Options(), scan.Options(True, (1, 3), True)])
def test_the_weight_is_the_length(options: scan.Options) -> None:
    """What options are chosen by is what is written: within the coder's last words."""
    mask = scan.turned(masks()["runs"].astype(np.uint8), options)
    writer, weighed = Writer(), Scale()
    for channel in (writer, weighed):
        scan.pass_mask(channel, mask, options)
    assert abs(len(writer.finish()) - weighed.weight) < 10


def test_chances_by_hand() -> None:
    """One lane class, one lag: each chance is (ones + prior) / (all + 1) of its context."""
    generator = np.random.default_rng(7)
    mask = (generator.random((6, 8)) < 0.5).astype(np.uint8)
    seen: list[float] = []

    class Spy(Scale):
        def bits(self, chance, bits):  # type: ignore[no-untyped-def]
            seen.extend(chance)
            return super().bits(chance, bits)

    scan.pass_halves(Spy(), mask, np.ones_like(mask), scan.Options(lags=(1,)))
    counts = {c: [0.5, 1.0] for c in (0, 1, 2)}
    expected = []
    for step in range(6):
        contexts = [0 if step == 0 else 1 + int(mask[step - 1, lane]) for lane in range(8)]
        expected += [counts[c][0] / counts[c][1] for c in contexts]
        for lane, c in enumerate(contexts):
            counts[c][0] += mask[step, lane]
            counts[c][1] += 1
    assert np.allclose(seen, expected, rtol=1e-15, atol=0)

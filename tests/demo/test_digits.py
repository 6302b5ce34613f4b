"""The demo's data and models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tautorch.demo import digits
from tautorch.demo.digits import ShiftedBatches, Student, Teacher, shift
from tautorch.demo.measure import float_bytes, stored_parameters


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load(seed=3)


def test_split_is_stratified_and_disjoint(data: digits.Digits) -> None:
    assert len(data.train_x) == 1257 and len(data.heldout_x) == 540
    share = data.heldout_y.bincount(minlength=10) / (data.heldout_y.bincount() + data.train_y.bincount())
    assert (share - 0.3).abs().max() < 0.01
    # The set has no two equal images, so the parts must share none.
    both = torch.cat([data.train_x, data.heldout_x]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_standardised_by_the_training_part(data: digits.Digits) -> None:
    assert data.train_x.mean().abs() < 1e-5 and (data.train_x.std() - 1).abs() < 1e-5
    assert data.background == pytest.approx(float(data.train_x.min()), abs=1e-6)


def test_seed_decides_the_split(data: digits.Digits) -> None:
    again, other = digits.load(seed=3), digits.load(seed=4)
    assert torch.equal(again.heldout_x, data.heldout_x)
    assert not torch.equal(other.heldout_y, data.heldout_y)


def shifted(image: Tensor, down: int, right: int, fill: float) -> Tensor:
    """By slices, one image [8, 8] at a time."""
    out = torch.full_like(image, fill)
    (rows, from_rows), (columns, from_columns) = (
        (slice(max(0, by), 8 + min(0, by)), slice(max(0, -by), 8 + min(0, -by))) for by in (down, right)
    )
    out[rows, columns] = image[from_rows, from_columns]
    return out


def test_shift_moves_each_image_on_its_own() -> None:
    images = torch.randn(200, 1, 8, 8)
    moved = shift(images, -7.0, torch.Generator().manual_seed(0))
    found = set()
    for before, after in zip(images[:, 0], moved[:, 0], strict=True):
        ways = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if torch.equal(shifted(before, down, right, -7.0), after)
        ]
        assert len(ways) == 1
        found.add(ways[0])
    assert len(found) == 9


def test_batches_cover_the_training_part_in_a_new_order(data: digits.Digits) -> None:
    loader = ShiftedBatches(data, batch_size=100, seed=1)
    first, second = ([labels for _, labels in loader] for _ in range(2))
    assert len(first) == len(loader) == 13
    assert torch.equal(torch.cat(first).bincount(), data.train_y.bincount())
    assert not torch.equal(torch.cat(first), torch.cat(second))
    twin = [labels for _, labels in ShiftedBatches(data, batch_size=100, seed=1)]
    assert torch.equal(torch.cat(twin), torch.cat(first))


@pytest.mark.parametrize(("model", "parameters"), [(Teacher(), 2_776_522), (Student(), 390_634)])
def test_models(model: torch.nn.Module, parameters: int) -> None:
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.eval()(torch.randn(5, 1, 8, 8)).shape == (5, 10)


def test_sizes_count_what_a_file_holds() -> None:
    layer = torch.nn.Linear(10, 6)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
        layer.bias.fill_(1)
    assert stored_parameters(layer) == 30 + 6
    assert 66 * 4 <= float_bytes(layer) < 66 * 4 + 256

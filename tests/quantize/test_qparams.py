"""The quantiser's numbers, against the reference and against exhaustive search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tautorch.quantize import QParams, qparams_of_range, quantize_weight, steps
from tautorch.quantize.steps import least_squares_steps
from tautorch.reference import quantizer


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "expected"),
    [
        (0.0, 255.0, False, QParams(1.0, -128)),
        (-255.0, 0.0, False, QParams(1.0, 127)),
        (-1.0, 2.0, False, QParams(float(np.float32(3 / 255)), -43)),
        (10.0, 255.0, False, QParams(1.0, -128)),
        (-300.0, -45.0, False, QParams(float(np.float32(300 / 255)), 127)),
        (-1.0, 127.0, True, QParams(1.0, 0)),
        (-254.0, 1.0, True, QParams(2.0, 0)),
        (0.0, 0.0, False, QParams(1.0, 0)),
        (-(2.0**-101), 2.0**-102, False, QParams(1.0, 0)),
    ],
)
def test_ranges(low: float, high: float, symmetric: bool, expected: QParams) -> None:
    assert qparams_of_range(low, high, symmetric) == expected


def test_every_range_holds_zero_and_its_ends(rng: np.random.Generator) -> None:
    for _ in range(200):
        low, high = sorted(rng.standard_normal(2) * 10.0 ** rng.uniform(-20, 20))
        p = qparams_of_range(low, high)
        assert p.scale == float(np.float32(p.scale))
        assert -128 <= p.zero_point <= 127
        x = torch.tensor([0.0, low, high])
        back = p.dequantize(p.quantize(x))
        assert back[0] == 0.0
        # The zero point is rounded, so an end may clip by up to half a step on top of the rounding.
        assert (back - x).abs().max() <= 1.001 * p.scale


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1.0), (0.0, math.inf), (2.0, 1.0)])
def test_bad_ranges(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low <= high must be finite"):
        qparams_of_range(low, high)


def test_another_default_dtype_changes_nothing() -> None:
    x, q = torch.linspace(-3, 3, 1000), QParams(0.0312, 3)
    want = q.quantize(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(q.quantize(x), want)
        assert torch.equal(q.dequantize(want), (want.float() - 3) * torch.tensor(0.0312, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)


def test_quantize_is_the_reference_quantiser() -> None:
    p = qparams_of_range(-1.3, 2.7)
    x = torch.randn(64, 33) * 2
    expected = quantizer.quantize_static(
        x, torch.tensor(p.scale), torch.tensor(p.zero_point, dtype=torch.int32)
    )
    assert torch.equal(p.quantize(x), expected[0])


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (1, 1)])
def test_weights_by_amax(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    weight = rng.standard_normal(shape).astype(np.float32)
    q, scale = quantize_weight(torch.from_numpy(weight))
    rows = weight.reshape(shape[0], -1)
    amax = np.abs(rows).max(1)
    inverse = np.float32(127) / amax
    expected = np.clip(np.rint(rows * inverse[:, None]), -127, 127).astype(np.int8)
    np.testing.assert_array_equal(q.numpy().reshape(rows.shape), expected)
    np.testing.assert_array_equal(scale.numpy(), amax / np.float32(127))
    assert q.shape == shape
    assert (scale.dtype, scale.shape) == (torch.float32, (shape[0],))


def test_one_scale_for_all_and_empty_channels() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0], [2.0**-110, 0.0]])
    q, scale = quantize_weight(weight)
    assert scale.tolist() == [float(np.float32(2 / 127)), 1.0, 1.0]
    assert q[1:].count_nonzero() == 0
    q, scale = quantize_weight(weight, per_channel=False)
    assert scale.shape == (1,)
    assert q.tolist() == [[64, -127], [0, 0], [0, 0]]


def weighed_error(rows: np.ndarray, h: np.ndarray, s: float, top: int) -> float:
    return float((h * (np.clip(np.rint(rows / s), -top, top) * s - rows) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_search_finds_the_best_of_all_scales(bits: int, weighed: bool, rng: np.random.Generator) -> None:
    top = 2 ** (bits - 1) - 1
    weight = np.concatenate([rng.standard_normal((3, 40)), rng.standard_t(2, (3, 40))]).astype(np.float32)
    weight[2, 5:] = np.float32(0.25) * rng.integers(-1, 2, 35)
    h = rng.random(40) ** 3 if weighed else np.ones(40)
    given = torch.from_numpy(h) if weighed else None
    q, scale = quantize_weight(torch.from_numpy(weight), search=True, bits=bits, importance=given)
    assert int(q.abs().max()) <= top
    wide, plain_scale = weight.astype(np.float64), quantize_weight(torch.from_numpy(weight), bits=bits)[1]
    for row, s, plain, integers in zip(wide, scale.tolist(), plain_scale.tolist(), q.numpy(), strict=True):
        np.testing.assert_array_equal(integers, np.clip(np.rint(row / s), -top, top))
        found = weighed_error(row, h, s, top)
        assert found <= weighed_error(row, h, plain, top) * (1 + 1e-6)
        trials = np.abs(row).max() * np.linspace(2.2, 0.001, 2000)[:, None] / (1 if bits < 6 else 2 * top)
        errors = (h * (np.clip(np.rint(row / trials), -top, top) * trials - row) ** 2).sum(1)
        assert found <= (1 + 1e-6) * errors.min() + 1e-12


def test_large_weights_are_searched_around_the_best_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4, 5000, dtype=torch.float64)
    for top in (7, 127):
        exact = least_squares_steps(weight, top)
        with monkeypatch.context() as patch:
            patch.setattr(steps, "_FULL_SWEEP", 1)
            near = least_squares_steps(weight, top)
        for row, a, b in zip(weight.numpy(), exact.tolist(), near.tolist(), strict=True):
            best = weighed_error(row, np.ones(5000), a, top)
            assert best * (1 - 1e-12) <= weighed_error(row, np.ones(5000), b, top) < 1.001 * best


def test_the_search_clips_a_lone_large_weight() -> None:
    weight = torch.randn(2, 4000)
    weight[0, 0] = 6.0
    (plain, plain_scale), (q, scale) = (
        quantize_weight(weight, bits=6),
        quantize_weight(weight, search=True, bits=6),
    )

    def error(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (q.double() * scale.double()[:, None] - weight.double()).square().sum(1)

    assert (error(q, scale) < error(plain, plain_scale)).all()
    assert int(q[0, 0]) == 31
    assert float(scale[0]) * 31 < 5.5


def test_fewer_bits_by_amax() -> None:
    q, scale = quantize_weight(torch.tensor([[7.0, -3.4, 0.6]]), bits=4)
    assert (q.tolist(), scale.tolist()) == ([[7, -3, 1]], [1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits must be a whole number from 2 to 8, got 9"),
        ({"bits": 4.0}, "bits must be a whole number"),
        (
            {"search": True, "importance": torch.ones(2)},
            r"importance must be .*\[2, 3\] or \[3\].* got \[2\]",
        ),
        ({"search": True, "importance": -torch.ones(3)}, "not negative"),
        ({"importance": torch.ones(3)}, "with search=True"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_weight(torch.ones(2, 3), **options)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (
            torch.ones(2, 2, dtype=torch.int8),
            TypeError,
            "weight must be a floating point tensor, got torch.int8",
        ),
        ([1.0], TypeError, "weight must be a floating point tensor, got list"),
        (torch.ones(0, 2), ValueError, r"got \[0, 2\]"),
        (torch.tensor(1.0), ValueError, "weight must be a full"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "weight must be finite"),
        (torch.tensor([[1e300]], dtype=torch.float64), ValueError, "finite in float32"),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(weight)

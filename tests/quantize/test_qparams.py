"""The quantiser's numbers, against the reference and against exhaustive search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tautorch.quantize import QParams, qparams_of_range, quantize_weight
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


def test_the_search_takes_the_least_error_it_tried() -> None:
    weight = torch.randn(3, 40_000)
    weight[0, 0] = 6.0
    plain, plain_scale = quantize_weight(weight)
    q, scale = quantize_weight(weight, search=True)

    def error(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (q.double() * scale.double()[:, None] - weight.double()).square().sum(1)

    amax = weight.abs().amax(1)
    tried = []
    for step in range(51):
        top = amax * (1 - 0.01 * step)
        tried.append(error((weight * (127 / top)[:, None]).round().clamp(-127, 127), top / 127))
    torch.testing.assert_close(error(q, scale), torch.stack(tried).amin(0), rtol=1e-9, atol=0)
    assert (error(q, scale) <= error(plain, plain_scale)).all()
    assert (error(q, scale) < error(plain, plain_scale)).any()
    # What clips is the large value alone, and it clips to 127.
    assert int(q.abs().max()) == 127


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

"""The reference quantiser against numpy's IEEE arithmetic, value by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tautorch.reference.quantizer import (
    MAX_K,
    dequantize,
    quantize_rows,
    quantize_samples,
    quantize_static,
    quantize_weight,
    requantize,
)
from tautorch.testing.values import FLOAT_PATTERNS, float_values

F32 = np.float32


def one_row(row: list[float]) -> tuple[list[int], np.float32]:
    """The contract of DESIGN by hand: one value at a time, Python's round() being rint to even."""
    values = [F32(v) for v in row]
    if any(not math.isfinite(v) for v in values):
        return [0] * len(values), F32(math.nan)
    amax = max((abs(v) for v in values), default=F32(0))
    if amax < F32(2.0**-100):
        return [0] * len(values), F32(1)
    inverse = F32(127) / amax
    return [max(-127, min(127, round(float(v * inverse)))) for v in values], amax / F32(127)


def assert_same(q: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
    for row, got, got_scale in zip(x.tolist(), q.tolist(), scale.numpy(), strict=True):
        expected, expected_scale = one_row(row)
        assert got == expected
        assert got_scale.tobytes() == expected_scale.tobytes() or (
            math.isnan(got_scale) and math.isnan(expected_scale)
        )


@pytest.mark.parametrize("pattern", FLOAT_PATTERNS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (33, 65)])
def test_rows_follow_the_contract(pattern: str, shape: tuple[int, int]) -> None:
    x = float_values(shape, pattern, seed=3)
    assert_same(*quantize_rows(x), x)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_any_float_follows_the_contract(rows: list[list[float]]) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    assert_same(*quantize_rows(x), x)


def test_ties_go_to_even() -> None:
    q, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]))
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_threshold_is_two_to_the_minus_hundred() -> None:
    edge = 2.0**-100
    below = float(np.nextafter(F32(edge), F32(0)))
    q, scale = quantize_rows(torch.tensor([[edge, -edge], [below, -below]]))
    assert q.tolist() == [[127, -127], [0, 0]]
    assert scale.tolist() == [float(F32(edge) / F32(127)), 1.0]


def test_nan_and_inf_spoil_their_row_alone() -> None:
    x = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [-math.inf, 0.0], [1.0, -2.0]])
    q, scale = quantize_rows(x)
    assert q.tolist() == [[0, 0], [0, 0], [0, 0], [64, -127]]
    assert torch.isnan(scale).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_upcast_first(dtype: torch.dtype) -> None:
    x = float_values((5, 31), seed=5).to(dtype)
    narrow, wide = quantize_rows(x), quantize_rows(x.float())
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    q, scale = quantize_rows(torch.zeros(shape))
    assert q.shape == shape
    assert scale.shape == shape[:-1]
    assert torch.equal(scale, torch.ones(shape[:-1]))


def test_samples_share_one_scale() -> None:
    x = float_values((3, 2, 4, 5), "mixed", seed=1)
    x[1, 0, 0, 0] = math.nan
    q, scale = quantize_samples(x)
    assert q.shape == x.shape
    assert_same(q.reshape(3, -1), scale, x.reshape(3, -1))


def test_weight_scales_are_per_output_channel() -> None:
    weight = float_values((6, 3, 2, 2), "mixed", seed=2)
    weight[4] = 0
    q, scale = quantize_weight(weight)
    assert scale.dtype == torch.float32
    assert scale[4] == 1
    assert_same(q.reshape(6, -1), scale, weight.reshape(6, -1))
    # half a step, and half a unit in the last place of the two divisions
    error = (dequantize(q, scale) - weight).abs().reshape(6, -1).amax(1)
    assert bool((error <= scale * 0.50002).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weight_must_be_finite(bad: float) -> None:
    weight = torch.ones(4, 3)
    weight[2, 1] = bad
    with pytest.raises(ValueError, match="my_op: weight must be finite, got NaN or Inf in output channel 2"):
        quantize_weight(weight, op="my_op")


@pytest.mark.parametrize("zero_point", [None, 0, 7, -128, 127])
def test_static_follows_the_contract(zero_point: int | None) -> None:
    x = float_values((9, 17), seed=4) * 3
    x[2, 3], x[5, 0], x[7, 1] = math.nan, math.inf, 3e38
    scale = torch.tensor([0.0173])
    point = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    q, row_scale = quantize_static(x, scale, point)
    shift = zero_point or 0
    inverse = F32(1) / F32(0.0173)
    for i, row in enumerate(x.numpy()):
        if i in (2, 5):
            assert q[i].tolist() == [shift] * 17
            assert math.isnan(row_scale[i])
            continue
        with np.errstate(over="ignore"):  # 3e38 / 0.0173 is Inf, and clamps
            wide = [max(-1000.0, min(1000.0, float(v * inverse))) for v in row]
        assert q[i].tolist() == [max(-128, min(127, round(v) + shift)) for v in wide]
        assert row_scale[i] == scale[0]


def test_static_samples_spoil_the_whole_sample() -> None:
    x = float_values((2, 2, 3, 3), seed=4)
    x[1, 1, 2, 2] = math.nan
    q, scale = quantize_static(x, torch.tensor(0.1), torch.tensor(4, dtype=torch.int32), samples=True)
    assert scale.shape == (2,)
    assert math.isnan(scale[1]) and scale[0] == torch.tensor(0.1)
    assert bool((q[1] == 4).all())
    assert not bool((q[0] == 4).all())


def test_requantize() -> None:
    y = torch.tensor([0.05, 0.15, -0.25, 1e30, -math.inf, math.nan, math.inf])
    point = torch.tensor([-3], dtype=torch.int32)
    inverse = F32(1) / F32(0.1)
    expected = [max(-128, min(127, round(float(F32(v) * inverse)) - 3)) for v in (0.05, 0.15, -0.25)]
    assert requantize(y, torch.tensor([0.1]), point).tolist() == [*expected, 127, -128, -3, 127]
    assert requantize(y[:3], torch.tensor([0.1])).tolist() == [v + 3 for v in expected]


def test_bound_on_k_is_the_last_that_fits() -> None:
    assert 255 * 127 * MAX_K < 2**31 <= 255 * 127 * (MAX_K + 1)

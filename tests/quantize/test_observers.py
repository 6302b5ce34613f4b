"""Observers against numpy on the values themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tautorch.quantize import Histogram, Kl, MinMax, Mse, Percentile, QParams, qparams_of_range

Array = np.ndarray[Any, np.dtype[np.float64]]


def error(p: QParams, values: Array) -> float:
    q = np.clip(np.rint(values / p.scale) + p.zero_point, -128, 127)
    return float((((q - p.zero_point) * p.scale - values) ** 2).sum())


def seen(observer: MinMax, values: Array, parts: int = 4) -> MinMax:
    for part in np.array_split(values, parts):
        observer.observe(torch.from_numpy(part))
    return observer


def samples(kind: str, rng: np.random.Generator) -> Array:
    values = {
        "normal": lambda: rng.standard_normal(20_000),
        "relu": lambda: np.maximum(rng.standard_normal(20_000), 0),
        "outlier": lambda: np.append(rng.standard_normal(20_000), [80.0, -3.0]),
        "negative": lambda: -np.abs(rng.standard_normal(20_000)) - 1,
        "tiny": lambda: rng.standard_normal(20_000) * 1e-12,
        "uniform": lambda: rng.uniform(-0.2, 5.0, 20_000),
    }[kind]()
    return values.astype(np.float32).astype(np.float64)


KINDS = ["normal", "relu", "outlier", "negative", "tiny", "uniform"]


@pytest.mark.parametrize("kind", KINDS)
def test_minmax(kind: str, rng: np.random.Generator) -> None:
    values = samples(kind, rng)
    assert seen(MinMax(), values).qparams() == qparams_of_range(values.min(), values.max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_histogram_counts_every_value_in_its_bin(kind: str, rng: np.random.Generator) -> None:
    values = samples(kind, rng)
    histogram = Histogram()
    # Small ones first, so that the range must grow.
    seen(histogram, values[np.argsort(np.abs(values))], 50)
    assert histogram.zeros == (values == 0).sum()
    assert float(histogram.counts.sum()) == (values != 0).sum()
    bins = len(histogram.counts)
    edges = (np.arange(bins + 1) - bins // 2) * histogram.width
    np.testing.assert_array_equal(histogram.counts.numpy(), np.histogram(values[values != 0], edges)[0])
    top = np.abs(values).max()
    assert edges[-1] / 2 <= top < edges[-1]


def test_the_order_of_batches_does_not_matter(rng: np.random.Generator) -> None:
    values = samples("outlier", rng)
    forward, backward = seen(Mse(), values, 7), seen(Mse(), values[::-1].copy(), 3)
    assert forward.qparams() == backward.qparams()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [100, 99.9, 99.0, 60.0])
def test_percentile_to_within_a_bin(kind: str, percentile: float, rng: np.random.Generator) -> None:
    values = samples(kind, rng)
    observer = Percentile(percentile)
    seen(observer, values)
    p = observer.qparams()
    outside = int(len(values) * (1 - percentile / 100) + 1e-9)
    ordered = np.sort(values)
    low, high = min(ordered[outside], 0.0), max(ordered[-1 - outside], 0.0)
    width = observer.width
    assert p.scale * 255 == pytest.approx(high - low, abs=2.01 * width)
    # No more than the share asked for lies beyond either end.
    reach_low, reach_high = (-128 - p.zero_point - 1) * p.scale, (127 - p.zero_point + 1) * p.scale
    assert (values > reach_high).sum() <= outside
    assert (values < reach_low).sum() <= outside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_as_good_as_searching_the_values(kind: str, symmetric: bool, rng: np.random.Generator) -> None:
    values = samples(kind, rng)
    found = error(seen(Mse(), values).qparams(symmetric), values)
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    cuts = np.linspace(0.02, 1.0, 50)
    if symmetric or low == 0 or high == 0:
        tried = [qparams_of_range(low * c, high * c, symmetric) for c in cuts]
    else:
        tried = [qparams_of_range(low * a, high * b) for a in cuts[::3] for b in cuts]
    assert found <= 1.02 * min(error(p, values) for p in tried)
    assert found <= error(qparams_of_range(values.min(), values.max(), symmetric), values) * 1.001


def test_mse_clips_an_outlier_when_that_pays(rng: np.random.Generator) -> None:
    values = np.append(rng.standard_normal(200_000), 12.0)
    assert seen(Mse(), values).qparams().scale < 0.9 * seen(MinMax(), values).qparams().scale


def divergence(magnitudes: Array, bins: int, levels: int) -> float:
    """KL(P || Q), level by level."""
    p = magnitudes[:bins].copy()
    p[-1] += magnitudes[bins:].sum()
    q = np.zeros(bins)
    level = np.arange(bins) * levels // bins
    for k in range(levels):
        mine = np.flatnonzero((level == k) & (magnitudes[:bins] > 0))
        if len(mine):
            q[mine] = magnitudes[mine].sum() / len(mine)
    if q.sum() == 0:
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    return sum(a * math.log(a / (b if b > 0 else 1e-12)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("kind", ["normal", "relu", "outlier"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_kl_takes_the_threshold_of_least_divergence(
    kind: str, symmetric: bool, rng: np.random.Generator
) -> None:
    values = samples(kind, rng)
    observer = Kl()
    seen(observer, values)
    found = observer.qparams(symmetric)
    edges = np.arange(len(observer.counts) // 2 + 1) * observer.width
    magnitudes = np.histogram(np.abs(values[values != 0]), edges)[0].astype(float)
    levels = 256 if kind == "relu" and not symmetric else 128
    top = int(np.flatnonzero(magnitudes).max()) + 1
    step = max(1, (top - levels) // 512)
    tried = list(range(levels, top + 1, step))
    divergences = [divergence(magnitudes, bins, levels) for bins in tried[::16]]
    if kind == "outlier":
        assert found.scale < 0.2 * MinMax.qparams(observer, symmetric).scale
    cut = {  # the threshold that was chosen, back from the parameters
        True: found.scale * 127,
        False: max(127 - found.zero_point, 128 + found.zero_point) * found.scale,
    }[symmetric]
    chosen = min(tried, key=lambda bins: abs(bins * observer.width - cut))
    assert abs(chosen * observer.width - cut) <= found.scale
    assert divergence(magnitudes, chosen, levels) <= min(divergences) + 0.02 * abs(min(divergences)) + 1e-6


def test_kl_keeps_what_is_even_and_is_the_same_in_any_order(rng: np.random.Generator) -> None:
    values = samples("uniform", rng)
    found = seen(Kl(), values, 3).qparams()
    assert found.scale > 0.97 * seen(MinMax(), values).qparams().scale
    assert found == seen(Kl(), values[::-1].copy(), 7).qparams()


@pytest.mark.parametrize("make", [MinMax, Percentile, Mse, Kl])
def test_zeros_alone_and_nothing(make: Any) -> None:
    observer = make()
    with pytest.raises(ValueError, match="observe must be called before qparams"):
        observer.qparams()
    observer.observe(torch.zeros(5))
    assert observer.qparams() == QParams(1.0, 0)


@pytest.mark.parametrize("percentile", [50, 101, math.nan])
def test_bad_percentiles(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile must be in"):
        Percentile(percentile)

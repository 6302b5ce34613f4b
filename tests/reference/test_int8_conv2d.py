"""``int8_conv2d``'s reference against loops over pixels and taps, and against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tautorch.reference.int8_conv2d import int8_conv2d
from tautorch.reference.quantizer import quantize_samples
from tautorch.testing.cases import conv_case
from tautorch.testing.values import CONV_SIZES, int8_values


def by_loops(x: np.ndarray, w: np.ndarray, zero_point: int, config: dict[str, Any]) -> np.ndarray:
    """int64 accumulators of a quantised convolution, one output pixel at a time."""
    sh, sw = np.broadcast_to(config.get("stride", 1), 2)
    ph, pw = np.broadcast_to(config.get("padding", 0), 2)
    dh, dw = np.broadcast_to(config.get("dilation", 1), 2)
    groups = config.get("groups", 1)
    b, _, h, width = x.shape
    o, i, kh, kw = w.shape
    oh, ow = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    out = np.zeros((b, o, oh, ow), np.int64)
    for n, y, z in np.ndindex(b, oh, ow):
        for ky, kx in np.ndindex(kh, kw):
            row, col = y * sh - ph + ky * dh, z * sw - pw + kx * dw
            if 0 <= row < h and 0 <= col < width:
                pixel = x[n, :, row, col].astype(np.int64) - zero_point
                for channel in range(o):
                    start = channel // (o // groups) * i
                    out[n, channel, y, z] += pixel[start : start + i] @ w[channel, :, ky, kx].astype(np.int64)
    return out


@pytest.mark.parametrize("config", CONV_SIZES, ids=str)
def test_accumulators_are_the_integers(config: dict[str, Any]) -> None:
    config = dict(config)
    x, w = int8_values(config.pop("x"), seed=1), int8_values(config.pop("w"), seed=2, low=-127)
    acc = int8_conv2d(
        x,
        w,
        torch.ones(w.shape[0]),
        x_scale=torch.ones(1),
        x_zero_point=torch.tensor([-7], dtype=torch.int32),
        out_dtype=torch.int32,
        **config,
    )
    assert torch.equal(acc.long(), torch.from_numpy(by_loops(x.numpy(), w.numpy(), -7, config)))


@pytest.mark.parametrize("config", CONV_SIZES, ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_is_the_convolution_of_the_dequantised(config: dict[str, Any], mode: str) -> None:
    config = dict(config)
    case = conv_case("int8_conv2d", config.pop("x"), config.pop("w"), mode=mode, **config)
    x, w, scale, bias = case.args
    if mode == "dynamic":
        q, sample_scale = quantize_samples(x)
        x = q.double() * sample_scale.double().reshape(-1, 1, 1, 1)
    weight = w.double() * scale.double().reshape(-1, 1, 1, 1)
    expected = torch.nn.functional.conv2d(x.double(), weight, bias.double(), **config)
    torch.testing.assert_close(case(int8_conv2d).double(), expected, rtol=1e-5, atol=1e-5)


def test_unbatched_is_a_batch_of_one() -> None:
    case = conv_case("int8_conv2d", (3, 5, 6), (4, 3, 3, 3), padding=1)
    batched = case.with_x(case.x[None])
    y = case(int8_conv2d)
    assert y.shape == (4, 5, 6)
    assert torch.equal(y, batched(int8_conv2d)[0])


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_spoiled_sample_is_nan_and_alone(mode: str) -> None:
    y = conv_case("int8_conv2d", (3, 2, 5, 5), (4, 2, 3, 3), mode=mode, x="inf_row")(int8_conv2d)
    assert bool(torch.isnan(y[0]).all())
    assert bool(torch.isfinite(y[1:]).all())


def test_one_scale_a_sample() -> None:
    x, w = int8_values((2, 3, 4, 4)), int8_values((5, 3, 1, 1), low=-127)
    y = int8_conv2d(x, w, torch.ones(5), x_scale=torch.tensor([1.0, 0.5]))
    z = int8_conv2d(x, w, torch.ones(5), x_scale=torch.tensor([1.0]))
    assert torch.equal(y[0], z[0])
    assert torch.equal(y[1], z[1] * 0.5)


def test_bad_arguments() -> None:
    w, scale = torch.zeros(4, 3, 3, 3, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match=r"int8_conv2d: x must be .* got 2 dimensions"):
        int8_conv2d(torch.zeros(3, 3), w, scale)
    with pytest.raises(ValueError, match="x must have 3 channels, got 5"):
        int8_conv2d(torch.zeros(1, 5, 8, 8), w, scale)
    with pytest.raises(ValueError, match="at least as large as the kernel"):
        int8_conv2d(torch.zeros(1, 3, 2, 8), w, scale)
    with pytest.raises(ValueError, match="x_scale must have 1 or 2 elements, got 3"):
        int8_conv2d(torch.zeros(2, 3, 8, 8, dtype=torch.int8), w, scale, x_scale=torch.ones(3))

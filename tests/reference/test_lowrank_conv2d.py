"""``lowrank_conv2d``'s reference against two float64 convolutions and against ``lowrank_linear``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tautorch.reference.lowrank_conv2d import lowrank_conv2d
from tautorch.reference.lowrank_linear import lowrank_linear
from tautorch.testing.cases import conv_case
from tautorch.testing.values import CONV_SIZES


@pytest.mark.parametrize("config", CONV_SIZES, ids=str)
def test_float_factors(config: dict[str, Any]) -> None:
    config = dict(config)
    case = conv_case("lowrank_conv2d", config.pop("x"), config.pop("w"), mode="float", **config)
    x, down, up, bias = (t.double() for t in case.args)
    inner = torch.nn.functional.conv2d(x, down, **config)
    expected = torch.nn.functional.conv2d(inner, up, bias, groups=config.get("groups", 1))
    torch.testing.assert_close(case(lowrank_conv2d).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONV_SIZES, ids=str)
def test_int8_factors_approximate_the_float_ones(config: dict[str, Any]) -> None:
    config = dict(config)
    x_shape, w_shape = config.pop("x"), config.pop("w")
    y = conv_case("lowrank_conv2d", x_shape, w_shape, bias=False, **config)(lowrank_conv2d)
    truth = conv_case("lowrank_conv2d", x_shape, w_shape, mode="float", bias=False, **config)(lowrank_conv2d)
    assert (y - truth).norm() <= 0.03 * truth.norm()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_pixel_is_a_row(groups: int) -> None:
    """A 1x1 convolution over one pixel a sample is the linear operator of each group."""
    case = conv_case("lowrank_conv2d", (5, 12, 1, 1), (8, 12 // groups, 1, 1), groups=groups, mode="static")
    x, down, up, bias = case.args
    y, raw = case(lowrank_conv2d), case.raw()(lowrank_conv2d)
    given = {k: v for k, v in case.kwargs.items() if k.startswith("x_")}
    rank, out = down.shape[0] // groups, 8 // groups
    for g in range(groups):
        first, second = slice(g * rank, (g + 1) * rank), slice(g * out, (g + 1) * out)
        for result, kwargs in ((y, {}), (raw, {"out_dtype": torch.int32})):
            expected = lowrank_linear(
                x[:, g * (12 // groups) : (g + 1) * (12 // groups), 0, 0],
                down[first, :, 0, 0],
                up[second, :, 0, 0],
                bias[second],
                down_scale=case.kwargs["down_scale"][first],
                up_scale=case.kwargs["up_scale"][second],
                **given,
                **kwargs,
            )
            assert torch.equal(result[:, second, 0, 0], expected)


def test_a_spoiled_sample_is_nan_and_alone() -> None:
    y = conv_case("lowrank_conv2d", (3, 2, 5, 5), (4, 2, 3, 3), x="nan_row")(lowrank_conv2d)
    assert bool(torch.isnan(y[0]).all()) and bool(torch.isfinite(y[1:]).all())

"""``sparse_conv2d``'s reference is the dense convolution with what the layout stores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tautorch.reference.int8_conv2d import int8_conv2d
from tautorch.reference.layouts import PATTERNS, decode, encode
from tautorch.reference.sparse_conv2d import sparse_conv2d
from tautorch.testing.cases import conv_case
from tautorch.testing.values import CONV_SIZES


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("config", CONV_SIZES[3:8], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "int8", "weight_only"])
def test_int8_values_are_the_dense_operator(config: dict[str, Any], pattern: str, mode: str) -> None:
    config = dict(config)
    case = conv_case("sparse_conv2d", config.pop("x"), config.pop("w"), mode=mode, pattern=pattern, **config)
    x, values, crow, col, scale, bias = case.args
    shape = case.kwargs["weight_shape"]
    dense = decode(values, crow, col, pattern, shape, case.kwargs["groups"])
    kwargs = {k: v for k, v in case.kwargs.items() if k not in ("pattern", "weight_shape")}
    assert torch.equal(case(sparse_conv2d), int8_conv2d(x, dense, scale, bias, **kwargs))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("config", CONV_SIZES[3:8], ids=str)
def test_float_values(config: dict[str, Any], pattern: str) -> None:
    config = dict(config)
    case = conv_case(
        "sparse_conv2d", config.pop("x"), config.pop("w"), mode="float", pattern=pattern, **config
    )
    x, values, crow, col, _, bias = case.args
    dense = decode(values, crow, col, pattern, case.kwargs["weight_shape"], case.kwargs["groups"])
    expected = torch.nn.functional.conv2d(x.double(), dense.double(), bias.double(), **config)
    torch.testing.assert_close(case(sparse_conv2d).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_dropped_tap_takes_no_part() -> None:
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    mask[:, 1, 1, 1] = False
    layout = encode(torch.randn(4, 2, 3, 3), mask, "4x1")
    x = torch.randn(2, 2, 3, 3)
    kwargs: dict[str, Any] = {"pattern": "4x1", "weight_shape": (4, 2, 3, 3)}
    plain = sparse_conv2d(x, *layout, None, **kwargs)
    x[0, 1, 1, 1] = math.inf
    torch.testing.assert_close(sparse_conv2d(x, *layout, None, **kwargs), plain)
    x[0, 0, 1, 1] = math.nan
    y = sparse_conv2d(x, *layout, None, **kwargs)
    assert bool(torch.isnan(y[0]).all()) and torch.equal(y[1], plain[1])

"""int8 output, which AVX-512 has a kernel of its own for, is the reference's to the last code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tautorch import dispatch, ops, prune
from tautorch.nn import SparseConv2d
from tautorch.reference.int8_conv2d import int8_conv2d
from tautorch.reference.int8_linear import int8_linear

from .test_tiles import KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_rows_and_outputs(activation: str, kernel: str) -> None:
    """Rows around multiples of six, strips of 32 outputs and less, few and many inputs."""
    outputs = (
        (32, 24),
        (64, 20),
        (64, 64),
        (96, 27),
        (130, 40),
        (5, 9),
        (16, 40),
        (17, 4),
        (24, 28),
        (25, 12),
    )
    for m in (1, 5, 6, 7, 12, 17, 18, 25):
        for n, k in (*outputs, (48, 30), (51, 33), (88, 8)):
            x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            how: dict[str, Any] = {
                "x_scale": torch.rand(m) * 0.01 + 0.001, "x_zero_point": torch.tensor([9], dtype=torch.int32),
                "out_scale": torch.tensor([0.3]), "out_zero_point": torch.tensor([-20], dtype=torch.int32),
                "activation": activation,
            }  # fmt: skip
            args = x, weight, torch.rand(n) + 0.1, torch.randn(n) * 20
            with dispatch.force("int8_linear", kernel):
                actual = ops.int8_linear(*args, **how)
            assert torch.equal(actual, int8_linear(*args, **how)), (m, n, k)


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_that_are_no_numbers(kernel: str) -> None:
    """Infinity times zero, and infinity with a bias against it: NaN, whose code is the zero point."""
    x = torch.randint(-128, 128, (13, 64), dtype=torch.int8)
    weight = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    bias = torch.zeros(64)
    for x_scale, w_scale in (
        (2.0**120, 0.0), (-(2.0**120), 0.0), (2.0**120, 2.0**120), (1.0, 2.0**127), (2.0**80, 2.0**80),
    ):  # fmt: skip
        scales = torch.full((64,), w_scale)
        scales[1::2] = 1e-3
        for b in (0.0, float("inf"), float("-inf")):
            bias[::4] = b
            how: dict[str, Any] = {
                "x_scale": torch.tensor([x_scale]), "out_scale": torch.tensor([2.0**100]),
                "out_zero_point": torch.tensor([5], dtype=torch.int32),
            }  # fmt: skip
            with dispatch.force("int8_linear", kernel):
                actual = ops.int8_linear(x, weight, scales, bias, **how)
            assert torch.equal(actual, int8_linear(x, weight, scales, bias, **how)), (x_scale, w_scale, b)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("image", "filters", "how"),
    [
        ((2, 64, 10, 11), (96, 64, 1, 1), {}),  # a block of pixels after another
        ((3, 32, 20, 21), (64, 32, 1, 1), {}),
        ((2, 64, 9, 9), (64, 64, 3, 3), {"padding": 1}),  # what lies in the padding is left out
        ((1, 32, 7, 7), (32, 32, 3, 3), {"padding": 1, "stride": 2}),
        ((1, 32, 8, 12), (64, 32, 3, 3), {"padding": 2, "dilation": 2}),
        ((1, 64, 9, 8), (128, 32, 3, 3), {"padding": 1, "groups": 2}),
        ((9, 32, 7, 7), (70, 32, 3, 3), {"padding": 1}),  # blocks of images, of rows; bands
        ((3, 8, 14, 14), (20, 8, 3, 3), {"padding": 1}),
        ((1, 8, 26, 56), (64, 8, 3, 3), {"padding": 1}),
        ((2, 48, 80, 91), (17, 48, 3, 3), {"padding": 1}),
        ((2, 1, 9, 10), (32, 1, 3, 3), {"padding": 1}),  # windows: fewer steps than rows of a tile
        ((2, 3, 11, 12), (20, 3, 5, 5), {"padding": 2, "stride": 2}),
        ((1, 2, 7, 40), (48, 2, 3, 7), {"padding": 3, "dilation": (2, 1)}),
        ((1, 17, 9, 11), (19, 17, 3, 3), {"padding": 1}),  # rows of the filter; half a vector
    ],
)
@pytest.mark.parametrize("zero_point", [-128, 3])
def test_convolutions(
    zero_point: int, image: tuple[int, ...], filters: tuple[int, ...], how: dict[str, Any], kernel: str
) -> None:
    x = torch.randint(-128, 128, image, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, filters, dtype=torch.int8)
    args = x, weight, torch.rand(filters[0]) * 0.01 + 0.001, torch.randn(filters[0])
    how = {
        **how, "x_scale": torch.tensor([0.02]), "x_zero_point": torch.tensor([zero_point], dtype=torch.int32),
        "out_scale": torch.tensor([0.5]), "out_zero_point": torch.tensor([3], dtype=torch.int32),
    }  # fmt: skip
    with dispatch.force("int8_conv2d", kernel):
        actual = ops.int8_conv2d(*args, **how)
    assert torch.equal(actual, int8_conv2d(*args, **how))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_sparse_rows_and_outputs(activation: str, kernel: str) -> None:
    """4x1: rows around multiples of three, strips of 64 outputs and less, strips of few slots and of none."""
    codes: dict[str, Any] = {"out_scale": 0.05, "out_zero_point": -20, "activation": activation}
    codes |= {"quant": "static", "x_scale": 0.02, "x_zero_point": 9, "pattern": "4x1"}
    for n, k, sparsity in ((64, 64, 0.8), (128, 40, 0.5), (70, 200, 0.8), (20, 96, 0.9), (64, 30, 1.0)):
        conv = torch.nn.Conv2d(k, n, 1)
        assert conv.bias is not None
        with torch.no_grad():
            conv.bias.mul_(30)
        mask = torch.zeros(n, k, 1, 1, dtype=torch.bool)
        if sparsity < 1:
            mask = prune.make_mask(conv.weight.detach().abs(), "4x1", sparsity)
        for pixels in (1, 2, 3, 4, 6, 7, 25, 200):
            x = torch.randint(-128, 128, (1, k, 1, pixels), dtype=torch.int8)
            x = x.contiguous(memory_format=torch.channels_last)
            y = []
            for forced in (kernel, "reference"):
                with dispatch.force("sparse_conv2d", forced), torch.inference_mode():
                    y.append(SparseConv2d.from_float(conv, mask=mask, **codes)(x))
            assert y[0].dtype == torch.int8
            assert torch.equal(*y), (n, k, sparsity, pixels)

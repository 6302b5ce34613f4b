"""Every size of tile of the dense int8 kernels, with every type of output, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tautorch import _C, dispatch, ops
from tautorch.reference.quantizer import quantize_rows, quantize_static, requantize

KERNELS = [name for name, available in _C.isas().items() if available]
# Panels of 64 outputs, halves and quarters of one, and each with an output missing; groups of 4 inputs, 4 of
# these at a time, and tails of both. Several whole panels go row by row up to 256 inputs.
OUTPUTS = (1, 15, 16, 31, 32, 33, 47, 48, 63, 64, 100, 113, 128, 192, 201)
INPUTS = (1, 4, 15, 16, 19, 33, 256, 257)
ROWS = (*range(1, 27), 48, 49, 191, 192, 193)


def product(q: torch.Tensor, weight: torch.Tensor, zero_point: int = 0) -> torch.Tensor:
    """Exact accumulators, int32."""
    return ((q.double() - zero_point) @ weight.double().T).to(torch.int32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", INPUTS)
def test_every_tile(k: int, kernel: str) -> None:
    g = torch.Generator().manual_seed(k)
    for i, m in enumerate(ROWS):
        n = OUTPUTS[(i + k) % len(OUTPUTS)]
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
        scale = torch.rand(m, generator=g) + 0.1
        w_scale, bias = torch.rand(n, generator=g) + 0.01, torch.randn(n, generator=g)
        arguments = {"x_scale": scale, "x_zero_point": torch.tensor([3], dtype=torch.int32)}
        acc = product(x, weight, 3)
        # One IEEE operation at a time, in the contract's order: nothing is left to a tolerance.
        y = acc.float() * scale[:, None] * w_scale
        with dispatch.force("int8_linear", kernel):
            raw = ops.int8_linear(x, weight, w_scale, **arguments, out_dtype=torch.int32)
            assert torch.equal(raw, acc), (m, n)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for activation in ("none", "relu"):
                    expected = y + bias
                    expected = expected.relu() if activation == "relu" else expected
                    actual = ops.int8_linear(
                        x, weight, w_scale, bias, **arguments, activation=activation, out_dtype=dtype
                    )
                    assert torch.equal(actual, expected.to(dtype)), (m, n, dtype, activation)
            out_scale, point = y.abs().max().clamp(min=1e-3).reshape(1) / 100, torch.tensor([-7])
            arguments |= {"out_scale": out_scale, "out_zero_point": point.to(torch.int32)}
            for activation in ("none", "relu"):
                pre = (y + 0.0).relu() if activation == "relu" else y + 0.0
                actual = ops.int8_linear(x, weight, w_scale, **arguments, activation=activation)
                assert torch.equal(actual, requantize(pre, out_scale, point)), (m, n, activation)
        assert dispatch.last_used("int8_linear") == kernel


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_scale(dtype: torch.dtype, kernel: str) -> None:
    """Rows of NaN, Inf and next to nothing among others: only they are NaN or zero, in every output type."""
    for k in (1, 16, 64, 127, 130):
        x = torch.randn(29, k).to(dtype)
        x[3, k // 2], x[11, 0], x[12, -1], x[28, k // 3] = torch.inf, torch.nan, -torch.inf, torch.nan
        x[5] = 0
        x[6] = 1e-38 if dtype == torch.bfloat16 else 0
        weight = torch.randint(-127, 128, (70, k), dtype=torch.int8)
        w_scale, bias, out_scale = torch.rand(70) + 0.01, torch.randn(70), torch.tensor([0.5])
        bad = [3, 11, 12, 28]
        for static in (False, True):
            scale = torch.tensor([0.02]) if static else None
            point = torch.tensor([5], dtype=torch.int32) if static else None
            q, row_scale = quantize_static(x, scale, point) if scale is not None else quantize_rows(x)
            y = product(q, weight, 5 if static else 0).float() * row_scale[:, None] * w_scale + bias
            assert y.isnan().any(1).nonzero().flatten().tolist() == bad
            with dispatch.force("int8_linear", kernel):
                for out in (torch.float32, torch.bfloat16, torch.float16):
                    for activation in ("none", "relu"):
                        actual = ops.int8_linear(
                            x, weight, w_scale, bias, x_scale=scale, x_zero_point=point,
                            activation=activation, out_dtype=out,
                        )  # fmt: skip
                        expected = (y.relu() if activation == "relu" else y).to(out)
                        assert torch.equal(actual.isnan(), expected.isnan())
                        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
                actual = ops.int8_linear(
                    x, weight, w_scale, bias, x_scale=scale, x_zero_point=point, out_scale=out_scale
                )
                assert torch.equal(actual, requantize(y, out_scale))


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_and_nan_payloads(kernel: str) -> None:
    """Sums of whole numbers: bf16 meets every tie. A NaN of all ones in the bias, which no carry may turn."""
    for m, n in ((5, 33), (13, 64)):
        x = torch.randint(-128, 128, (m, 9), dtype=torch.int8)
        weight = torch.randint(-127, 128, (n, 9), dtype=torch.int8)
        bias = torch.zeros(n)
        bias[[1, 32]] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
        y = product(x, weight).float() + bias
        with dispatch.force("int8_linear", kernel):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                actual = ops.int8_linear(
                    x, weight, torch.ones(n), bias, x_scale=torch.ones(1), out_dtype=dtype
                )
                torch.testing.assert_close(actual, y.to(dtype), rtol=0, atol=0, equal_nan=True)
            actual = ops.int8_linear(
                x, weight, torch.ones(n), bias, x_scale=torch.ones(1), out_scale=torch.tensor([256.0])
            )
            assert torch.equal(actual, (y / 256).nan_to_num(0).round().clamp(-128, 127).to(torch.int8))

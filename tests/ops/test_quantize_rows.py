"""quantize_rows against numpy in float64, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tautorch.ops import int8_linear, quantize_rows
from tautorch.reference.quantizer import quantize_rows as plain

STAGES = ["rms_norm", "layer_norm", "silu_gate", "gelu", "gelu_tanh"]


def expected(x: Tensor, after: str, case: dict[str, Any]) -> np.ndarray:
    """float64, by the definitions."""
    v = x.double().numpy()
    w, b, g = (None if case.get(n) is None else case[n].double().numpy() for n in ("weight", "bias", "gate"))
    eps = case.get("eps", 1e-5)
    if after == "rms_norm":
        v = v / np.sqrt((v * v).mean(-1, keepdims=True) + eps)
    elif after == "layer_norm":
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + eps)
    elif after == "silu_gate":
        assert g is not None
        v = v * (g / (1 + np.exp(-g)))
    elif after == "gelu":
        v = 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2)))
    elif after == "gelu_tanh":
        v = 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    return (v if w is None else v * w) + (0 if b is None else b)


def agrees(q: Tensor, scale: Tensor, floats: np.ndarray) -> None:
    """Scales to 16 epsilons of fp32; q apart by 1 at most, in at most one of 1000 elements."""
    amax = np.abs(floats).max(-1)
    np.testing.assert_allclose(scale.numpy(), amax / 127, rtol=2e-6)
    want = np.clip(np.rint(floats * (127 / amax)[..., None]), -127, 127)
    apart = np.abs(q.numpy() - want)
    assert apart.max() <= 1 and apart.mean() <= 1e-3


def case_of(after: str, x: Tensor) -> dict[str, Any]:
    k = x.shape[-1]
    if after == "silu_gate":
        return {"gate": torch.randn_like(x)}
    if after.endswith("_norm"):
        return {"weight": torch.rand(k) + 0.5, "bias": torch.randn(k), "eps": 1e-6}
    return {}


@pytest.mark.parametrize("after", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(after: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 700) * torch.logspace(-2, 1, 5)[:, None] + 0.3).to(dtype)
    case = case_of(after, x)
    q, scale = quantize_rows(x, after, **case)
    assert q.shape == x.shape and q.dtype == torch.int8 and scale.shape == (3, 5)
    agrees(q, scale, expected(x, after, case))


def test_without_a_stage_it_is_the_quantiser() -> None:
    x = torch.randn(4, 33)
    x[1, 2] = float("nan")
    for got, want in zip(quantize_rows(x), plain(x), strict=True):
        assert torch.equal(got.float().nan_to_num(7), want.float().nan_to_num(7))


def test_static_and_poisoned_rows() -> None:
    x = torch.randn(3, 40)
    x[1, 0] = float("inf")
    x_scale, zero_point = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32)
    q, scale = quantize_rows(x, "gelu", x_scale=x_scale, x_zero_point=zero_point)
    floats = expected(x[::2], "gelu", {})
    want = np.clip(np.rint(floats / 0.02) + 5, -128, 127)
    assert np.abs(q[::2].numpy() - want).max() <= 1
    assert scale[1].isnan() and (q[1] == 5).all() and torch.equal(scale[::2], x_scale.expand(2))


def test_it_feeds_a_linear_layer() -> None:
    x, weight = torch.randn(2, 3, 64), torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    w_scale, norm = torch.rand(8) * 0.01, torch.rand(64) + 0.5
    q, scale = quantize_rows(x, "rms_norm", norm)
    y = int8_linear(q, weight, w_scale, x_scale=scale.reshape(-1))
    exact = q.double() @ weight.double().T
    want = exact * scale.double()[..., None] * w_scale.double()
    np.testing.assert_allclose(y.numpy(), want.numpy(), rtol=1e-5)


def test_empty_and_compiled() -> None:
    q, scale = quantize_rows(torch.zeros(0, 16), "rms_norm")
    assert q.shape == (0, 16) and scale.shape == (0,)
    x, gate = torch.randn(2, 16), torch.randn(2, 16)
    torch.library.opcheck(torch.ops.tautorch.quantize_rows, (x, "silu_gate", None, None, gate))


def test_no_gradient() -> None:
    x = torch.randn(2, 16, requires_grad=True)
    for after in ("none", "rms_norm"):
        assert not any(t.requires_grad for t in quantize_rows(x, after, None if after == "none" else x[0]))
    torch.library.opcheck(torch.ops.tautorch.quantize_rows, (x, "gelu"))
    with pytest.raises(NotImplementedError, match=r"^quantize_rows: forward-mode differentiation"):
        torch.func.jvp(lambda x: quantize_rows(x)[1], (x.detach(),), (torch.ones(2, 16),))
    with pytest.raises(NotImplementedError, match=r"^quantize_rows: torch.func's grad"):
        torch.func.grad(lambda x: quantize_rows(x)[1].sum())(x.detach())


@pytest.mark.parametrize(
    "arguments,error",
    [
        ({"after": "relu"}, "after must be one of none, rms_norm"),
        ({"weight": torch.ones(8)}, "weight is for rms_norm and layer_norm"),
        ({"after": "rms_norm", "weight": torch.ones(7)}, r"weight must be floating \[8\] as x gives"),
        ({"after": "layer_norm", "bias": torch.ones(8, dtype=torch.int8)}, "bias must be floating"),
        ({"after": "silu_gate"}, "gate must be given for silu_gate"),
        ({"gate": torch.ones(2, 8)}, "gate must be given for silu_gate"),
        ({"after": "silu_gate", "gate": torch.ones(8)}, r"gate must be torch.float32 \[2, 8\] like x"),
        ({"after": "rms_norm", "eps": -1.0}, "eps must be finite and not negative, got -1"),
        ({"x_scale": torch.ones(2)}, "x_scale must be one float32"),
        ({"x_scale": torch.zeros(1)}, "x_scale must be positive and finite, with a finite inverse, got 0"),
        ({"x_zero_point": torch.ones(1, dtype=torch.int32)}, "x_zero_point must be one int32 beside"),
        (
            {"x_scale": torch.ones(1), "x_zero_point": torch.tensor([128]).int()},
            r"x_zero_point must be in \[-128, 127\], got 128",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"quantize_rows: {error}"):
        quantize_rows(torch.randn(2, 8), **arguments)


def test_refused_types() -> None:
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got torch\.float64"):
        quantize_rows(torch.randn(2, 8).double())
    with pytest.raises(ValueError, match="0-dimensional"):
        quantize_rows(torch.tensor(1.0))
    with pytest.raises(ValueError, match="must have elements in a row"):
        quantize_rows(torch.zeros(2, 0), "rms_norm")

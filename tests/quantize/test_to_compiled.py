"""What quantisation leaves on a float layer is what the compiled layer holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch.factorize import factorize
from tautorch.nn import Int8Conv2d, Int8Linear, LowRankConv2d, LowRankLinear, SparseConv2d, SparseLinear


def on_steps(layer: Any, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Put a layer's weight on random steps, as the methods do; returns the integers and the steps."""
    top = 2 ** (bits - 1) - 1
    steps = torch.rand(layer.weight.shape[0]) * 0.1 + 0.01
    q = torch.randint(-top, top + 1, layer.weight.shape)
    q[0] = q[0].clamp(-3, 3)  # amax / 127 or amax / 7 would be another step here
    with torch.no_grad():
        layer.weight.copy_(q.float() * steps.reshape(-1, *[1] * (q.dim() - 1)))
    layer.register_buffer("weight_scale", steps, persistent=False)
    return q.to(torch.int8), steps


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.Linear(24, 8), Int8Linear), (nn.Conv2d(4, 8, 3, groups=2), Int8Conv2d)]
)
def test_dense_layers_hold_the_very_integers(layer: Any, kind: Any, bits: int) -> None:
    q, steps = on_steps(layer, bits)
    for new in (
        kind.from_float(layer),
        kind.from_float(layer.half()),
        kind.from_float(layer, weight_scale=steps),
    ):
        assert torch.equal(new.state_dict()["weight"], q)
        assert torch.allclose(new.weight_scale, steps, rtol=1e-3)
    layer.float()


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.Linear(24, 8), SparseLinear), (nn.Conv2d(8, 8, 3), SparseConv2d)]
)
def test_sparse_layers_hold_the_very_integers(layer: Any, kind: Any) -> None:
    q, steps = on_steps(layer)
    new = kind.from_float(layer, pattern="unstructured")
    dense = new.dense_weight()
    assert torch.equal(dense, q.float() * steps.reshape(-1, *[1] * (q.dim() - 1)))
    assert torch.equal(new.weight_scale, steps)


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.Linear(24, 8), LowRankLinear), (nn.Conv2d(8, 8, 3), LowRankConv2d)]
)
def test_factors_hold_the_very_integers(layer: Any, kind: Any) -> None:
    pair: Any = factorize(nn.Sequential(layer), rank=3)[0]
    down, up = on_steps(pair.down), on_steps(pair.up)
    state = kind.from_float(pair, weight_dtype=torch.int8).state_dict()
    for name, (q, steps) in {"down": down, "up": up}.items():
        assert torch.equal(state[name], q)
        assert torch.equal(state[f"{name}_scale"], steps)


def test_static_ranges_left_on_the_layer() -> None:
    layer = nn.Linear(8, 4)
    layer.register_buffer("x_scale", torch.tensor([0.25]), persistent=False)
    layer.register_buffer("x_zero_point", torch.tensor([-7], dtype=torch.int32), persistent=False)
    new = Int8Linear.from_float(layer, quant="static")
    assert (float(new.x_scale), int(new.x_zero_point)) == (0.25, -7)
    assert float(Int8Linear.from_float(layer, quant="static", x_scale=0.5).x_scale) == 0.5
    assert Int8Linear.from_float(layer).x_scale is None


@pytest.mark.parametrize("bits", [4, 8])
def test_steps_are_left_aside_once_the_weight_is_off_them(bits: int) -> None:
    layer = nn.Linear(24, 8)
    q, steps = on_steps(layer, bits)
    if bits == 4:
        assert torch.equal(Int8Linear.from_float(layer.bfloat16()).state_dict()["weight"], q)
        layer.float()
    with torch.no_grad():
        layer.weight += torch.randn_like(layer.weight) * 0.3 * steps[:, None]
    amax = layer.weight.detach().abs().amax(1)
    assert torch.equal(Int8Linear.from_float(layer).weight_scale, amax / 127)
    with torch.no_grad():
        layer.weight.copy_(q.float() * 200 * steps[:, None])
    assert torch.equal(Int8Linear.from_float(layer).weight_scale, layer.weight.detach().abs().amax(1) / 127)


@pytest.mark.parametrize("scale", [torch.ones(3), torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, torch.nan])])
def test_bad_steps(scale: Tensor) -> None:
    with pytest.raises(ValueError, match=r"weight_scale must be \[4\], finite and positive"):
        Int8Linear.from_float(nn.Linear(8, 4), weight_scale=scale)

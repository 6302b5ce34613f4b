"""Layers with int8 output: the codes, by numpy; chains, states and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tautorch.nn import Int8Conv2d, Int8Linear, SparseConv2d, SparseLinear
from tautorch.reference.quantizer import quantize_weight

X: dict[str, Any] = {"quant": "static", "x_scale": 0.03, "x_zero_point": -5}
OUT: dict[str, Any] = {"out_scale": 0.11, "out_zero_point": 7}


def codes_of(x: torch.Tensor, layer: nn.Linear, activation: str = "none") -> np.ndarray:
    """Codes of int8 x [rows, inputs] through the layer, each operation of the epilogue rounded to float32."""
    q, scale = quantize_weight(layer.weight.detach())
    sums = (x.numpy().astype(np.int64) + 5) @ q.numpy().astype(np.int64).T
    assert layer.bias is not None
    y = sums.astype(np.float32) * np.float32(0.03) * scale.numpy() + layer.bias.detach().numpy()
    y = np.maximum(y, 0) if activation == "relu" else y
    steps = np.rint(y * (np.float32(1) / np.float32(0.11))).astype(np.float64)
    return np.clip(steps + 7, -128, 127).astype(np.int8)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (37, 64, 64), (50, 131, 96)])
def test_codes(rows: int, inputs: int, outputs: int, activation: str) -> None:
    linear = nn.Linear(inputs, outputs)
    conv = nn.Conv2d(inputs, outputs, 1)
    conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8)
    expected = torch.from_numpy(codes_of(x, linear, activation))
    assert len(expected.unique()) > 2  # codes, not the bounds alone
    mine = Int8Linear.from_float(linear, **X, **OUT, activation=activation)
    images = Int8Conv2d.from_float(conv, **X, **OUT, activation=activation)
    with torch.inference_mode():
        for _ in range(2):  # packing, then the plan
            assert torch.equal(mine(x), expected)
            assert torch.equal(
                images(x.T.reshape(1, inputs, rows, 1)), expected.T.reshape(1, outputs, rows, 1)
            )
        as_float = (x.float() + 5) * 0.03  # quantised inside to the same codes
        assert torch.equal(mine(as_float), expected)
    assert torch.equal(mine(x), expected)  # through the torch operator


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1", "16x16"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (37, 64, 64), (200, 131, 96)])
def test_sparse_codes(pattern: str, rows: int, inputs: int, outputs: int, activation: str) -> None:
    linear, conv = nn.Linear(inputs, outputs), nn.Conv2d(inputs, outputs, 1)
    if pattern == "2:4":
        kept = torch.arange(inputs).expand(outputs, inputs) % 4 < 2
    else:
        height, width = {"unstructured": (1, 1), "4x1": (4, 1), "16x16": (16, 16)}[pattern]
        blocks = torch.rand(-(-outputs // height), -(-inputs // width)) < 0.4
        kept = blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)[:outputs, :inputs]
    with torch.no_grad():
        linear.weight.mul_(kept)
    conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8)
    expected = torch.from_numpy(codes_of(x, linear, activation))
    arguments: dict[str, Any] = {**X, **OUT, "activation": activation, "pattern": pattern}
    mine = SparseLinear.from_float(linear, **arguments)
    images = SparseConv2d.from_float(conv, **arguments)
    image = x.T.reshape(1, inputs, rows, 1)
    with torch.inference_mode():
        for _ in range(2):  # packing, then the plan
            assert torch.equal(mine(x), expected)
            for each in (image, image.contiguous(memory_format=torch.channels_last)):
                assert torch.equal(images(each), expected.T.reshape(1, outputs, rows, 1))
    assert torch.equal(mine(x), expected)  # through the torch operator
    assert torch.equal(images(image), expected.T.reshape(1, outputs, rows, 1))


def test_chain() -> None:
    """Two layers, the second of which takes what the first one gives."""
    first, second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 8, 1)
    x = torch.rand(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = second(first(x).relu())
        top = float(first(x).max())
        middle = {"scale": top / 255, "zero_point": -128}
        a = Int8Conv2d.from_float(
            first, quant="static", x_scale=1 / 255, x_zero_point=-128, activation="relu",
            out_scale=middle["scale"], out_zero_point=-128,
        )  # fmt: skip
        b = Int8Conv2d.from_float(second, quant="static", x_scale=middle["scale"], x_zero_point=-128)
        assert a(x).dtype == torch.int8
        y = b(a(x))
    assert y.dtype == torch.float32
    error = float((y - expected).abs().max() / expected.abs().max())
    assert 0 < error < 0.03


@pytest.mark.parametrize("module_type", [Int8Linear, Int8Conv2d, SparseLinear, SparseConv2d])
def test_states(module_type: Any) -> None:
    linear = module_type in (Int8Linear, SparseLinear)
    layer: Any = nn.Linear(12, 20) if linear else nn.Conv2d(12, 20, 1)
    x = torch.randint(-128, 128, (3, 12) if linear else (3, 12, 2, 2), dtype=torch.int8)
    mine: Any = module_type.from_float(layer, **X, **OUT)
    expected = mine(x)
    assert "requantize=True" in repr(mine)
    assert mine.get_config()["requantize"] is True
    assert "requantize" not in module_type.from_float(layer, **X).get_config()
    twin: Any = module_type(**mine.get_config())
    twin.load_state_dict(mine.state_dict())
    assert torch.equal(twin(x), expected)
    half = twin.half()
    assert half.out_scale.dtype == torch.float32
    assert torch.equal(half(x), expected)
    mine.out_scale.mul_(2)  # an edit in place makes a new plan
    with torch.inference_mode():
        assert not torch.equal(mine(x), expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"out_scale": 0.0}, "out_scale must be finite and positive, got 0.0"),
        ({"out_scale": float("nan")}, "out_scale must be finite and positive, got nan"),
        ({"out_scale": 1.0, "out_zero_point": 128}, r"out_zero_point must lie in \[-128, 127\], got 128"),
        ({"out_zero_point": 1}, "out_zero_point needs out_scale, got None"),
    ],
)
def test_errors(arguments: dict[str, Any], match: str) -> None:
    for module_type, layer in (
        (Int8Linear, nn.Linear(4, 4)), (Int8Conv2d, nn.Conv2d(4, 4, 1)),
        (SparseLinear, nn.Linear(4, 4)), (SparseConv2d, nn.Conv2d(4, 4, 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            module_type.from_float(layer, **X, **arguments)  # type: ignore[arg-type]


def test_scales_left_on_a_layer() -> None:
    """Taken together or not at all; steps of another shape are somebody else's."""
    layer = nn.Linear(4, 6)
    layer.register_buffer("x_scale", torch.tensor([0.5]))
    layer.register_buffer("x_zero_point", torch.tensor([1], dtype=torch.int32))
    mine = Int8Linear.from_float(layer, quant="static")
    assert mine.x_scale == 0.5 and mine.x_zero_point == 1
    with pytest.raises(ValueError, match='quant="static" needs x_scale'):
        Int8Linear.from_float(layer, quant="static", x_zero_point=9)
    expected = Int8Linear.from_float(layer).weight_scale
    layer.register_buffer("weight_scale", torch.ones(3))
    assert torch.equal(Int8Linear.from_float(layer).weight_scale, expected)

"""ResNet-50's 3x3 and 1x1 convolutions (He et al., CVPR 2016; stride in the 3x3), static int8, channels last.

Each is timed twice. "int8": quantised input as the layer before left it; torch.ao's output is quantised too,
ours as well where the module offers it. "float": float input and output, quantisation inside; torch.ao
between its quantize_per_tensor and dequantize.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benches.peers.parts.common import add_local, ours
from benches.peers.results import Case, Target
from benches.peers.session import Session
from torch import Tensor, nn

from tautorch import prune
from tautorch.nn import Int8Conv2d, SparseConv2d
from tautorch.reference.int8_conv2d import int8_conv2d
from tautorch.reference.quantizer import quantize_weight
from tautorch.testing.tolerances import assert_close

X_SCALE, X_ZERO = 1 / 255, -128  # the range of what a ReLU gives, [0, 1]
SPARSITY = 0.8


@dataclass(frozen=True)
class Layer:
    """Square input of `size`; padding keeps it where the stride is 1."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        window, channels = f"{self.kernel}x{self.kernel}", f"{self.inputs}->{self.outputs}"
        return f"{window} {channels} {self.size}x{self.size} /{self.stride}"

    @property
    def macs(self) -> int:
        return self.inputs * self.outputs * self.kernel**2 * (self.size // self.stride) ** 2


def _stage(inputs: int, width: int, size: int, stride: int) -> list[Layer]:
    """The distinct layers of one stage: the first block's, then the others'."""
    inner, outputs = size // stride, 4 * width
    return [
        Layer(inputs, width, 1, 1, size),
        Layer(width, width, 3, stride, size),
        Layer(width, outputs, 1, 1, inner),
        Layer(inputs, outputs, 1, stride, size),
        Layer(outputs, width, 1, 1, inner),
        Layer(width, width, 3, 1, inner),
    ]


LAYERS = list(
    dict.fromkeys(
        _stage(64, 64, 56, 1) + _stage(256, 128, 56, 2) + _stage(512, 256, 28, 2) + _stage(1024, 512, 14, 2)
    )
)


def run(session: Session) -> None:
    """Every layer at batch 1 and 8."""
    for layer in LAYERS[4:8] if session.quick else LAYERS:
        for batch in (1,) if session.quick else (1, 8):
            for kind in ("int8", "float"):
                if session.wanted(f"{kind} {layer} batch {batch}"):
                    _case(session, layer, batch, kind)


def _case(session: Session, layer: Layer, batch: int, kind: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2)
    conv = conv.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.rand(batch, layer.inputs, layer.size, layer.size).contiguous(memory_format=torch.channels_last)
    expected = conv(x)
    mine, x_int8 = _ours(conv, expected, kind), _as_int8(x)
    given = x_int8 if kind == "int8" else x
    _check(mine, conv, given)
    meta = {"kind": kind, "layer": str(layer), "batch": batch, "kernel_size": layer.kernel}
    meta["out"] = str(mine(given).dtype).removeprefix("torch.")
    first = ours(session, "ours", mine, given)
    case = Case("conv", f"{kind} {layer} batch {batch}", meta, 2 * batch * layer.macs, first)
    case.limits = [session.peak()]
    for engine in ("x86", "onednn"):
        if engine in torch.backends.quantized.supported_engines:
            name = f"torch.ao {engine}"
            add_local(session, case, name, _torch_ao(engine, conv, x, expected, kind), expected)
    aos = tuple(c.name for c in case.peers)
    if kind == "float":
        half, half_x = copy.deepcopy(conv).bfloat16(), x.bfloat16()
        add_local(session, case, "torch bf16", lambda: half(half_x), expected)
        add_local(session, case, "torch fp32", lambda: conv(x), expected)
        about: dict[str, Any] = {"kind": "conv", "dtype": "int8", "stride": layer.stride}
        about |= {"padding": layer.kernel // 2}
        for name, tensor in (("x", x), ("weight", conv.weight), ("bias", conv.bias)):
            assert tensor is not None
            about[name] = session.array(name, tensor)
        session.add_remote(case, "openvino", "OpenVINO int8", about, expected)
    elif layer.kernel == 1:
        dense, sparse = _ours(conv, expected, "float"), _sparse(conv, {})
        codes = _sparse(conv, _codes(expected))
        case.own = [
            ours(session, "float output", dense, given), ours(session, f"4x1 {SPARSITY:.0%}", sparse, given),
            ours(session, f"4x1 {SPARSITY:.0%}, int8 output", codes, given),
        ]  # fmt: skip
        case.targets.append(Target("4x1 80 % over dense", 3.0, ("float output",), (case.own[1].name,)))
        case.targets.append(
            Target("4x1 80 % over dense, int8 output", 3.0, (first.name,), (case.own[2].name,))
        )
    case.targets.insert(0, Target("torch.ao", 1.0, aos))
    if kind == "int8" and layer.kernel == 3:
        case.share = 0.7
    session.measure(case)


def _ours(conv: nn.Conv2d, expected: Tensor, kind: str) -> Int8Conv2d:
    static: dict[str, Any] = {"quant": "static", "x_scale": X_SCALE, "x_zero_point": X_ZERO}
    return Int8Conv2d.from_float(conv, **static, **(_codes(expected) if kind == "int8" else {}))


def _codes(expected: Tensor) -> dict[str, Any]:
    """Arguments for int8 output of this range."""
    low, high = _range(expected)
    return {"out_scale": (high - low) / 255, "out_zero_point": round(-low * 255 / (high - low)) - 128}


def _sparse(conv: nn.Conv2d, codes: dict[str, Any]) -> SparseConv2d:
    score = torch.rand(conv.weight.shape, generator=torch.Generator().manual_seed(2))
    mask = prune.make_mask(score, "4x1", SPARSITY)
    return SparseConv2d.from_float(
        conv, pattern="4x1", mask=mask, quant="static", x_scale=X_SCALE, x_zero_point=X_ZERO, **codes
    )


def _as_int8(x: Tensor) -> Tensor:
    return (torch.round(x / X_SCALE) + X_ZERO).clamp(-128, 127).to(torch.int8)


def _range(y: Tensor) -> tuple[float, float]:
    return min(float(y.min()), 0.0), max(float(y.max()), 0.0)


def _check(mine: Int8Conv2d, conv: nn.Conv2d, x: Tensor) -> None:
    """The reference on the first and the last sample: the integers are exact."""
    assert conv.bias is not None
    rows = x if len(x) < 3 else torch.stack([x[0], x[-1]])
    got = mine(x)
    got = got if len(x) < 3 else torch.stack([got[0], got[-1]])
    q, scale = quantize_weight(conv.weight)
    fixed: dict[str, Any] = {"x_scale": mine.x_scale, "x_zero_point": mine.x_zero_point}
    if got.dtype == torch.int8:
        fixed |= {"out_scale": mine.out_scale, "out_zero_point": mine.out_zero_point}
    expected = int8_conv2d(
        rows,
        q,
        scale,
        conv.bias,
        stride=conv.stride,
        padding=conv.padding,
        **fixed,  # type: ignore[arg-type]
    )
    magnitude = (expected - conv.bias[:, None, None]).abs() + 2 * conv.bias.abs().max()
    assert_close(got, expected, magnitude=magnitude)


def _torch_ao(engine: str, conv: nn.Conv2d, x: Tensor, expected: Tensor, kind: str) -> Callable[[], Tensor]:
    """torch.ao's quantised convolution, uint8 in and out, weights with one scale per output."""
    assert conv.bias is not None
    q, scale = quantize_weight(conv.weight)
    low, high = _range(expected)
    out_scale, out_zero = (high - low) / 255, round(-low * 255 / (high - low))
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        weight = torch._make_per_channel_quantized_tensor(
            q, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0
        ).contiguous(memory_format=torch.channels_last)
        packed = torch.ops.quantized.conv2d_prepack(
            weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
    finally:
        torch.backends.quantized.engine = before
    quantized = torch.quantize_per_tensor(x, X_SCALE, 0, torch.quint8)

    def int8() -> Any:
        return torch.ops.quantized.conv2d(quantized, packed, out_scale, out_zero)

    def whole() -> Any:
        given = torch.quantize_per_tensor(x, X_SCALE, 0, torch.quint8)
        return torch.ops.quantized.conv2d(given, packed, out_scale, out_zero).dequantize()

    return int8 if kind == "int8" else whole

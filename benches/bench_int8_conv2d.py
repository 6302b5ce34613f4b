"""int8_conv2d beside torch.ao's quantised convolution and nn.Conv2d, with its share of the arithmetic's peak.

"chained": int8 in, int8 out, for both. "float": float in, float out; the peer quantises, multiplies and
dequantises. Static scales, two threads; channels last unless the case says NCHW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.nn import Int8Conv2d
from tautorch.ops import geometry as conv
from tautorch.ops import tails
from tautorch.ops.int8_conv2d import plan
from tautorch.testing.bench import Table

OUT_SCALE, OUT_POINT = 0.02, 3


class Layer(NamedTuple):
    """A convolution and the size of its image."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    groups: int = 1
    dilation: int = 1
    nchw: bool = False

    def __str__(self) -> str:
        size = f"{self.kernel}x{self.kernel} /{self.stride} {self.size}x{self.size}"
        text = f"{self.inputs}->{self.outputs} {size}"
        text += f" groups {self.groups}" if self.groups > 1 else ""
        text += f" dilation {self.dilation}" if self.dilation > 1 else ""
        return text + (" NCHW" if self.nchw else "")


RESNET50 = [
    *(Layer(3, 64, 7, 2, 224), Layer(64, 64, 1, 1, 56), Layer(64, 64, 3, 1, 56), Layer(64, 256, 1, 1, 56)),
    *(
        Layer(256, 64, 1, 1, 56),
        Layer(256, 128, 1, 1, 56),
        Layer(128, 128, 3, 2, 56),
        Layer(256, 512, 1, 2, 56),
    ),
    *(
        Layer(128, 512, 1, 1, 28),
        Layer(512, 128, 1, 1, 28),
        Layer(128, 128, 3, 1, 28),
        Layer(512, 256, 1, 1, 28),
    ),
    *(Layer(256, 256, 3, 2, 28), Layer(512, 1024, 1, 2, 28), Layer(256, 1024, 1, 1, 14)),
    *(Layer(1024, 256, 1, 1, 14), Layer(256, 256, 3, 1, 14), Layer(1024, 512, 1, 1, 14)),
    *(Layer(512, 512, 3, 2, 14), Layer(1024, 2048, 1, 2, 14), Layer(512, 2048, 1, 1, 7)),
    *(Layer(2048, 512, 1, 1, 7), Layer(512, 512, 3, 1, 7)),
]
OTHERS = [
    *(Layer(128, 128, 3, 1, 28, 128), Layer(32, 32, 3, 1, 112, 32), Layer(96, 96, 3, 2, 112, 96)),
    *(Layer(960, 960, 3, 1, 7, 960), Layer(240, 240, 5, 1, 14, 240)),  # depthwise
    *(Layer(128, 128, 3, 1, 56, 32), Layer(256, 256, 3, 1, 28, 32), Layer(512, 512, 3, 1, 14, 32)),
    *(Layer(1024, 1024, 3, 1, 7, 32), Layer(128, 128, 3, 1, 28, 4)),  # ResNeXt's groups
    *(Layer(128, 128, 3, 1, 28, 1, 2), Layer(127, 131, 3, 1, 28), Layer(61, 67, 3, 1, 28)),
    *(Layer(17, 19, 3, 1, 56), Layer(3, 32, 3, 2, 224), Layer(1, 32, 3, 1, 28)),
    *(Layer(64, 64, 3, 1, 56, nchw=True), Layer(3, 64, 7, 2, 224, nchw=True)),
    *(Layer(64, 256, 1, 1, 56, nchw=True), Layer(256, 256, 1, 1, 28, nchw=True)),
    *(Layer(1024, 256, 1, 1, 14, nchw=True), Layer(512, 2048, 1, 1, 7, nchw=True)),
    Layer(128, 128, 3, 1, 28, 128, nchw=True),
]


def _chained(layer: Int8Conv2d, x: Tensor) -> tuple[Callable[[], Tensor | None], list[Tensor]]:
    """The layer on int8 x with int8 output, and what must outlive it."""
    packed = layer._buffers["packed"]
    assert packed is not None
    codes, keep = tails.tail(
        weight_scale=layer.weight_scale,
        bias=layer.bias,
        mode=tails.GIVEN,
        x_scale=layer.x_scale,
        x_zero_point=layer.x_zero_point,
        activation=layer.activation,
        out_scale=torch.tensor([OUT_SCALE]),
        out_zero_point=torch.tensor([OUT_POINT], dtype=torch.int32),
    )
    call = conv.conv_call(plan(packed, layer.geometry, codes), layer.geometry, torch.int8, torch.int8)
    return lambda: conv.run_conv(_C.int8_conv2d_run, call, x), [packed, *keep]


def _torch_ao(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """torch.ao's convolution on a quint8 tensor."""
    weight = layer.weight.detach()
    scale = weight.abs().amax((1, 2, 3)).double() / 127
    q = torch.quantize_per_channel(weight, scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)
    bias = None if layer.bias is None else layer.bias.detach()
    packed = torch.ops.quantized.conv2d_prepack(
        q, bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    return lambda x: torch.ops.quantized.conv2d(x, packed, OUT_SCALE, OUT_POINT + 128)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("case", [*RESNET50, *OTHERS], ids=str)
def test_int8_conv2d(table: Table, case: Layer, batch: int) -> None:
    """Every layer of ResNet-50, then depthwise, grouped, dilated, odd and narrow ones."""
    layer = nn.Conv2d(
        case.inputs,
        case.outputs,
        case.kernel,
        case.stride,
        case.dilation * (case.kernel // 2),
        case.dilation,
        case.groups,
    )
    memory = torch.contiguous_format if case.nchw else torch.channels_last
    layer = layer.eval().requires_grad_(False).to(memory_format=memory)
    x = torch.rand(batch, case.inputs, case.size, case.size).to(memory_format=memory)
    ours = Int8Conv2d.from_float(layer, quant="static", x_scale=1 / 255, x_zero_point=-128)
    with torch.inference_mode():
        expected = layer(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0.05)
        assert dispatch.last_used("int8_conv2d") == ours.kernel()
        peer = _torch_ao(layer)
        x_int8 = (x * 255 - 128).round().to(torch.int8)
        x_quint8 = torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8)
        chained, keep = _chained(ours, x_int8)
        q = chained()
        assert q is not None
        least, most = ((bound - OUT_POINT) * OUT_SCALE for bound in (-128, 127))
        real = (q.float() - OUT_POINT) * OUT_SCALE
        torch.testing.assert_close(real, expected.clamp(least, most), rtol=0, atol=0.05 + OUT_SCALE)
        levels = (q.int() + 128 - peer(x_quint8).int_repr().int()).abs()
        if case.groups < case.inputs:  # torch.ao's depthwise kernels saturate at 16 bits: up to 19 levels
            assert int(levels.max()) <= 1
    operations = 2 * expected.numel() * (case.inputs // case.groups) * case.kernel**2

    rows: list[tuple[str, Callable[[], object], dict[str, Callable[[], object]]]] = [
        ("chained", chained, {"torch.ao": lambda: peer(x_quint8)}),
        (
            "float",
            lambda: ours(x),
            {
                "torch.ao": lambda: peer(torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8)).dequantize(),
                "nn.Conv2d fp32": lambda: layer(x),
            },
        ),
    ]
    for form, run, peers in rows:
        table.compare(
            "int8_conv2d",
            f"{case} batch {batch} {form}",
            run,
            peers,
            operations=operations,
            seconds=0.15,
            peak_of=ours.kernel(),
            kernel=ours.kernel(),
        )
    del keep

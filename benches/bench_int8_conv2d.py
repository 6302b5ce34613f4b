"""int8_conv2d beside nn.Conv2d in its better memory format."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautorch import dispatch
from tautorch.nn import Int8Conv2d
from tautorch.testing.bench import Table

# in, out, kernel, stride, groups, size
LAYERS = [
    (64, 64, 3, 1, 1, 56),
    (256, 64, 1, 1, 1, 56),
    (128, 128, 3, 2, 1, 56),
    (256, 256, 3, 1, 1, 14),
    (128, 128, 3, 1, 4, 28),
    (128, 128, 3, 1, 128, 28),
    (32, 64, 3, 1, 1, 8),
]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("i, o, kernel, stride, groups, size", LAYERS)
def test_int8_conv2d(
    table: Table, i: int, o: int, kernel: int, stride: int, groups: int, size: int, batch: int
) -> None:
    """Static scales, channels last, two threads."""
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups).eval()
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.rand(batch, i, size, size).to(memory_format=torch.channels_last)
    ours = Int8Conv2d.from_float(conv, quant="static", x_scale=1 / 255, x_zero_point=-128)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), conv(x), rtol=0, atol=0.05)
    assert dispatch.last_used("int8_conv2d") == ours.kernel()
    macs = ours(x).numel() * (i // groups) * kernel**2
    table.compare(
        "int8_conv2d",
        f"{i}->{o} {kernel}x{kernel} /{stride} groups {groups} {size}x{size} batch {batch}",
        lambda: ours(x),
        {"nn.Conv2d fp32": lambda: conv(x)},
        operations=2 * macs,
        kernel=ours.kernel(),
    )

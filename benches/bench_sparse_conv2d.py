"""sparse_conv2d beside our own dense int8 convolution, and beside nn.Conv2d."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautorch import dispatch, prune
from tautorch.nn import Int8Conv2d, SparseConv2d
from tautorch.testing.bench import Table


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize(
    "i, o, kernel, size, nchw",
    [
        *((256, 64, 1, 56, False), (64, 64, 3, 56, False), (256, 256, 3, 14, False), (64, 128, 3, 8, False)),
        *((256, 64, 1, 56, True), (64, 256, 1, 56, True), (1024, 256, 1, 14, True), (64, 64, 3, 56, True)),
    ],
)
def test_sparse_conv2d(
    table: Table, i: int, o: int, kernel: int, size: int, nchw: bool, sparsity: float, batch: int
) -> None:
    """4x1 blocks, static scales, two threads; channels last unless the row says NCHW."""
    memory = torch.contiguous_format if nchw else torch.channels_last
    conv = nn.Conv2d(i, o, kernel, padding=kernel // 2).eval().to(memory_format=memory)
    mask = prune.make_mask(conv.weight.detach().abs(), "4x1", sparsity)
    quant = {"quant": "static", "x_scale": 1 / 255, "x_zero_point": -128}
    dense = Int8Conv2d.from_float(conv, **quant)
    with torch.no_grad():
        conv.weight.mul_(mask)
    ours = SparseConv2d.from_float(conv, pattern="4x1", mask=mask, **quant)
    x = torch.rand(batch, i, size, size).to(memory_format=memory)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), conv(x), rtol=0, atol=0.05)
    assert dispatch.last_used("sparse_conv2d") == ours.kernel()
    table.compare(
        "sparse_conv2d",
        f"4x1 {sparsity:.0%} {i}->{o} {kernel}x{kernel} {size}x{size}{' NCHW' if nchw else ''} batch {batch}",
        lambda: ours(x),
        {"Int8Conv2d": lambda: dense(x), "nn.Conv2d fp32": lambda: conv(x)},
        kernel=ours.kernel(),
    )

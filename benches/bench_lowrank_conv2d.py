"""lowrank_conv2d in one call beside two calls of nn.Conv2d on the same factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautorch import dispatch
from tautorch.factorize import FactorizedConv2d
from tautorch.nn import LowRankConv2d
from tautorch.testing.bench import Table


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.int8], ids=["fp32", "int8"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("i, o, rank, size", [(64, 64, 16, 56), (256, 256, 32, 14)])
def test_lowrank_conv2d(
    table: Table, i: int, o: int, rank: int, size: int, batch: int, weight_dtype: torch.dtype
) -> None:
    """3x3, channels last, two threads."""
    pair = FactorizedConv2d(nn.Conv2d(i, rank, 3, padding=1, bias=False), nn.Conv2d(rank, o, 1)).eval()
    pair = pair.to(memory_format=torch.channels_last)
    ours = LowRankConv2d.from_float(pair, weight_dtype=weight_dtype)
    x = torch.randn(batch, i, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        exact = weight_dtype == torch.float32
        torch.testing.assert_close(ours(x), pair(x), rtol=0, atol=1e-4 if exact else 0.1)
    assert dispatch.last_used("lowrank_conv2d") == ours.kernel()
    name = str(weight_dtype).removeprefix("torch.")
    table.compare(
        "lowrank_conv2d",
        f"{name} {i}->{rank}->{o} {size}x{size} batch {batch}",
        lambda: ours(x),
        {"two nn.Conv2d fp32": lambda: pair(x)},
        kernel=ours.kernel(),
    )

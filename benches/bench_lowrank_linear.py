"""lowrank_linear in one call beside two calls of nn.Linear on the same factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tautorch import dispatch
from tautorch.factorize import FactorizedLinear
from tautorch.nn import LowRankLinear
from tautorch.testing.bench import Table


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.int8], ids=["fp32", "int8"])
@pytest.mark.parametrize("m", [1, 16, 128])
@pytest.mark.parametrize("k, n, rank", [(768, 3072, 32), (1024, 4096, 64)])
def test_lowrank_linear(table: Table, k: int, n: int, rank: int, m: int, weight_dtype: torch.dtype) -> None:
    """Two threads."""
    pair = FactorizedLinear(nn.Linear(k, rank, bias=False), nn.Linear(rank, n)).eval()
    ours = LowRankLinear.from_float(pair, weight_dtype=weight_dtype)
    x = torch.randn(m, k)
    with torch.inference_mode():
        exact = weight_dtype == torch.float32
        torch.testing.assert_close(ours(x), pair(x), rtol=0, atol=1e-4 if exact else 0.1)
    assert dispatch.last_used("lowrank_linear") == ours.kernel()
    name = str(weight_dtype).removeprefix("torch.")
    table.compare(
        "lowrank_linear",
        f"{name} {m}x{k}x{n} rank {rank}",
        lambda: ours(x),
        {"two nn.Linear fp32": lambda: pair(x)},
        kernel=ours.kernel(),
    )

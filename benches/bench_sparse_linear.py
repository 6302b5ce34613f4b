"""sparse_linear beside our own dense int8 layer, and beside nn.Linear."""

from __future__ import annotations

import pytest
import torch

from tautorch import dispatch, prune
from tautorch.nn import Int8Linear, SparseLinear
from tautorch.testing.bench import Table

K, N = 1024, 4096


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float32], ids=["int8", "fp32"])
@pytest.mark.parametrize("m", [1, 16, 128])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x16"])
def test_sparse_linear(
    table: Table, pattern: str, sparsity: float, m: int, weight_dtype: torch.dtype
) -> None:
    """Random magnitudes; two threads."""
    linear = torch.nn.Linear(K, N).eval()
    mask = prune.make_mask(linear.weight.detach().abs(), pattern, sparsity)
    dense = Int8Linear.from_float(linear)
    with torch.no_grad():
        linear.weight.mul_(mask)
    ours = SparseLinear.from_float(linear, pattern=pattern, mask=mask, weight_dtype=weight_dtype)
    x = torch.randn(m, K)
    with torch.inference_mode():
        exact = weight_dtype == torch.float32
        torch.testing.assert_close(ours(x), linear(x), rtol=0, atol=1e-4 if exact else 0.2)
    assert dispatch.last_used("sparse_linear") == ours.kernel()
    peers = {"nn.Linear fp32": lambda: linear(x)}
    if not exact:
        peers["Int8Linear"] = lambda: dense(x)
    name = str(weight_dtype).removeprefix("torch.")
    table.compare(
        "sparse_linear",
        f"{pattern} {sparsity:.0%} {name} {m}x{K}x{N}",
        lambda: ours(x),
        peers,
        kernel=ours.kernel(),
    )

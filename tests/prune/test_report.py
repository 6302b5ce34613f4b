"""The sparsity report counts what is there."""

from __future__ import annotations

import torch
from torch import nn

from tautorch.prune import sparsity_report


def test_counts_and_table() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:4, 1] = 0.0
        model[0].weight[4, 0] = 0.0
        model[1].weight.fill_(1.0)[4, 3] = 0.0
    report = sparsity_report(model, "4x1")
    first, second = report.layers
    assert (first.weights, first.zeros, first.blocks, first.zero_blocks) == (32, 5, 8, 1)
    assert (second.weights, second.zeros, second.blocks, second.zero_blocks) == (40, 1, 16, 1)
    assert (report.weights, report.zeros) == (72, 6)
    assert report.sparsity == 6 / 72
    assert first.block_sparsity == 1 / 8
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert "15.6%" in lines[1]
    assert "12.5%" in lines[1]
    assert "8.3%" in lines[3]

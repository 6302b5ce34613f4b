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
    lines = [line.split() for line in str(report).splitlines() if "%" in line]
    assert lines[0] == ["0", "8x4", "32", "27", "15.6%", "██░░░░░░░░", "12.5%"]
    assert lines[1] == ["1", "5x8", "40", "39", "2.5%", "░░░░░░░░░░", "6.2%"]
    assert lines[2] == ["total", "72", "66", "8.3%", "█░░░░░░░░░"]
    assert "4x1 zero" in str(report)


def test_names_are_not_taken_for_markup() -> None:
    model = nn.ModuleDict({"[bold]": nn.Linear(2, 2)})
    assert "[bold]" in str(sparsity_report(model))

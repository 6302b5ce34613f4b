"""How sparse a model is, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from tautorch._layers import layer_groups, select_layers
from tautorch.prune._tables import bar, table, text
from tautorch.prune.patterns import Blocks, parse_pattern

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerSparsity:
    """One layer: its weights, how many are zero, and the pattern's blocks that are all zero."""

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    blocks: int
    zero_blocks: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return self.zeros / self.weights

    @property
    def block_sparsity(self) -> float:
        """Share of the blocks that are all zero: what a kernel of that pattern can skip."""
        return self.zero_blocks / self.blocks


@dataclass(frozen=True)
class SparsityReport:
    """The layers of a model and their totals; `str()` is a table, and `rich.print` shows it in colour."""

    pattern: str
    layers: tuple[LayerSparsity, ...]

    @property
    def weights(self) -> int:
        """Weights of all the layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Zero weights of all the layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of all the layers' weights that are zero."""
        return self.zeros / self.weights

    def __rich__(self) -> Table:
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.weights:,}",
                f"{layer.weights - layer.zeros:,}",
                f"{layer.sparsity:.1%}",
                bar(layer.sparsity),
                f"{layer.block_sparsity:.1%}",
            )
            for layer in self.layers
        ]
        columns = ("layer", "shape", "weights", "kept", "zero", "", f"{self.pattern} zero")
        kept = self.weights - self.zeros
        total = (
            "total",
            "",
            f"{self.weights:,}",
            f"{kept:,}",
            f"{self.sparsity:.1%}",
            bar(self.sparsity),
            "",
        )
        return table("Sparsity", columns, rows, total)

    def __str__(self) -> str:
        return text(self.__rich__())


def sparsity_report(
    model: nn.Module, pattern: str = "unstructured", layers: Iterable[str] | None = None
) -> SparsityReport:
    """Count the zero weights of a model's Linear and Conv2d layers, and the all-zero blocks of `pattern`.

    For an n:m pattern a block is one weight.
    """
    form = parse_pattern("sparsity_report", pattern)
    rows = []
    for name, layer in select_layers("sparsity_report", model, layers).items():
        kept = (layer.weight.detach() != 0).to(torch.float64)
        blocks = Blocks.of("sparsity_report", kept, form, layer_groups(layer)).scores
        rows.append(
            LayerSparsity(
                name,
                tuple(layer.weight.shape),
                kept.numel(),
                int((kept == 0).sum()),
                blocks.numel(),
                int((blocks == 0).sum()),
            )
        )
    return SparsityReport(pattern, tuple(rows))

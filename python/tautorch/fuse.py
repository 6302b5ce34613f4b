"""Fold what follows a layer into it: batch norm into weights, activations into the compiled epilogue."""

from __future__ import annotations

from torch import nn

from tautorch._batches import Batch


def fuse(model: nn.Module, example_inputs: Batch | None = None) -> nn.Module:
    """Folds batch norms into the convolution or linear layer before them, and ReLU, GELU or SiLU modules into the
    `activation` of a tautorch layer before them; what was folded becomes `nn.Identity`. In place; returns model.
    """
    raise NotImplementedError

"""From weights that are trained in a quantised form to plain layers that `convert` takes."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from tautorch.quantize.clustering import clustered


def finalize(model: nn.Module) -> nn.Module:
    """Turn the layers that `cluster` made into plain ones, in place, with the weights they stand for.

    Raises ValueError when the model has no such layer.
    """
    found = [module for module in model.modules() if clustered(module) is not None]
    if not found:
        raise ValueError("finalize: the model must have layers made by quantize.cluster, got none")
    for module in found:
        parametrize.remove_parametrizations(module, "weight")
    return model

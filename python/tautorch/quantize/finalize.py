"""From weights that are trained in a quantised form to plain layers that `convert` takes."""

from __future__ import annotations

from torch import nn

from tautorch._layers import take_off_parametrisation
from tautorch.quantize.clustering import clustered
from tautorch.quantize.qat import fake_quantised, freeze_on_grid
from tautorch.quantize.whole import require_whole


def finalize(model: nn.Module) -> nn.Module:
    """Turn the layers that `prepare_qat` and `cluster` made into plain ones, in place, with the weights they
    stand for.

    After QAT the weight lies on its grid and the steps stand beside it in buffers that `from_float` takes
    (`weight_scale`; static: `x_scale`, `x_zero_point`), so that

        convert(model, {name: partial(Int8Linear.from_float, quant="static"), ...})

    computes what the model computed in eval mode, to float rounding. The buffers are not in the state_dict:
    convert before saving, with `tautorch.save`.

    Raises ValueError when the model has no such layer, or is sharded.
    """
    require_whole("finalize", model)
    clusters = [module for module in model.modules() if clustered(module) is not None]
    grids = [model.get_submodule(name) for name in fake_quantised(model)]
    if not clusters and not grids:
        raise ValueError(
            "finalize: the model must have layers made by quantize.prepare_qat or cluster, got none"
        )
    for module in clusters:
        take_off_parametrisation(module)
    for module in grids:
        freeze_on_grid(module)
    return model

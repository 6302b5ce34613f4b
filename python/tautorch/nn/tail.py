"""Argument handling the modules share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tautorch.reference.common import ACTIVATIONS
from tautorch.reference.quantizer import quantize_weight

QUANTS = ("dynamic", "static", "weight_only")


def check_activation(op: str, activation: str) -> None:
    """Raise ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def left_by_quantize(layer: nn.Module, name: str) -> Tensor | None:
    """A buffer that ``tautorch.quantize`` left on a float layer: ``x_scale``, ``x_zero_point``."""
    return layer._buffers.get(name)


def grid_of(layer: nn.Module, weight: Tensor | None = None) -> Tensor | None:
    """The steps ``[out]`` that ``tautorch.quantize`` left on a float layer, if its weight still lies on them.

    ``weight``: the whole of it, where the layer holds a part.

    None once the weight was trained or loaded anew. "On" is within 0.3 of a step, which float16 keeps at 8
    bits and bfloat16 at 4 (their steps are rounded too).
    """
    steps = layer._buffers.get("weight_scale")
    weight = layer.weight if weight is None else weight  # type: ignore[assignment]
    if steps is None or not isinstance(weight, Tensor) or steps.shape != weight.shape[:1]:
        return None
    q = weight.detach().flatten(1).float() / steps.float().unsqueeze(1)
    on = q.numel() == 0 or bool(((q - q.round()).abs().amax() < 0.3) & (q.abs().amax() < 127.5))
    return steps if on else None


def leave_grid(layer: nn.Module, steps: Tensor, kept: Tensor | None) -> None:
    """Leave beside a weight that lies on ``steps`` ``[out]`` what `grid_of` and `kept_of` ask of its layer.

    Buffers, not in the state_dict: ``weight_scale``, the steps; ``weight_kept``, bool of the weight's shape,
    False where it is pruned, or None; ``weight_zeros``, how many weights are zero, pruned or rounded.
    """
    zeros = (layer.weight.detach() == 0).sum()  # type: ignore[operator]
    for name, value in (("weight_scale", steps), ("weight_kept", kept), ("weight_zeros", zeros)):
        layer.register_buffer(name, value, persistent=False)


def kept_of(layer: nn.Linear | nn.Conv2d) -> Tensor | None:
    """The weights that are not pruned, bool of the weight's shape; None where none is.

    Pruned weights are zero. On a grid so are those that rounded to zero: the mask that was left there tells
    them apart, while there are as many zeros as then. Otherwise every zero counts as pruned, since no method
    may undo pruning; but none where all are zero: that is how some layers are initialised.
    """
    kept = layer.weight.detach() != 0
    zeros = layer._buffers.get("weight_zeros")
    if zeros is not None and int(zeros) == int((~kept).sum()) and grid_of(layer) is not None:
        return layer._buffers["weight_kept"]
    return None if bool(kept.all()) or not bool(kept.any()) else kept


def static_tensors(
    op: str,
    quant: str,
    x_scale: Tensor | float | None,
    x_zero_point: Tensor | int | None,
    device: torch.device | str | None,
    layer: nn.Module | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The buffers ``x_scale`` (float32 [1]) and ``x_zero_point`` (int32 [1]) of a static layer, checked.

    Where neither is given they are those that ``tautorch.quantize`` left on the float ``layer``, if any.

    Raises:
        ValueError: given without ``quant="static"`` or missing with it, not finite and positive, or a zero
            point outside [-128, 127].
    """
    if quant != "static":
        if x_scale is not None or x_zero_point is not None:
            raise ValueError(f'{op}: x_scale and x_zero_point need quant="static", got quant={quant!r}')
        return None, None
    if x_scale is None and x_zero_point is None and layer is not None:
        x_scale, x_zero_point = left_by_quantize(layer, "x_scale"), left_by_quantize(layer, "x_zero_point")
    if x_scale is None:
        raise ValueError(f'{op}: quant="static" needs x_scale, got None; see tautorch.quantize.calibrate')
    return _scale_and_point(op, "x", x_scale, x_zero_point, device)


def output_tensors(
    op: str,
    out_scale: Tensor | float | None,
    out_zero_point: Tensor | int | None,
    device: torch.device | str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The buffers ``out_scale`` (float32 [1]) and ``out_zero_point`` (int32 [1]) of a layer with int8 output.

    Raises:
        ValueError: a zero point without a scale, a scale that is not finite and positive, or a zero point
            outside [-128, 127].
    """
    if out_scale is None:
        if out_zero_point is not None:
            raise ValueError(f"{op}: out_zero_point needs out_scale, got None")
        return None, None
    return _scale_and_point(op, "out", out_scale, out_zero_point, device)


def int8_tensors(
    op: str,
    module: nn.Linear | nn.Conv2d,
    quant: str,
    x_scale: Tensor | float | None,
    x_zero_point: Tensor | int | None,
    weight_scale: Tensor | None,
    out_scale: Tensor | float | None,
    out_zero_point: Tensor | int | None,
) -> dict[str, Tensor | None]:
    """All buffers of the int8 layer that stands for a float one, by name; arguments of its ``from_float``."""
    device = module.weight.device
    scale, zero_point = static_tensors(op, quant, x_scale, x_zero_point, device, module)
    out = output_tensors(op, out_scale, out_zero_point, device)
    steps = grid_of(module) if weight_scale is None else weight_scale
    q, steps = quantize_weight(module.weight, steps, op=op)
    return {
        "weight": q,
        "weight_scale": steps,
        "x_scale": scale,
        "x_zero_point": zero_point,
        "out_scale": out[0],
        "out_zero_point": out[1],
    }


def _scale_and_point(
    op: str,
    name: str,
    given_scale: Tensor | float,
    given_point: Tensor | int | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    scale = float(given_scale)
    zero_point = 0 if given_point is None else int(given_point)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{op}: {name}_scale must be finite and positive, got {scale}")
    if not -128 <= zero_point <= 127:
        raise ValueError(f"{op}: {name}_zero_point must lie in [-128, 127], got {zero_point}")
    return (
        torch.tensor([scale], dtype=torch.float32, device=device),
        torch.tensor([zero_point], dtype=torch.int32, device=device),
    )

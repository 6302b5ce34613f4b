"""How important each weight is: the scores that masks are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch._batches import Batches, observe_inputs, require_seen
from tautorch._layers import Layer

#: "magnitude", "activation", "sparsegpt", or a callable (layer name, layer) -> score of the weight's shape.
Importance = str | Callable[[str, nn.Module], Tensor]
#: Those that look at the layers' inputs.
CALIBRATED = ("activation", "sparsegpt")


def importance_scores(
    op: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    importance: Importance,
    calibration: Batches | None,
    named: bool = True,
) -> dict[str, Tensor]:
    """The score of every weight of `layers`, higher = more important, float64 except from a callable.

    - "magnitude": |W| (Han et al. 2015, "Learning both Weights and Connections", arXiv:1506.02626).
    - "activation": |W_ij| * ||X_j||_2 with X_j the j-th input over all calibration rows (Sun et al. 2023,
      Wanda, arXiv:2306.11695); for a convolution X_j is the column of its unfolded input.
    - a callable: whatever it returns, which must have the weight's shape.

    Raises ValueError for an unknown name, and a layer that calibration never reached;
    unless the layers were `named`, such a layer only gets no score.
    """
    if callable(importance):
        return {name: _checked(op, name, layer, importance(name, layer)) for name, layer in layers.items()}
    if importance == "magnitude":
        return {name: layer.weight.detach().double().abs() for name, layer in layers.items()}
    if importance == "activation" and calibration is not None:
        norms = input_norms(op, model, layers, calibration, named)
        return {name: layers[name].weight.detach().double().abs() * norms[name] for name in norms}
    raise ValueError(
        f'{op}: importance must be "magnitude", "activation", "sparsegpt" or a callable, got {importance!r}'
    )


def _checked(op: str, name: str, layer: Layer, score: Tensor) -> Tensor:
    if not isinstance(score, Tensor) or score.shape != layer.weight.shape:
        want, got = list(layer.weight.shape), list(score.shape) if isinstance(score, Tensor) else type(score)
        raise ValueError(f"{op}: importance({name!r}) must return a tensor {want}, got {got}")
    return score


def input_norms(
    op: str, model: nn.Module, layers: Mapping[str, Layer], batches: Batches, named: bool = True
) -> dict[str, Tensor]:
    """The L2 norm of each input of each layer over `batches`, float64, broadcastable to the layer's weight.

    Linear: [1, K]. Conv2d: [O, I / groups, kh, kw], each tap over the positions it really sees. A layer that
    never ran is a ValueError, or left out unless `named`.
    """
    squares: dict[str, Tensor] = {}

    def see(name: str, layer: Layer, x: Tensor) -> None:
        wide = x.double()
        total = _linear_squares(wide) if isinstance(layer, nn.Linear) else _conv_squares(wide, layer)
        squares[name] = squares[name] + total if name in squares else total

    require_seen(op, layers, observe_inputs(op, model, layers, batches, see), named)
    return {name: squares[name].sqrt() for name in layers if name in squares}


def _linear_squares(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).square().sum(0, keepdim=True)


def _conv_squares(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Sum of squares over samples and positions of each unfolded column, repeated for each output."""
    if x.dim() == 3:
        x = x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    energy = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode).square().sum(0)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    rows = (energy.shape[1] - dh * (kh - 1) - 1) // sh + 1
    cols = (energy.shape[2] - dw * (kw - 1) - 1) // sw + 1
    down = [slice(i * dh, i * dh + sh * (rows - 1) + 1, sh) for i in range(kh)]
    right = [slice(j * dw, j * dw + sw * (cols - 1) + 1, sw) for j in range(kw)]
    taps = [energy[:, vertical, horizontal].sum((1, 2)) for vertical in down for horizontal in right]
    columns = torch.stack(taps, 1).reshape(conv.groups, conv.in_channels // conv.groups, kh, kw)
    return columns.repeat_interleave(conv.out_channels // conv.groups, dim=0)

"""How important each weight is: the scores that masks are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch import distributed
from tautorch._batches import (
    Batches,
    check_batches,
    left_as_it_is,
    model_device,
    observe_inputs,
    own_copy,
    require_seen,
    to_device,
)
from tautorch._layers import Layer

#: One of `NAMES`, or a callable (layer name, layer) -> score of the weight's shape, such as a `Movement`.
Importance = str | Callable[[str, nn.Module], Tensor]
#: (model, batch) -> scalar, for importances by gradient; the batch is as `calibration` gives it.
LossOf = Callable[[nn.Module, Any], Tensor]
NAMES = ("magnitude", "activation", "mean_activation", "gradient", "gradient_squared", "sparsegpt")
#: Those that run the model over calibration batches.
CALIBRATED = frozenset(NAMES[1:])
#: Those that also need a loss.
DIFFERENTIATED = frozenset({"gradient", "gradient_squared"})


def check_importance(op: str, importance: object, calibration: object, loss: object) -> None:
    """ValueError for an unknown name, and for a missing calibration or loss; TypeError for a bad loss."""
    if callable(importance):
        return
    if importance not in NAMES:
        known = ", ".join(f'"{name}"' for name in NAMES)
        raise ValueError(f"{op}: importance must be {known} or a callable, got {importance!r}")
    if importance in CALIBRATED and calibration is None:
        raise ValueError(f'{op}: calibration must hold batches for importance "{importance}", got None')
    if importance in DIFFERENTIATED and not callable(loss):
        raise TypeError(
            f'{op}: loss must be a callable (model, batch) -> scalar for importance "{importance}", '
            f"got {type(loss).__name__}"
        )


def importance_scores(
    op: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    importance: Importance,
    calibration: Batches | None = None,
    named: bool = True,
    loss: LossOf | None = None,
) -> dict[str, Tensor]:
    """The score of every weight of `layers`, higher = more important, float64 except from a callable.

    - "magnitude": |W| (Han et al. 2015, "Learning both Weights and Connections", arXiv:1506.02626).
    - "activation": |W_ij| * ||X_j||_2 with X_j the j-th input over all calibration rows (Sun et al. 2023,
      Wanda, arXiv:2306.11695); for a convolution X_j is the column of its unfolded input.
    - "mean_activation": the mean of |X_j| over samples and positions, one for each input channel, whatever
      its weights (Molchanov et al. 2017, arXiv:1611.06440, where it is one of the baselines).
    - "gradient": sum over batches of |G * W| with G the gradient of `loss`, the first-order change of the
      loss when the weight goes (Molchanov et al. 2017); "gradient_squared": of (G * W)^2 (Molchanov et al.
      2019, arXiv:1906.10771). Batches of one sample give the papers' expectations; larger ones average
      before the absolute value.
    - a callable: whatever it returns, which must have the weight's shape.

    ("sparsegpt" ranks while it changes the weights: see `tautorch.prune.sparsegpt`.) Raises ValueError for an
    unknown name, a loss that is not finite, and a layer that calibration never reached; unless the layers
    were `named`, such a layer only gets no score.
    """
    if callable(importance):
        return {name: _checked(op, name, layer, importance(name, layer)) for name, layer in layers.items()}
    check_importance(op, importance, calibration, loss)
    weights = {
        name: distributed.full_tensor(layer.weight).detach().double() for name, layer in layers.items()
    }
    if importance == "magnitude":
        return {name: weight.abs() for name, weight in weights.items()}
    if calibration is not None and importance == "activation":
        norms = input_norms(op, model, layers, calibration, named)
        return {name: weights[name].abs() * norms[name] for name in norms}
    if calibration is not None and importance == "mean_activation":
        means = input_means(op, model, layers, calibration, named)
        return {name: means[name].expand_as(weights[name]) for name in means}
    if calibration is not None and loss is not None and importance in DIFFERENTIATED:
        power = 2 if importance == "gradient_squared" else 1
        return _gradient_scores(op, model, layers, calibration, loss, power, named)
    raise ValueError(f"{op}: importance must give scores, got {importance!r}")


def _checked(op: str, name: str, layer: Layer, score: Tensor) -> Tensor:
    if not isinstance(score, Tensor) or score.shape != layer.weight.shape:
        want, got = list(layer.weight.shape), list(score.shape) if isinstance(score, Tensor) else type(score)
        raise ValueError(f"{op}: importance({name!r}) must return a tensor {want}, got {got}")
    return score


def _gradient_scores(
    op: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Batches,
    loss: LossOf,
    power: int,
    named: bool,
) -> dict[str, Tensor]:
    check_batches(op, batches)
    device = model_device(model)
    weights = {name: layer.weight for name, layer in layers.items()}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    scores: dict[str, Tensor] = {}
    count = 0
    failure: Exception | None = None
    with left_as_it_is(model), torch.enable_grad():
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            for batch in batches:
                value = loss(model, own_copy(to_device(batch, device)))
                _check_loss(op, value, count)
                # Not backward(): the parameters' own .grad stay as they are.
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    if gradient is not None:
                        term = (gradient.detach().double() * weight.detach().double()).abs() ** power
                        scores[name] = scores[name] + term if name in scores else term
                count += 1
            if count == 0:
                raise ValueError(
                    f"{op}: calibration must hold at least one batch, got none (a spent generator?)"
                )
        except Exception as error:
            failure = error
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
    distributed.raise_together(failure)
    scores = distributed.sum_over_ranks(scores)
    require_seen(op, layers, set(scores), named)
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{op}: the gradient of layer {name!r} must be finite, got NaN or Inf")
    return {name: scores[name] for name in layers if name in scores}


def _check_loss(op: str, value: object, batch: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: loss must return a scalar with a gradient, got {got} at batch {batch}")
    if not bool(torch.isfinite(value)):
        raise ValueError(f"{op}: loss must be finite, got {value.item()} at calibration batch {batch}")


def input_norms(
    op: str, model: nn.Module, layers: Mapping[str, Layer], batches: Batches, named: bool = True
) -> dict[str, Tensor]:
    """The L2 norm of each input of each layer over all ranks' `batches`, float64, shaped to fit its weight.

    Linear: [1, K]. Conv2d: [O, I / groups, kh, kw], each tap over the positions it really sees. A layer that
    never ran is a ValueError, or left out unless `named`.
    """
    squares: dict[str, Tensor] = {}

    def see(name: str, layer: Layer, x: Tensor) -> None:
        wide = x.double()
        total = _linear_squares(wide) if isinstance(layer, nn.Linear) else _conv_squares(wide, layer)
        squares[name] = squares[name] + total if name in squares else total

    require_seen(op, layers, observe_inputs(op, model, layers, batches, see), named)
    squares = distributed.sum_over_ranks(squares)
    return {name: squares[name].sqrt() for name in layers if name in squares}


def input_means(
    op: str, model: nn.Module, layers: Mapping[str, Layer], batches: Batches, named: bool = True
) -> dict[str, Tensor]:
    """The mean absolute value of each input channel over all ranks' `batches`, float64, shaped to fit.

    Linear: [1, K]. Conv2d: [O, I / groups, 1, 1], over the samples and positions of the unpadded input.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def see(name: str, layer: Layer, x: Tensor) -> None:
        wide = x.double().abs()
        channels = wide.movedim(-1 if isinstance(layer, nn.Linear) else -3, 0).flatten(1)
        total = channels.sum(1)
        sums[name] = sums[name] + total if name in sums else total
        rows = torch.tensor(channels.shape[1], dtype=torch.float64, device=total.device)
        counts[name] = counts[name] + rows if name in counts else rows

    require_seen(op, layers, observe_inputs(op, model, layers, batches, see), named)
    sums, counts = distributed.sum_over_ranks(sums), distributed.sum_over_ranks(counts)
    means: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if name in sums:
            mean = sums[name] / counts[name]
            if isinstance(layer, nn.Linear):
                means[name] = mean.unsqueeze(0)
            else:
                by_group = mean.reshape(layer.groups, -1, 1, 1)
                means[name] = by_group.repeat_interleave(layer.out_channels // layer.groups, dim=0)
    return means


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

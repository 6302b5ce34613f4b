"""Convolutional teachers rewritten with cheaper convolutions, started from the teacher's weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tautorch._batches import Batch, Batches
from tautorch._gram import input_grams
from tautorch._layers import replace_layers, select_layers
from tautorch.factorize.svd import Svd
from tautorch.factorize.targets import conv_like
from tautorch.ownership import refusal
from tautorch.students.checks import check_same_outputs, trainable

Between = Literal["linear", "norm"]
# Stems of a few channels stay as they are, as in both papers: there is next to nothing to save.
_MIN_CHANNELS = 8


def depthwise_separable(
    teacher: nn.Module,
    example_input: Batch,
    *,
    layers: Iterable[str] | None = None,
    multiplier: int = 1,
    between: Between = "linear",
    calibration: Batches | None = None,
) -> nn.Module:
    """A student whose k x k convolutions are depthwise ones and then 1x1 (MobileNet, arXiv:1704.04861).

    Each becomes `nn.Sequential(depthwise, pointwise)`, with the convolution's stride, padding and dilation in
    `depthwise`: all shapes, norms and residuals stay. The teacher is left as it is.

    The weights start from the teacher's: each input channel's filters [O, kh * kw] are replaced by their best
    approximation of rank `multiplier`, one filter and what each output takes of it.

    Args:
        teacher: any model with `nn.Conv2d` layers, a ResNet-50 say.
        example_input: one batch of what the model takes; the student must return the teacher's shapes on it.
        layers: names or shell patterns; None takes every convolution larger than 1x1, without groups, of at
            least 8 input channels, that may be replaced. A named one that cannot is a ValueError.
        multiplier: filters for each input channel.
        between: "linear" puts nothing between the two, so that they start as near the teacher as they can.
            "norm" puts batch norm and ReLU there, as MobileNet does: train for longer.
        calibration: batches of what the model takes: filters are then the best for the inputs seen, and
            the 1x1 weights those of the least squared error of the outputs, damped ("linear" alone).
    """
    op = "depthwise_separable"
    if isinstance(multiplier, bool) or not isinstance(multiplier, int) or multiplier < 1:
        raise ValueError(f"{op}: multiplier must be an int >= 1, got {multiplier!r}")
    if between not in get_args(Between):
        raise ValueError(f'{op}: between must be "linear" or "norm", got {between!r}')
    if between == "norm" and calibration is not None:
        raise ValueError(f'{op}: calibration fits linear layers; leave it out with between="norm"')

    def fits(layer: nn.Conv2d) -> str | None:
        if max(layer.kernel_size) == 1:
            return "it is 1x1"
        if multiplier >= layer.kernel_size[0] * layer.kernel_size[1]:
            return f"multiplier {multiplier} leaves nothing to save"
        return None

    def build(layer: nn.Conv2d, gram: Tensor | None) -> nn.Module:
        return _separable(layer, multiplier, between, gram)

    return _rewritten(op, teacher, example_input, layers, calibration, fits, build)


def channel_shuffle(
    teacher: nn.Module,
    example_input: Batch,
    *,
    groups: int = 4,
    depthwise: bool = True,
    layers: Iterable[str] | None = None,
    calibration: Batches | None = None,
) -> nn.Module:
    """A student of grouped 1x1 convolutions, shuffles and depthwise filters (ShuffleNet, arXiv:1707.01083).

    A 1x1 convolution becomes `nn.Sequential(grouped, shuffle)`; a k x k one with as many outputs as inputs a
    depthwise one (its 1x1 neighbours mix the channels, as in a bottleneck). Stride, padding, dilation, norms
    and residuals stay. The teacher is left as it is.

    The weights start from the teacher's: those that remain. Output c goes on reading the inputs of group
    c mod `groups`, which the shuffle brings back to place c.

    Args:
        teacher: a model of bottlenecks, a ResNet-50 say.
        example_input: one batch of what the model takes; the student must return the teacher's shapes on it.
        groups: of the 1x1 convolutions; layers whose channels it does not divide stay.
        depthwise: whether k x k convolutions are rewritten too. Leave it off where no 1x1 convolutions
            stand around them (a ResNet-18): nothing would mix the channels.
        layers: names or shell patterns; None takes every convolution without groups, of at least 8 input
            channels, that fits and may be replaced. A named one that cannot is a ValueError.
        calibration: batches of what the model takes: the remaining weights are then those of the least
            squared error of the outputs, damped.
    """
    op = "channel_shuffle"
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 2:
        raise ValueError(f"{op}: groups must be an int >= 2, got {groups!r}")

    def fits(layer: nn.Conv2d) -> str | None:
        if max(layer.kernel_size) > 1:
            if not depthwise:
                return "it is larger than 1x1"
            same = layer.in_channels == layer.out_channels
            return None if same else "a depthwise one would need as many outputs as inputs"
        divided = layer.in_channels % groups == 0 and layer.out_channels % groups == 0
        return None if divided else f"{groups} groups do not divide its channels"

    def build(layer: nn.Conv2d, gram: Tensor | None) -> nn.Module:
        if max(layer.kernel_size) > 1:
            return _remaining(layer, layer.in_channels, gram)
        grouped = _remaining(layer, groups, gram)
        return nn.Sequential(OrderedDict(grouped=grouped, shuffle=nn.ChannelShuffle(groups)))

    return _rewritten(op, teacher, example_input, layers, calibration, fits, build)


def _rewritten(
    op: str,
    teacher: nn.Module,
    example_input: Batch,
    layers: Iterable[str] | None,
    calibration: Batches | None,
    fits: Callable[[nn.Conv2d], str | None],
    build: Callable[[nn.Conv2d, Tensor | None], nn.Module],
) -> nn.Module:
    chosen: dict[str, nn.Conv2d] = {}
    for name, layer in select_layers(op, teacher, layers, (nn.Conv2d,)).items():
        if isinstance(layer, nn.Conv2d):
            reason = _why_not(teacher, name, layer, layers is not None) or fits(layer)
            if reason is None:
                chosen[name] = layer
            elif layers is not None:
                raise ValueError(f"{op}: layer {name!r} cannot be rewritten: {reason}")
    if not chosen:
        raise ValueError(f"{op}: the teacher must have a convolution to rewrite, got none that fits")
    for name, layer in chosen.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"{op}: the weight of layer {name!r} must be finite, got NaN or Inf")
    grams: Mapping[str, Tensor] = {}
    if calibration is not None:
        grams = input_grams(op, teacher, chosen, calibration, named=layers is not None)
    student = copy.deepcopy(teacher)
    replace_layers(student, {name: build(layer, grams.get(name)) for name, layer in chosen.items()})
    check_same_outputs(op, teacher, student, example_input)
    return trainable(student)


def _why_not(model: nn.Module, name: str, layer: nn.Conv2d, named: bool) -> str | None:
    if not name:
        return "it is the whole model; wrap it in nn.Sequential"
    if layer.groups != 1:
        return "it has groups already"
    if layer.in_channels < _MIN_CHANNELS and not named:
        return f"it has fewer than {_MIN_CHANNELS} input channels"
    return refusal(model, name)


def _separable(layer: nn.Conv2d, multiplier: int, between: Between, gram: Tensor | None) -> nn.Sequential:
    outputs, inputs, kh, kw = layer.weight.shape
    weight = layer.weight.detach().double()
    taps = kh * kw
    own = None if gram is None else _own_blocks(gram[0], inputs, taps)
    filters, takes = Svd(weight.reshape(outputs, inputs, taps).transpose(0, 1), own).factors(multiplier)
    # The sign of a filter is free; a positive one passes the ReLU of "norm".
    sign = torch.where(filters.sum(-1) < 0, -1.0, 1.0).to(filters)
    filters, takes = filters * sign.unsqueeze(-1), takes * sign.unsqueeze(1)
    mixing = takes.permute(1, 0, 2).reshape(outputs, inputs * multiplier)
    if gram is not None:
        spread = weight.new_zeros(inputs, multiplier, inputs, taps)
        spread[torch.arange(inputs), :, torch.arange(inputs)] = filters
        spread = spread.reshape(inputs * multiplier, inputs * taps)
        moment = gram[0].to(weight)
        mixing = _least_squares(spread @ moment @ spread.T, spread @ moment @ weight.flatten(1).T, mixing.T).T
    depthwise = conv_like(layer, filters.reshape(inputs * multiplier, 1, kh, kw), None, inputs, spatial=True)
    pointwise = conv_like(layer, mixing.reshape(outputs, -1, 1, 1), layer.bias)
    parts: list[tuple[str, nn.Module]] = [("depthwise", depthwise)]
    if between == "norm":
        norm = nn.BatchNorm2d(inputs * multiplier, device=layer.weight.device, dtype=layer.weight.dtype)
        parts += [("norm", norm), ("activation", nn.ReLU())]
    return nn.Sequential(OrderedDict([*parts, ("pointwise", pointwise)]))


def _remaining(layer: nn.Conv2d, groups: int, gram: Tensor | None) -> nn.Conv2d:
    """The convolution in `groups`: output c reads the inputs of group c mod `groups`; in shuffle's order."""
    outputs, inputs, kh, kw = layer.weight.shape
    weight = layer.weight.detach().double()
    per_group, columns = outputs // groups, inputs // groups * kh * kw
    rows = (
        torch.arange(outputs).reshape(per_group, groups).T
    )  # [groups, per_group]: what group reads for whom
    parts = []
    for group in range(groups):
        own = slice(group * columns, (group + 1) * columns)
        full = weight.flatten(1)[rows[group]]
        part = full[:, own]
        if gram is not None:
            moment = gram[0].to(weight)
            part = _least_squares(moment[own, own], moment[own] @ full.T, part.T).T
        parts.append(part)
    bias = None if layer.bias is None else layer.bias.detach()[rows.flatten().to(layer.bias.device)]
    weights = torch.cat(parts).reshape(outputs, inputs // groups, kh, kw)
    return conv_like(layer, weights, bias, groups, spatial=True)


def _own_blocks(gram: Tensor, inputs: int, taps: int) -> Tensor:
    """[inputs, taps, taps]: each channel's own block of the second moments."""
    return torch.einsum("iaib->iab", gram.reshape(inputs, taps, inputs, taps))


def _least_squares(moment: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """X of least ||A X - B||^2 + d ||X - start||^2, moment = A^T A and target = A^T B.

    d is a hundredth of the mean moment: directions that few inputs showed keep the teacher's weights. Without
    it a ResNet fitted to 8 images was further from its teacher than one not fitted.
    """
    damping = 0.01 * moment.diagonal().mean().clamp_min(1e-300)
    damped = moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    found: Tensor = torch.linalg.solve(damped, target + damping * start)
    return found

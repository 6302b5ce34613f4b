"""Training with the quantisation in the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tautorch._batches import Batches
from tautorch._layers import Layer, select_layers, take_off_parametrisation
from tautorch.nn.tail import grid_of, kept_of, leave_grid
from tautorch.ownership import refusal
from tautorch.quantize.calibration import calibrate
from tautorch.quantize.fake import FakeQuantInput, FakeQuantWeight
from tautorch.quantize.observers import Observer
from tautorch.quantize.qparams import QParams, check_bits, quantize_weight
from tautorch.quantize.whole import require_whole

QUANTS = ("dynamic", "static", "weight_only")
_INPUT = "input_quantizer"


def prepare_qat(
    model: nn.Module,
    bits: int = 4,
    quant: str = "dynamic",
    calibration: Batches | None = None,
    layers: Iterable[str] | None = None,
    observer: str | Callable[[], Observer] = "mse",
    learn_steps: bool = True,
) -> nn.Module:
    """Make the linear and convolution layers compute with quantised weights and inputs while they train.

    Rounding is passed by the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432) and the steps
    are learned (LSQ, Esser et al. 2020, arXiv:1902.08153), one for each output channel. In place: a layer's
    weight becomes the parametrisation `FakeQuantWeight`, its input goes through the child `input_quantizer`.
    Pruned weights stay zero; those that `gptq` or an earlier QAT rounded to zero train on. Make the optimizer
    afterwards; `step_parameters` gives the steps for a group of their own without weight decay. Adam, for
    which LSQ's scaling of gradients makes no difference, moves a step by about the learning rate each time:
    let that group's be far below the steps (0.001 halved a static input's of 0.002 in 8 times). Evaluated
    without training it is post-training quantisation by rounding to the best scales. Then `finalize`, and
    `convert` gives layers with the same integers.

    With several ranks: `DistributedDataParallel` or `fully_shard` after `prepare_qat`, and `finalize` on a
    model that is not sharded.

    A batch norm may stay behind its layer: after `finalize`, `fuse` folds it into the steps.

    Args:
        bits: of the weights, 4 to 8: integers in [-7, 7] to [-127, 127], which the compiled layers hold as
            int8. For several, call it once for each with `layers`.
        quant: inputs in int8 by the row ("dynamic"; convolutions by the sample), by a learned step with a
            fixed zero point ("static", from `calibration`), or left alone ("weight_only").
        calibration: batches for the static ranges.
        layers: names or shell patterns; None takes every Linear and Conv2d that `convert` would replace (and,
            static, that `calibration` reaches).
        observer: of the static ranges, as in `calibrate`.
        learn_steps: False keeps the steps found at the start: straight-through alone. A frozen layer (its
            weight needs no gradient) keeps them anyway.

    Raises ValueError/TypeError for arguments out of range, layers that cannot be used, NaN or Inf in a weight
    or in the calibration; the model is then as it was.
    """
    check_bits("prepare_qat", bits)
    require_whole("prepare_qat", model)
    targets = qat_targets("prepare_qat", model, quant, layers)
    if (calibration is None) == (quant == "static"):
        got = "None" if calibration is None else f"it with quant={quant!r}"
        raise ValueError(f"prepare_qat: calibration must hold batches for quant='static' alone, got {got}")
    ranges: dict[str, QParams] = {}
    if calibration is not None:
        named = None if layers is None else list(targets)
        ranges = calibrate(model, calibration, observer, layers=named)
        targets = {name: layer for name, layer in targets.items() if name in ranges}
    made = {
        name: (
            weight_quantizer("prepare_qat", name, layer, bits, learn_steps),
            input_quantizer(layer, quant, ranges.get(name), learn_steps),
        )
        for name, layer in targets.items()
    }
    for name, (weight, given) in made.items():
        attach(targets[name], weight, given)
    return model


def attach(layer: Layer, weight: FakeQuantWeight, given: FakeQuantInput | None) -> None:
    """Put the quantisers on a layer."""
    parametrize.register_parametrization(layer, "weight", weight)
    if given is not None:
        layer.add_module(_INPUT, given)
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def detach(layer: nn.Module, keep: bool = True) -> None:
    """Take the quantisers off a layer; it keeps the weight on its grid, or the float one it was made of."""
    take_off_parametrisation(layer, keep)
    if _INPUT in layer._modules:
        del layer._modules[_INPUT]
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _quantize_input:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)


def fake_quantised(model: nn.Module) -> dict[str, FakeQuantWeight]:
    """The quantised weights of the layers that `prepare_qat` made, by layer name."""
    parts = {name: fake_weight(module) for name, module in model.named_modules()}
    return {name: part for name, part in parts.items() if part is not None}


def fake_weight(layer: nn.Module) -> FakeQuantWeight | None:
    """The quantiser of a layer's weight, None where it has none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # type: ignore[index]
    return first if isinstance(first, FakeQuantWeight) else None


def step_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The learned steps: parameters that should have no weight decay."""
    for module in model.modules():
        if isinstance(module, (FakeQuantWeight, FakeQuantInput)) and module.step is not None:
            yield module.step


def freeze_on_grid(layer: nn.Module) -> None:
    """End QAT on one layer: a plain weight on its grid, with the steps beside it for `from_float`.

    The buffers of `leave_grid` and, static, `x_scale` and `x_zero_point` are not in the state_dict.
    """
    weight = fake_weight(layer)
    if weight is None:
        raise ValueError("freeze_on_grid: the layer must be one that prepare_qat made")
    given = layer._modules.get(_INPUT)
    x_scale = x_zero_point = None
    if isinstance(given, FakeQuantInput) and (step := given.scale()) is not None:
        x_scale, x_zero_point = step.detach().clone(), given.zero_point.clone()
    detach(layer)
    with torch.no_grad():
        layer.get_parameter("weight").add_(
            0.0
        )  # -0.0 becomes 0.0: a sign that rounding left would cost a bit in a coded file
    leave_grid(layer, weight.scale().detach().clone(), weight.mask)
    # None too: an earlier QAT may have left others.
    layer.register_buffer("x_scale", x_scale, persistent=False)
    layer.register_buffer("x_zero_point", x_zero_point, persistent=False)


def qat_targets(op: str, model: nn.Module, quant: str, layers: Iterable[str] | None) -> dict[str, Layer]:
    """The layers that `convert` would replace, by name; ValueError for one that is named and would not be."""
    if quant not in QUANTS:
        raise ValueError(f"{op}: quant must be one of {', '.join(QUANTS)}, got {quant!r}")
    targets = select_layers(op, model, layers)
    refused = {name: why for name in targets if (why := refusal(model, name)) is not None}
    if refused and (layers is not None or len(refused) == len(targets)):
        name, why = next(iter(refused.items()))
        raise ValueError(f"{op}: layer {name!r} cannot be used: {why}")
    return {name: layer for name, layer in targets.items() if name not in refused}


def weight_quantizer(op: str, name: str, layer: Layer, bits: int, learned: bool) -> FakeQuantWeight:
    """A quantiser for the weight as it is, what is pruned masked, on the best steps."""
    weight = layer.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{op}: the weight of layer {name!r} must be finite, got NaN or Inf")
    step = _steps_it_lies_on(layer, bits)
    if step is None:
        _, step = quantize_weight(weight, search=True, bits=bits)
    return FakeQuantWeight(bits, step, kept_of(layer), learned and layer.weight.requires_grad)


def _steps_it_lies_on(layer: Layer, bits: int) -> Tensor | None:
    """The steps that another method, such as GPTQ, left on the layer, if they hold the weight in `bits`."""
    steps = grid_of(layer)
    if steps is None:
        return None
    most = (layer.weight.detach().flatten(1).abs().amax(1).float() / steps).max()
    return steps if float(most) < 2 ** (bits - 1) - 0.5 else None


def input_quantizer(layer: Layer, quant: str, found: QParams | None, learned: bool) -> FakeQuantInput | None:
    """A quantiser for the input, None where it stays float; static for `found`, else dynamic."""
    if quant == "weight_only":
        return None
    samples = isinstance(layer, nn.Conv2d)
    made = FakeQuantInput(samples)
    if found is not None:
        made = FakeQuantInput(samples, found.scale, found.zero_point, learned and layer.weight.requires_grad)
    return made.to(layer.weight.device)


def _quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = layer._modules[_INPUT]
    if quantizer is None:
        raise TypeError("prepare_qat: a layer has lost its input_quantizer; call finalize to end QAT")
    if args:
        x: Tensor = quantizer(args[0])
        return (x, *args[1:]), kwargs
    return args, {**kwargs, "input": quantizer(kwargs["input"])}

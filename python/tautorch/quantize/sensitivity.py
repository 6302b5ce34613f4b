"""Which layer's quantisation costs the model most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tautorch import distributed
from tautorch._batches import (
    Batches,
    call_model,
    check_batches,
    left_as_it_is,
    model_device,
    observe_inputs,
    output_tensors,
    require_seen,
    squared_change,
    to_device,
)
from tautorch._layers import Layer
from tautorch.quantize.calibration import calibrate
from tautorch.quantize.fake import FakeQuantInput, FakeQuantWeight
from tautorch.quantize.observers import Observer
from tautorch.quantize.qat import attach, detach, input_quantizer, qat_targets, weight_quantizer
from tautorch.quantize.qparams import check_bits
from tautorch.quantize.whole import require_whole


@dataclass(frozen=True)
class LayerCost:
    """What quantising one layer alone does.

    `output_sqnr` is 10 log10 of the model's squared outputs over their squared error, in decibels, and
    `layer_sqnr` the same of the layer's own outputs: high is good, infinite is exact. `metric_drop` is the
    metric of the float model less that with the layer quantised, None without a metric.
    """

    layer: str
    output_sqnr: float
    layer_sqnr: float
    metric_drop: float | None
    parameters: int


@dataclass(frozen=True)
class Sensitivity:
    """Costs of the layers, the dearest first; `str()` is a table."""

    layers: list[LayerCost]
    metric: float | None

    def __str__(self) -> str:
        width = max([5, *(len(cost.layer) for cost in self.layers)])
        head = f"{'layer':{width}}  output SQNR  layer SQNR  parameters"
        lines = [head + ("  metric drop" if self.metric is not None else "")]
        for cost in self.layers:
            line = f"{cost.layer:{width}}  {cost.output_sqnr:8.1f} dB  {cost.layer_sqnr:7.1f} dB"
            line += f"  {cost.parameters:10,}"
            lines.append(line + (f"  {cost.metric_drop:11.4g}" if cost.metric_drop is not None else ""))
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    batches: Batches,
    bits: int = 8,
    quant: str = "dynamic",
    layers: Iterable[str] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    observer: str | Callable[[], Observer] = "mse",
) -> Sensitivity:
    """Quantise one layer at a time, as `prepare_qat` does, and measure what that does to the model.

    One run of the model over `batches` for each layer (and one of the metric). The layers at the head of the
    list are those to leave in float, to give more bits, or to train. The model is not
    changed, but for what its own forward writes into buffers of over 64 MB or into lists.
    Under `torch.distributed` each rank gives its own batches, and the metric of rank 0 counts.

    Args:
        bits, quant, layers, observer: as in `prepare_qat`; static ranges come from `batches`.
        metric: the model's quality, higher is better, asked in eval mode without gradients; the list is
            ordered by its drop, without it by the SQNR of the model's outputs; NaN is the dearest.

    Raises ValueError/TypeError as `prepare_qat`.
    """
    check_bits("sensitivity", bits)
    check_batches("sensitivity", batches)
    require_whole("sensitivity", model)
    held = list(batches)
    targets = qat_targets("sensitivity", model, quant, layers)
    seen = observe_inputs("sensitivity", model, targets, held, lambda *_: None)
    require_seen("sensitivity", targets, seen, named=layers is not None)
    targets = {name: layer for name, layer in targets.items() if name in seen}
    ranges = calibrate(model, held, observer, layers=list(targets)) if quant == "static" else {}
    made = {
        name: (
            weight_quantizer("sensitivity", name, layer, bits, learned=False),
            input_quantizer(layer, quant, ranges.get(name), learned=False),
        )
        for name, layer in targets.items()
    }
    whole = {name: _Ratio() for name in targets}
    own = {name: _Ratio() for name in targets}
    device = model_device(model)
    with left_as_it_is(model):
        for batch in (to_device(batch, device) for batch in held):
            exact, inner = _run(model, batch, targets)
            for name in (name for name in targets if name in inner):
                with _quantised(targets[name], *made[name]):
                    outputs, outer = _run(model, batch, {name: targets[name]})
                whole[name].add(exact, outputs)
                own[name].add(inner[name], outer[name])
        normal: float | None = None
        drops: dict[str, float] = {}
        if metric is not None:
            normal = distributed.broadcast_value(float(metric(model)))
            for name in targets:
                with _quantised(targets[name], *made[name]):
                    drops[name] = normal - distributed.broadcast_value(float(metric(model)))
    costs = [
        LayerCost(name, whole[name].decibels(), own[name].decibels(), drops.get(name), layer.weight.numel())
        for name, layer in targets.items()
    ]
    costs.sort(key=lambda cost: tuple(_nan_first(x) for x in (-(cost.metric_drop or 0.0), cost.output_sqnr)))
    return Sensitivity(costs, normal)


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


class _Ratio:
    """Squares of a signal and of its error, summed."""

    def __init__(self) -> None:
        self.signal = self.error = 0.0

    def add(self, exact: list[Tensor], got: list[Tensor]) -> None:
        for x, y in zip(exact, got, strict=True):
            change, was = squared_change(x, y)
            self.signal, self.error = self.signal + was, self.error + change

    def decibels(self) -> float:
        """Over all ranks."""
        both = torch.tensor([self.signal, self.error], dtype=torch.float64)
        self.signal, self.error = distributed.all_reduce(both).tolist()
        if self.error == 0:
            return math.inf
        broken = self.signal == 0 or math.isinf(self.error)
        return -math.inf if broken else 10 * math.log10(self.signal / self.error)


def _run(
    model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The floating outputs of the model, and of each of the layers call by call."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, out: Tensor) -> None:
            found.setdefault(name, []).append(out.clone())  # the next layer may work in place

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        output = call_model("sensitivity", model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [t for t in output_tensors(output) if t.is_floating_point()], found


@contextmanager
def _quantised(layer: Layer, weight: FakeQuantWeight, given: FakeQuantInput | None) -> Iterator[None]:
    attach(layer, weight, given)
    try:
        yield
    finally:
        detach(layer, keep=False)

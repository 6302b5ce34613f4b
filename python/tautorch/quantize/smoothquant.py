"""SmoothQuant: outliers of the activations move into the weights, so that both quantise to int8.

Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from tautorch._layers import replace_layers, select_layers
from tautorch.nn.tail import grid_of
from tautorch.quantize.equivariance import Absorber, agreed_absorbers
from tautorch.quantize.qparams import qparams_of_range, quantize_weight
from tautorch.quantize.record import each_run
from tautorch.quantize.whole import require_whole

# Input rows of each layer that the int8 error is measured on.
_ROWS = 256
# A multiplication of its own must lower a layer's int8 error (squared) at least to this share.
_WORTH = 0.5
# The model's outputs may move by this much (relative L2) where it computes in float32.
_ROUNDING = 1e-4


class InputScale(nn.Module):
    """y = x * scale along the last dimension; the part of SmoothQuant that no layer before could take.

    `scale` is a buffer, [features].
    """

    scale: Tensor

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("scale", torch.ones(features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x scaled, in x's dtype."""
        return x * self.scale.to(x.dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}"


@dataclass(frozen=True)
class Smoothed:
    """What `smooth` did to one group of layers that read the same channels.

    `into` names the norm or linear layer that divides; None where the layer got an `InputScale`, or nothing
    was done (`alpha` None). `error_before` and `error_after` are relative squared errors of the layers'
    outputs in int8.
    """

    layers: tuple[str, ...]
    into: str | None
    alpha: float | None
    error_before: float
    error_after: float


@dataclass
class _Seen:
    """Of one layer's inputs: the largest magnitude of each channel, and some rows, all [.., K]."""

    amax: Tensor
    rows: list[Tensor]
    kept: int = 0

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        self.amax = torch.maximum(self.amax, flat.abs().amax(0).float())
        room = _ROWS - self.kept
        if room > 0:
            step = max(1, flat.shape[0] // min(room, 64))
            some = flat[::step][: min(room, 64)].float().clone()
            self.rows.append(some)
            self.kept += some.shape[0]


def smooth(
    model: nn.Module,
    batches: Batches,
    alpha: float | Sequence[float] = 0.5,
    layers: Iterable[str] | None = None,
    explicit: bool = True,
    quant: str = "dynamic",
    report: list[Smoothed] | None = None,
) -> nn.Module:
    """Divide each input channel j of the linear layers by s_j and multiply their weights' column j by it,
    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha). In place; the model computes what it computed, to rounding.

    SmoothQuant: Xiao et al. 2022, arXiv:2211.10438. The division goes into the norm or linear layer that
    makes the channels: LayerNorm, RMSNorm (also hand-written ones that end in a product with a parameter),
    the linear layer before a ReLU, the values of an attention, the ungated half of a gated unit. They are
    found by following the channels through a run of the model, whose tensors are all kept meanwhile: on the
    first batch, and on each that takes another way through the model. A reader that is not one of `layers`,
    such as a residual, refuses. Where nothing can take
    the division, the layer becomes nn.Sequential(scale=InputScale, layer=Linear), if that halves its
    int8 error.

    Args:
        batches: what the model takes. Under `torch.distributed` each rank gives its own.
        alpha: 0 leaves the range in the weights, 1 moves it all there; 0.5 is the paper's, 0.75 to 0.9 serve
            strong outliers. Of a sequence, each group takes the one with the least int8 error, or none.
        layers: names or shell patterns of nn.Linear; None takes all that own their weight alone and run.
        explicit: False leaves layers alone whose division nothing can take.
        quant: "dynamic" (rows) or "static" (one range), for the error.
        report: filled with one `Smoothed` for each group.

    Raises ValueError for alpha outside [0, 1], an empty calibration, NaN or Inf in an input, layers as in
    `prune` or already on a quantised grid, and if the outputs move; the model is then as it was.
    """
    alphas = _checked_alphas(alpha)
    if quant not in ("dynamic", "static"):
        raise ValueError(f"smooth: quant must be dynamic or static, got {quant!r}")
    check_batches("smooth", batches)
    require_whole("smooth", model)
    held = list(batches)
    chosen = None if layers is None or isinstance(layers, str) else list(layers)
    selected = select_layers("smooth", model, layers if isinstance(layers, str) else chosen, (nn.Linear,))
    targets = {name: layer for name, layer in selected.items() if isinstance(layer, nn.Linear)}
    for name, layer in targets.items():
        if grid_of(layer) is not None:
            raise ValueError(f"smooth: layer {name!r} must not be quantised yet; smooth before quantising")
    found: dict[str, _Seen] = {}

    def see(name: str, layer: nn.Linear, x: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # no part of what the model does
            if name not in found:
                found[name] = _Seen(torch.zeros(layer.in_features, device=x.device), [])
            found[name].add(x)

    kinds: dict[int, int] = {}  # what a run does: the first batch that does it
    with each_run(model) as runs:
        seen = observe_inputs("smooth", model, targets, held, see)
    for index, kind in enumerate(runs):
        kinds.setdefault(kind, index)
    require_seen("smooth", targets, seen, named=layers is not None)
    targets = {name: layer for name, layer in targets.items() if name in seen}
    found = {name: _merged(found.get(name), layer) for name, layer in targets.items()}
    samples = [to_device(held[index], model_device(model)) for index in kinds.values()]
    with left_as_it_is(model):
        groups, before = agreed_absorbers("smooth", model, targets, samples)
    with torch.no_grad():  # buffers are put back after runs alone: one may be a weight that is scaled here
        work = _Work(model, targets, found, alphas, quant)
        try:
            for absorber in reversed(groups):  # rows first, columns after, of a layer that is both
                work.absorb(absorber)
            taken = {name for absorber in groups for name in absorber.columns}
            for name in targets if explicit else ():
                if name not in taken:
                    work.multiply(name)
            replace_layers(model, work.wrapped)
            failure: Exception | None = None
            try:
                with left_as_it_is(model):
                    for outputs, batch in zip(before, samples, strict=True):
                        work.check(outputs, call_model("smooth", model, batch))
            except Exception as error:
                failure = error
            distributed.raise_together(failure)  # each rank's outputs are of its own batches
        except BaseException:
            work.undo()
            raise
    for name, module in work.wrapped.items():
        module.train(targets[name].training)
    if report is not None:
        report += work.report
    return model


def _checked_alphas(alpha: float | Sequence[float]) -> list[float]:
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha]
    numbers = all(isinstance(a, (int, float)) and not isinstance(a, bool) for a in alphas)
    if not alphas or not numbers or not all(0 <= a <= 1 for a in alphas):
        raise ValueError(f"smooth: alpha must be in [0, 1], got {alpha!r}")
    return [float(a) for a in alphas]


def _merged(seen: _Seen | None, layer: nn.Linear) -> _Seen:
    """With the largest magnitudes of all ranks; the rows stay each rank's own."""
    if seen is None:
        seen = _Seen(torch.zeros(layer.in_features, device=layer.weight.device), [])
    seen.amax = distributed.all_reduce(seen.amax, "max")
    return seen


class _Work:
    """The changes, with what takes them back."""

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, nn.Linear],
        seen: dict[str, _Seen],
        alphas: list[float],
        quant: str,
    ) -> None:
        self._model, self._targets, self._seen = model, targets, seen
        self._alphas, self._quant = alphas, quant
        self._saved: list[tuple[Tensor, Tensor]] = []
        self.wrapped: dict[str, nn.Module] = {}
        self.report: list[Smoothed] = []

    def absorb(self, group: Absorber) -> None:
        """Divide the absorber's parameters, multiply the columns."""
        search = len(self._alphas) > 1
        columns = {name: index.to(self._seen[name].amax.device) for name, index in group.columns.items()}
        amax = self._gather(columns, {n: self._seen[n].amax for n in columns}, group.channels)
        weight = self._gather(
            columns,
            {n: self._targets[n].weight.detach().abs().amax(0).float() for n in columns},
            group.channels,
        )
        alpha, scale, before, after = self._choose(amax, weight, columns)
        if search and after >= before:
            self.report.append(Smoothed(tuple(columns), group.name, None, before, before))
            return
        for parameter in group.parameters:
            shape = (-1, *[1] * (parameter.dim() - 1))
            self._set(parameter, parameter.double() / scale.double().reshape(shape))
        for name, index in columns.items():
            self._multiply_columns(name, scale[index.long()])
        self.report.append(Smoothed(tuple(columns), group.name, alpha, before, after))

    def multiply(self, name: str) -> None:
        """Give a layer a multiplication of its own, if it pays."""
        layer = self._targets[name]
        weight = layer.weight.detach().abs().amax(0).float()
        every = torch.arange(layer.in_features, device=weight.device)
        alpha, scale, before, after = self._choose(self._seen[name].amax, weight, {name: every})
        if after > _WORTH * before:
            self.report.append(Smoothed((name,), None, None, before, before))
            return
        self._multiply_columns(name, scale)
        multiply = InputScale(layer.in_features, device=layer.weight.device)
        multiply.scale.copy_(1 / scale)
        self.wrapped[name] = nn.Sequential(OrderedDict(scale=multiply, layer=layer))
        self.report.append(Smoothed((name,), None, alpha, before, after))

    def _gather(self, columns: dict[str, Tensor], values: dict[str, Tensor], channels: int) -> Tensor:
        """The largest of each channel's values over all columns that read it; 0 for channels nobody reads."""
        first = next(iter(values.values()))
        most = torch.zeros(channels, device=first.device)
        for name, index in columns.items():
            most.scatter_reduce_(0, index.long(), values[name].to(first.device), "amax")
        return most

    def _choose(
        self, amax: Tensor, weight: Tensor, columns: dict[str, Tensor]
    ) -> tuple[float, Tensor, float, float]:
        """The best alpha, its s [C], and the int8 error without and with it."""
        ones = torch.ones_like(amax)
        before = self._error(ones, columns)
        best: tuple[float, Tensor, float] | None = None
        for alpha in self._alphas:
            scale = amax.pow(alpha) / weight.pow(1 - alpha).clamp(min=1e-30)
            plain = (amax < 1e-12) | (weight < 1e-12)
            scale = torch.where(plain, ones, scale.clamp(1e-5, 1e5))
            error = self._error(scale, columns)
            if best is None or error < best[2]:
                best = (alpha, scale, error)
        assert best is not None
        return best[0], best[1], before, best[2]

    def _error(self, scale: Tensor, columns: dict[str, Tensor]) -> float:
        """Relative squared error of the int8 layers' outputs on the sampled rows."""
        wrong = norm = 0.0
        for name, index in columns.items():
            if not self._seen[name].rows:
                continue
            weight = self._targets[name].weight.detach().float()
            s = scale[index.long()]
            rows = torch.cat(self._seen[name].rows)
            exact = F.linear(rows, weight)
            x = _int8_rows(rows / s, self._quant)
            q, step = quantize_weight(weight * s)
            wrong += float((F.linear(x, q.float() * step[:, None]) - exact).double().square().sum())
            norm += float(exact.double().square().sum())
        both = distributed.all_reduce(torch.tensor([wrong, norm], dtype=torch.float64))
        return float(both[0]) / max(float(both[1]), 1e-300)

    def _multiply_columns(self, name: str, scale: Tensor) -> None:
        weight = self._targets[name].weight
        self._set(weight, weight.double() * scale.double())
        self._seen[name].amax = self._seen[name].amax / scale
        self._seen[name].rows = [rows / scale for rows in self._seen[name].rows]

    def _set(self, parameter: Tensor, value: Tensor) -> None:
        new = value.to(parameter.dtype)
        if not bool(torch.isfinite(new).all()):
            raise ValueError("smooth: nothing was changed, because a scaled parameter would not be finite")
        self._saved.append((parameter, parameter.detach().clone()))
        parameter.copy_(new)

    def check(self, before: list[Tensor], output: Any) -> None:
        """ValueError if the outputs have moved by more than rounding."""
        for x, y in zip(before, output_tensors(output), strict=True):
            if not x.is_floating_point():
                continue
            limit = _ROUNDING * max(1.0, torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps)
            change, was = squared_change(x, y)
            moved = math.sqrt(change / max(was, 1e-300))
            if not moved <= limit:
                raise ValueError(
                    f"smooth: nothing was changed, because the output moved by {moved:.2g} (relative L2); "
                    "name the layers to smooth"
                )

    def undo(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for parameter, value in reversed(self._saved):
                parameter.copy_(value)
        replace_layers(self._model, {name: self._targets[name] for name in self.wrapped})


def _int8_rows(x: Tensor, quant: str) -> Tensor:
    """x through int8 and back: symmetric per row, or by one range with a zero point."""
    if quant == "dynamic":
        q, step = quantize_weight(x)
        return q.float() * step[:, None]
    params = qparams_of_range(float(x.min()), float(x.max()))
    return params.dequantize(params.quantize(x))

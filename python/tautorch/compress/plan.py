"""From a float model that was pruned and factorised to compiled layers, each where it was measured to pay."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tautorch._batches import (
    Batch,
    call_model,
    example_batches,
    left_as_it_is,
    model_device,
)
from tautorch.compress.report import Layer, Report
from tautorch.convert import COMPILED, convert, in_compiled_code
from tautorch.convert_candidate import Candidate, OutputError
from tautorch.convert_report import ConvertReport, LayerRecord, ShapeTime
from tautorch.factorize import FactorizedConv2d, FactorizedLinear
from tautorch.fuse import fuse as fold
from tautorch.nn import (
    Int8Conv2d,
    Int8Linear,
    LowRankConv2d,
    LowRankLinear,
    PackedModule,
    SparseConv2d,
    SparseLinear,
)
from tautorch.nn.tail import grid_of, left_by_quantize
from tautorch.ownership import ReadWatch, refusal
from tautorch.quantize import QParams
from tautorch.quantize.calibration import input_ranges

Factory = Callable[[Any], nn.Module]

SPARSE_FROM = 0.5
"""Share of zeros from which a layer is offered a sparse kernel; below it the dense int8 one wins anyway."""


def compile_layers(
    model: nn.Module,
    calibration: Iterable[Batch],
    example_inputs: Batch | Sequence[Batch],
    *,
    layers: Iterable[str] | None = None,
    pattern: str = "4x1",
    observer: str = "mse",
    gate: bool = True,
    fuse: bool = True,
    original: nn.Module | None = None,
    max_error: float | None = None,
    seconds: float = 0.2,
    report: Report | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[Layer]:
    """Quantise a float model to int8 with static scales and put compiled layers in, in place.

    A layer with at least half of its weights pruned is offered a sparse kernel and, where that loses, a dense
    int8 one; a factorised layer a low-rank one; any other layer the dense int8 one. A layer that static QAT
    left on its grid keeps the scales it learned; one that `convert` refuses (tied, read by others) or that no
    kernel takes (float64, more than 66,311 inputs to a sum) stays. Activations that follow a replaced layer
    are fused into it.

    Args:
        model: in eval mode; batch norms folded (`tautorch.fuse`) if they are to be quantised with the layer.
        calibration: batches of what the model takes, from which the scales are chosen.
        example_inputs: one batch, or a list with one for each batch size to come: what the gate times.
        layers: names or shell patterns such as "encoder.*"; the others stay. None takes all there are.
        pattern: that the pruned layers were pruned in, see `tautorch.prune`.
        observer: how the scales are chosen, see `tautorch.quantize`.
        gate: False replaces every layer, unmeasured.
        fuse: False leaves activations beside the layers they follow.
        original: the model before pruning and factorising, for the parameters and bytes of its layers.
        max_error: a layer whose compiled one's output is further off (relative L2 norm: 0.05 is 5 %) stays.
        seconds: about how long one comparison takes.
        report: gets the layers, the error of the whole model's output on the example inputs, and a note of
            each activation or batch norm that `fuse` left where it was, with the reason.
        progress: called with the name of every layer that is decided.

    Returns:
        What became of each layer, in the model's order.

    Raises:
        TypeError, ValueError: an argument that does not fit. After these, as after whatever the model or
            `progress` raises, the model is as it was.
    """
    before = _checked_layers(model, layers, original)
    SparseLinear(1, 1, pattern=pattern)  # refuses an unknown one
    if report is not None and not isinstance(report, Report):
        raise TypeError(f"compile_layers: report must be a Report, got {type(report).__name__}")
    batches = example_batches("compile_layers", example_inputs, model_device(model))
    refused = {
        name: why for name, layer in before.items() if (why := refusal(model, name) or _not_compiled(layer))
    }
    if "" in before:
        refused[""] = "the model itself cannot be replaced in place; wrap it in nn.Sequential"
    refused |= dict.fromkeys(in_compiled_code(model, before), COMPILED)
    with ReadWatch({name: layer for name, layer in before.items() if name not in refused}) as watch:
        expected = _outputs(model, batches)
    for name, by in watch.readers.items():
        refused[name] = f"its weight is read directly by a call of {by}"
    with _put_back_on_error(model):
        records: dict[str, LayerRecord] = {}
        reasons: dict[str, list[str]] = {name: [] for name in before}
        for name, layer in before.items():
            if why := refused.get(name):
                records[name] = Candidate(name, layer).record
                reasons[name].append(f"kept: {why}")
                if progress is not None:
                    progress(name)
        free = {name: layer for name, layer in before.items() if name not in records}
        scales = _scales(model, calibration, free, observer) if free else {}
        offers = {name: _offers(layer, scales.get(name), pattern) for name, layer in free.items()}
        while plan := {name: waiting[0] for name, waiting in offers.items() if waiting}:
            done = ConvertReport()
            convert(model, plan, batches, gate=gate, max_error=max_error, seconds=seconds, report=done)
            for record in done.layers:
                records[record.name] = record
                reasons[record.name].append(record.reason)
                offers[record.name] = [] if record.replaced else offers[record.name][1:]
                if progress is not None and not offers[record.name]:
                    progress(record.name)
        folds: list[str] = []
        if fuse:
            replaced = [name for name in free if records[name].replaced]
            fold(model, batches[-1], layers=None if layers is None else replaced, report=folds)
        _make_plain(model, free)
        error = _error(expected, _outputs(model, batches))
        sizes = {name: _original(original, name, layer) for name, layer in before.items()}
        found = [
            _layer(records[name], before[name], model.get_submodule(name), reasons[name], sizes[name])
            for name in before
        ]
    if report is not None:
        report.layers, report.model_error = found, error
        left = (
            f"fuse: {line}" for line in folds if " folded into " not in line
        )  # the layers say what was folded
        report.notes += [line for line in left if line not in report.notes]
    return found


def _checked_layers(
    model: nn.Module, layers: Iterable[str] | None, original: nn.Module | None
) -> dict[str, nn.Module]:
    """The layers to compile by name; raises on what later steps would not bear, or would take for another."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile_layers: model must be an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError(
            "compile_layers: model must be in eval mode, got training mode; call model.eval() first"
        )
    if isinstance(layers, str):
        raise TypeError(
            f"compile_layers: layers must be a list of names, got the string {layers!r}; use [{layers!r}]"
        )
    names = compilable(model)
    wanted = ["*"] if layers is None else list(layers)
    for entry in wanted if layers is not None else ():
        if not any(fnmatchcase(name, entry) for name in names):
            has = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "none"
            raise ValueError(
                f"compile_layers: layers must name layers of the model, got {entry!r}; it has {has}"
            )
    chosen = [name for name in names if any(fnmatchcase(name, entry) for entry in wanted)]
    if original is not None:
        if not isinstance(original, nn.Module):
            raise TypeError(f"compile_layers: original must be an nn.Module, got {type(original).__name__}")
        there = dict(original.named_modules())
        for name in chosen:
            if name not in there:
                raise ValueError(
                    f"compile_layers: original must have the model's layers, got none named {name!r}; "
                    "pass the model before pruning and factorising"
                )
    return {name: model.get_submodule(name) for name in chosen}


@contextmanager
def _put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside leaves the model's layers and tensors as they were."""
    # A packed module's tensors change places when it runs, and nothing here changes them; but an activation
    # may go into one that was there before.
    packed = [(m, m.activation) for m in model.modules() if isinstance(m, PackedModule)]
    slots: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (now, dict(now))
        for module in model.modules()
        if not isinstance(module, (PackedModule, torch.jit.ScriptModule))  # a script's parts stay as they are
        for now in (module._modules, module._parameters, module._buffers)
    ]
    try:
        yield
    except BaseException:
        for layer, activation in packed:
            if layer.activation != activation:
                layer.activation = activation
        for now, was in slots:
            now.clear()
            now.update(was)
        raise


def describe_layer(layer: nn.Module) -> str:
    """One line for people: ``Conv2d 32→64, 3×3``, ``SparseLinear 1152→256, 4x1 + relu``."""
    name = type(layer).__name__
    if isinstance(layer, FactorizedLinear):
        return f"Linear {layer.down.in_features}→{layer.rank}→{layer.up.out_features}"
    if isinstance(layer, FactorizedConv2d):
        down = layer.down
        return f"Conv2d {down.in_channels}→{layer.rank}→{layer.up.out_channels}, {_size(down.kernel_size)}"
    parts = []
    rank = getattr(layer, "rank", None)
    through = f"→{rank}" if isinstance(rank, int) else ""
    if hasattr(layer, "in_features"):
        parts.append(f"{name} {layer.in_features}{through}→{layer.out_features}")
    elif hasattr(layer, "in_channels"):
        parts.append(f"{name} {layer.in_channels}{through}→{layer.out_channels}")
        parts.append(_size(layer.kernel_size))
    else:
        return name
    pattern = getattr(layer, "pattern", None)
    parts += [pattern] if isinstance(pattern, str) else []
    activation = getattr(layer, "activation", "none")
    return ", ".join(parts) + (f" + {activation}" if activation != "none" else "")


def _size(kernel: Any) -> str:
    return "×".join(map(str, kernel))


def compilable(model: nn.Module) -> list[str]:
    """Names of the layers that have compiled ones; a factorised pair counts as one."""
    pairs = (FactorizedLinear, FactorizedConv2d)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, (nn.Linear, nn.Conv2d, *pairs)):
            found.append(name)
    return found


def _first(layer: nn.Module) -> Any:
    """The layer that the input goes into."""
    return layer.down if isinstance(layer, (FactorizedLinear, FactorizedConv2d)) else layer


def _not_compiled(layer: nn.Module) -> str | None:
    """Why no compiled layer can take this one's place, None if one can."""
    first = _first(layer)
    if first.weight.numel() == 0:
        return "its weight is empty"
    if first.weight.dtype == torch.float64:
        return "its weight is torch.float64; compiled layers take float32, bfloat16 and float16"
    try:
        kind = Int8Conv2d if isinstance(first, nn.Conv2d) else Int8Linear
        kind(**kind._arguments(first) | {"device": "meta"})  # padding mode, inputs to a sum
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _scales(
    model: nn.Module, calibration: Iterable[Batch], layers: Mapping[str, nn.Module], observer: str
) -> dict[str, QParams]:
    """The static scale of each layer's input; none of a layer that calibration does not reach."""
    inputs = {name: _first(layer) for name, layer in layers.items()}
    return input_ranges("compile_layers", model, calibration, inputs, observer)


def _offers(layer: nn.Module, scale: QParams | None, pattern: str) -> list[Factory]:
    """Makers of compiled layers to try in turn, the one that promises most first."""
    quant: dict[str, Any] = {"quant": "dynamic"}
    first = _first(layer)
    if left_by_quantize(first, "x_scale") is not None and grid_of(first) is not None:
        quant = {"quant": "static"}  # `from_float` takes the scale that QAT learned
    elif scale is not None:
        quant = {"quant": "static", "x_scale": scale.scale, "x_zero_point": scale.zero_point}
    if isinstance(layer, (FactorizedLinear, FactorizedConv2d)):
        kind = LowRankLinear if isinstance(layer, FactorizedLinear) else LowRankConv2d
        return [lambda old: kind.from_float(old, weight_dtype=torch.int8, **quant)]
    sparse, dense = (SparseLinear, Int8Linear) if isinstance(layer, nn.Linear) else (SparseConv2d, Int8Conv2d)
    offers: list[Factory] = [lambda old: dense.from_float(old, **quant)]
    if _zeros(layer) >= SPARSE_FROM:
        offers.insert(0, lambda old: sparse.from_float(old, pattern=pattern, **quant))
    return offers


def _zeros(layer: nn.Module) -> float:
    weight = layer.weight
    return 1.0 - int(torch.count_nonzero(weight)) / weight.numel()  # type: ignore[arg-type,operator]


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Any]:
    """Copies of what the model says of each batch, which a later run cannot write over."""
    with left_as_it_is(model):
        return [
            pytree.tree_map_only(torch.Tensor, torch.clone, call_model("compile_layers", model, batch))
            for batch in batches
        ]


def _error(expected: Sequence[Any], got: Sequence[Any]) -> float | None:
    """The relative L2 error over all batches."""
    errors = OutputError()
    for x, y in zip(expected, got, strict=True):
        if wrong := errors.add(x, y):
            raise ValueError(f"compile_layers: the compiled model {wrong}")
    return errors.value


def _make_plain(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Factorised pairs that were kept become plain sequences, which a saved file can describe."""
    for name, old in before.items():
        if model.get_submodule(name) is old and isinstance(old, (FactorizedLinear, FactorizedConv2d)):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, nn.Sequential(OrderedDict(old.named_children())))


def _original(original: nn.Module | None, name: str, layer: nn.Module) -> tuple[int, int]:
    """Parameters and bytes of the layer before it was pruned and factorised."""
    source = layer if original is None else original.get_submodule(name)
    tensors = list(source.parameters())
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _layer(
    record: LayerRecord, before: nn.Module, after: nn.Module, reasons: list[str], size: tuple[int, int]
) -> Layer:
    parameters, bytes_before = size
    times: dict[str, ShapeTime] = {}
    for time in record.times:  # of one shape in several layouts the least gain
        if time.shape and (time.shape_text not in times or time.ratio < times[time.shape_text].ratio):
            times[time.shape_text] = time
    layer = Layer(
        name=record.name,
        before=describe_layer(before),
        after=record.new_class,
        kernel=record.kernel,
        replaced=record.replaced,
        reason="; ".join(reasons),
        parameters=parameters,
        bytes_before=bytes_before,
        bytes_after=record.bytes_after,
        before_s={shape: time.before_s for shape, time in times.items()},
        after_s={shape: time.after_s for shape, time in times.items()},
        error=record.error,
    )
    return replace(layer, after=describe_layer(after)) if record.replaced else layer

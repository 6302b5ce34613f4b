"""Replace a model's layers by compiled ones, by plan, and only where that was measured to pay."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tautorch._batches import (
    Batch,
    KeptBuffers,
    call_model,
    example_batches,
    left_as_it_is,
    model_device,
)
from tautorch.capture import Call, capture
from tautorch.convert_candidate import Candidate, Factory, OutputError, shape_time
from tautorch.convert_report import ConvertReport, ShapeTime
from tautorch.ownership import ReadWatch, held_elsewhere
from tautorch.timing import decisive

COMPILED = "it is compiled; convert before torch.compile, or pass model._orig_mod"


def convert(
    model: nn.Module,
    plan: Mapping[str, Factory],
    example_inputs: Batch | Sequence[Batch] | None = None,
    gate: bool = False,
    *,
    min_speedup: float = 1.0,
    max_error: float | None = None,
    seconds: float = 0.2,
    report: ConvertReport | None = None,
) -> nn.Module:
    """Replaces layers of `model` in place by `plan` and returns the model.

    plan: {qualified name: factory}, where `factory(layer)` returns the replacement, for example
        `{"encoder.0": tautorch.nn.Int8Linear.from_float}`. A factory that returns the layer it was given
        leaves it alone.
    example_inputs: one batch (a tensor, a tuple of positional or a dict of keyword arguments) or a list of
        batches, best one per batch size the model will see. With them, each replacement is checked on the
        inputs its layer really gets (same output shape and dtype, nothing non-finite that was finite), reads
        of a layer's weight by other code are noticed, and errors are reported. The model runs in eval mode.
        A replacement with int8 output (`out_scale`) is checked by what its codes stand for; whether the next
        layer takes them, a run of the whole converted model shows.
    gate: time every replacement against the layer it replaces, alternating, at each distinct input (shape,
        dtype, strides) the layer gets; keep it only if its median speed-up is at least `min_speedup` at all
        of them. Afterwards the whole model is timed before against after at each example input, and layers
        are put back, the least useful first, until the model is not slower. Refuses layers with int8 output,
        which stand or fall with the layers that take it.
    min_speedup: below 1 it lets slower layers in (to save memory), and the whole model be slower by as much.
    max_error: a layer whose replacement's output on the example inputs is further off than this (relative L2
        norm: 0.05 is 5 %), or not known, stays as it is. None sets no limit; the report has every error.
    seconds: about how long one comparison takes (a close one is repeated at three times the length).
    report: an empty `ConvertReport` to be filled.

    Raises ValueError (TypeError for arguments of the wrong kind) before anything changes, with all reasons:
    a name that does not exist; a layer whose weight somebody else reads (tied, shared memory, parametrised,
    registered twice, or read directly by a parent such as `nn.MultiheadAttention`); a layer with hooks; a
    factory that fails; a replacement that fails on the example inputs. The model is then as it was.
    Runs leave no trace, but for what the model's own forward writes into buffers of over 64 MB or into lists.
    """
    layers = _checked_layers(model, plan, example_inputs, gate)
    _check_numbers(min_speedup, seconds)
    _check_max_error(max_error, example_inputs)
    if report is not None and not isinstance(report, ConvertReport):
        raise TypeError(f"convert: report must be a ConvertReport, got {type(report).__name__}")
    modes = {name: layer.training for name, layer in layers.items()}
    batches = (
        [] if example_inputs is None else example_batches("convert", example_inputs, model_device(model))
    )
    with _undisturbed(model) as kept:
        seen = capture("convert", model, layers, batches)
        kept.put_back()
        _watch_reads(model, layers, batches)
        kept.put_back()
        candidates = {name: Candidate(name, layer) for name, layer in layers.items()}
        problems = [p for c in candidates.values() if (p := c.build(plan[c.name], seen[c.name], gate))]
        _raise_if(problems)
        for candidate in candidates.values():
            candidate.decide(gate, min_speedup, seconds, max_error)
        swap = _Swap(model, [c for c in candidates.values() if c.record.replaced], kept)
        times, error = _settle(model, swap, batches, gate, min(1.0, min_speedup), seconds)
    for candidate in swap.candidates:
        candidate.new.train(modes[candidate.name])
    if report is not None:
        _fill(report, model, candidates, times, error, gate)
        if batches and report.replaced and error is None:
            report.uncompared = "its output on the example inputs holds no float tensor to compare"
    return model


def _checked_layers(
    model: nn.Module, plan: Mapping[str, Factory], example_inputs: object, gate: bool
) -> dict[str, nn.Module]:
    """The planned layers by name; raises on an argument of the wrong kind and on all refusals together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(plan, Mapping):
        raise TypeError(f"convert: plan must be a dict of name to factory, got {type(plan).__name__}")
    for name, factory in plan.items():
        if not isinstance(name, str) or not callable(factory) or isinstance(factory, nn.Module):
            raise TypeError(
                f"convert: plan must map names to functions of the layer, got "
                f"{name!r}: {type(factory).__name__}; "
                "for a module that is ready write `lambda layer: module`"
            )
    if gate and example_inputs is None:
        raise ValueError(
            "convert: gate=True must have example_inputs to time on, got None; pass a real batch"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    compiled = () if example_inputs is None else in_compiled_code(model, plan)
    problems: list[str] = []
    for name in plan:
        if name == "":
            problems.append("'': the model itself cannot be replaced in place; wrap it in nn.Sequential")
        elif name in compiled:
            problems.append(f"{name!r}: {COMPILED}")
        elif name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            problems.append(
                f"{name!r}: no such layer; "
                + (f"close: {', '.join(close)}" if close else "see named_modules()")
            )
        elif outer := next((o for o in plan if o and name.startswith(o + ".")), None):
            problems.append(
                f"{name!r}: it lies inside {outer!r}, which the plan replaces too; name one of them"
            )
        elif reason := held_elsewhere(model, name):
            problems.append(f"{name!r}: {reason}")
    _raise_if(problems)
    return {name: modules[name] for name in plan}


def in_compiled_code(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those names that lie in what `torch.compile` has taken over, where what a layer gets does not show."""
    compiled = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None
    ]
    return {name for name in names if any(f"{name}.".startswith(c and f"{c}.") for c in compiled)}


def _check_numbers(min_speedup: float, seconds: float) -> None:
    for name, value in (("min_speedup", min_speedup), ("seconds", seconds)):
        if not 0 <= value < math.inf:  # NaN too
            raise ValueError(f"convert: {name} must be at least 0 and finite, got {value}")


def _check_max_error(max_error: float | None, example_inputs: object) -> None:
    if max_error is None:
        return
    if not max_error >= 0:  # NaN too
        raise ValueError(f"convert: max_error must be at least 0, got {max_error}")
    if example_inputs is None:
        raise ValueError(
            "convert: max_error must have example_inputs to measure on, got None; pass a real batch"
        )


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ValueError("convert: nothing was changed, because of " + "; ".join(problems))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[KeptBuffers]:
    """Eval mode without gradients inside; training flags, buffers and random state as before afterwards."""
    cuda = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(cuda)), left_as_it_is(model) as kept:
        yield kept


def _watch_reads(model: nn.Module, layers: dict[str, nn.Module], batches: list[Any]) -> None:
    """Runs the model once more; raises if a layer's weight is read past its forward."""
    with ReadWatch(layers) as watch:
        for batch in batches:
            call_model("convert", model, batch)
    _raise_if(
        [f"{name!r}: its weight is read directly by a call of {by}" for name, by in watch.readers.items()]
    )


class _Swap:
    """The replaced slots of a model; `put(True)` has the new layers in them, `put(False)` the old ones.

    Either makes the model ready for a run: what the one before left in buffers is taken back.
    """

    def __init__(self, model: nn.Module, candidates: list[Candidate], kept: KeptBuffers) -> None:
        self.candidates, self._kept = candidates, kept
        self._slots = {
            c.name: (model.get_submodule(c.name.rpartition(".")[0])._modules, c.name.rpartition(".")[2])
            for c in candidates
        }

    def put(self, new: bool) -> None:
        for candidate in self.candidates:
            slots, child = self._slots[candidate.name]
            slots[child] = candidate.new if new else candidate.old
        self._kept.put_back()

    def drop_worst(self, count: int, reason: str) -> None:
        """Puts back, for good, the `count` layers that gained least."""
        self.put(False)
        self.candidates.sort(key=lambda c: c.record.worst_ratio)
        for candidate in self.candidates[:count]:
            candidate.put_back(reason)
        del self.candidates[:count]


def _settle(
    model: nn.Module, swap: _Swap, batches: list[Any], gate: bool, threshold: float, seconds: float
) -> tuple[list[ShapeTime], float | None]:
    """Puts the replacements in; with example inputs checks the whole model, with the gate its speed too."""
    step = max(1, len(swap.candidates) // 16)
    try:
        while True:
            error = _whole_error(model, swap, batches)
            times = (
                [_whole_time(model, swap, batch, threshold, seconds) for batch in batches]
                if gate and swap.candidates
                else []
            )
            slower = [t for t in times if t.ratio_high < threshold]
            if not slower:
                swap.put(True)
                return times, error
            worst = min(slower, key=lambda t: t.ratio)
            swap.drop_worst(step, f"kept: backed out, the whole model was slower with it at {worst}")
    except BaseException:
        swap.put(False)
        raise


def _whole_error(model: nn.Module, swap: _Swap, batches: list[Any]) -> float | None:
    errors = OutputError()
    for batch in batches if swap.candidates else ():
        swap.put(False)
        expected = call_model("convert", model, batch)
        swap.put(True)
        try:
            got = call_model("convert", model, batch)
        except Exception as error:
            raise ValueError(
                f"convert: nothing was changed, because the converted model failed on the example inputs: "
                f"{type(error).__name__}: {error}"
            ) from error
        if wrong := errors.add(expected, got):
            raise ValueError(f"convert: nothing was changed, because the converted model {wrong}")
    return errors.value


def _whole_time(model: nn.Module, swap: _Swap, batch: Any, threshold: float, seconds: float) -> ShapeTime:
    def run() -> object:
        return call_model("convert", model, batch, own=False)

    found = decisive(
        run,
        run,
        threshold,
        2 * seconds,
        setup_a=lambda: swap.put(False),
        setup_b=lambda: swap.put(True),
        device=model_device(model),
    )
    return shape_time(Call((batch,), {}).first, found)


def _fill(
    report: ConvertReport,
    model: nn.Module,
    candidates: Mapping[str, Candidate],
    times: list[ShapeTime],
    error: float | None,
    gate: bool,
) -> None:
    replaced = [c for c in candidates.values() if c.record.replaced]
    inside = {id(p) for c in replaced for p in c.new.parameters()}
    untouched = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    report.layers = [c.record for c in candidates.values()]
    report.model, report.model_error, report.gated = times, error, gate
    report.model_parameters = untouched + sum(c.record.parameters for c in replaced)
    report.device = str(model_device(model) or "cpu")
    report.threads = torch.get_num_threads()
    report.torch_version = torch.__version__

"""Replace a model's layers by compiled ones, by plan, and only where that was measured to pay."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tautorch._batches import Batch, call_model, model_device, to_device, training_modes_kept
from tautorch.capture import Call, capture
from tautorch.convert_report import ConvertReport, LayerRecord, ShapeTime
from tautorch.ownership import ReadWatch, refusal
from tautorch.timing import Comparison, compare

Factory = Callable[[nn.Module], nn.Module]


def convert(
    model: nn.Module,
    plan: Mapping[str, Callable[[Any], nn.Module]],
    example_inputs: Batch | Sequence[Batch] | None = None,
    gate: bool = False,
    *,
    min_speedup: float = 1.0,
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
    gate: time every replacement against the layer it replaces, alternating, at each distinct input (shape,
        dtype, strides) the layer gets; keep it only if its median speed-up is at least `min_speedup` at all
        of them. Afterwards the whole model is timed before against after at each example input, and layers
        are put back, the least useful first, until the model is not slower.
    min_speedup: below 1 it lets slower layers in (to save memory), and the whole model be slower by as much.
    seconds: about how long one comparison takes (a close one is repeated at three times the length).
    report: an empty `ConvertReport` to be filled.

    Raises ValueError (TypeError for arguments of the wrong kind) before anything changes, with all reasons:
    a name that does not exist; a layer whose weight somebody else reads (tied, shared memory, parametrised,
    registered twice, or read directly by a parent such as `nn.MultiheadAttention`); a layer with hooks; a
    factory that fails; a replacement that fails on the example inputs. The model is then as it was.
    """
    layers = _checked_layers(model, plan, example_inputs, gate)
    modes = {name: layer.training for name, layer in layers.items()}
    batches = _batch_list(example_inputs, model_device(model))
    with _undisturbed(model):
        seen = capture("convert", model, layers, batches)
        _watch_reads(model, layers, batches)
        candidates = {name: _Candidate(name, layer) for name, layer in layers.items()}
        problems = [p for c in candidates.values() if (p := c.build(plan[c.name], seen[c.name]))]
        _raise_if(problems)
        for candidate in candidates.values():
            candidate.decide(gate, min_speedup, seconds)
        swap = _Swap(model, [c for c in candidates.values() if c.record.replaced])
        times, error = _settle(model, swap, batches, gate, min(1.0, min_speedup), seconds)
    for candidate in swap.candidates:
        candidate.new.train(modes[candidate.name])
    if report is not None:
        _fill(report, model, candidates, times, error, gate)
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
    problems: list[str] = []
    for name in plan:
        if name == "":
            problems.append("'': the model itself cannot be replaced in place; wrap it in nn.Sequential")
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
        elif reason := refusal(model, name):
            problems.append(f"{name!r}: {reason}")
    _raise_if(problems)
    return {name: modules[name] for name in plan}


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ValueError("convert: nothing was changed, because of " + "; ".join(problems))


def _batch_list(example_inputs: Batch | Sequence[Batch] | None, device: torch.device | None) -> list[Any]:
    if example_inputs is None:
        return []
    single = isinstance(example_inputs, (torch.Tensor, tuple, Mapping))
    if not single and not isinstance(example_inputs, Sequence):
        raise TypeError(
            "convert: example_inputs must be a batch or a list of batches, "
            f"got {type(example_inputs).__name__}"
        )
    batches = [example_inputs] if single else list(example_inputs)
    if not batches:
        raise ValueError("convert: example_inputs must hold at least one batch, got an empty list")
    return [to_device(batch, device) for batch in batches]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; training flags and random state as they were afterwards."""
    cuda = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    with training_modes_kept(model), torch.random.fork_rng(devices=sorted(cuda)), torch.no_grad():
        model.eval()
        yield


def _watch_reads(model: nn.Module, layers: dict[str, nn.Module], batches: list[Any]) -> None:
    """Runs the model once more; raises if a layer's weight is read past its forward."""
    with ReadWatch(layers) as watch:
        for batch in batches:
            call_model("convert", model, batch)
    _raise_if(
        [f"{name!r}: its weight is read directly by a call of {by}" for name, by in watch.readers.items()]
    )


class _Candidate:
    """A planned layer, its replacement, and what was found out about the pair."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.old, self.new = name, layer, layer
        self.calls: list[Call] = []
        size = _bytes(layer)
        self.record = LayerRecord(
            name=name,
            old_class=type(layer).__name__,
            new_class=type(layer).__name__,
            kernel=_kernel(layer),
            replaced=False,
            reason="",
            parameters=sum(p.numel() for p in layer.parameters()),
            bytes_before=size,
            bytes_after=size,
        )

    def build(self, factory: Callable[[nn.Module], object], calls: list[Call]) -> str | None:
        """Makes the replacement and checks it on the captured calls; returns what is wrong with it."""
        self.calls = calls
        try:
            new = factory(self.old)
        except Exception as error:
            return f"{self.name!r}: its factory failed: {type(error).__name__}: {error}"
        if not isinstance(new, nn.Module):
            return f"{self.name!r}: its factory must return an nn.Module, got {type(new).__name__}"
        new.eval()
        self.new = new
        self.record.new_class = type(new).__name__
        errors = _Error()
        for call in calls if new is not self.old else ():
            expected = call.run(self.old)
            try:
                got = call.run(new)
            except Exception as error:
                return (
                    f"{self.name!r}: {type(new).__name__} failed on {call}: {type(error).__name__}: {error}"
                )
            if wrong := errors.add(expected, got):
                return f"{self.name!r}: {type(new).__name__} on {call} {wrong}"
        self.record.error = errors.value
        return None

    def decide(self, gate: bool, min_speedup: float, seconds: float) -> None:
        """Sets `record.replaced` and the reason, by measurement if `gate`."""
        if self.new is self.old:
            self.record.reason = "kept: its factory returned the layer itself"
        elif not gate:
            self._replace("replaced: planned, not measured")
        elif not self.calls:
            self.record.reason = "kept: it never ran on the example inputs, so it could not be measured"
        else:
            for call in self.calls:
                self.record.times.append(self._time(call, min_speedup, seconds))
            worst = min(self.record.times, key=lambda t: t.ratio)
            if worst.ratio >= min_speedup:
                self._replace(f"replaced: at least as fast at every input, worst {worst}")
            else:
                needed = "" if min_speedup == 1.0 else f" (needs {min_speedup:g}x)"
                self.record.reason = f"kept: {self.record.new_class} is slower at {worst}{needed}"

    def _time(self, call: Call, min_speedup: float, seconds: float) -> ShapeTime:
        first = call.first
        device = first.device if first is not None else None
        found = _decisive(
            lambda: call.run(self.old), lambda: call.run(self.new), min_speedup, seconds, device=device
        )
        return _shape_time(first, found)

    def _replace(self, reason: str) -> None:
        self.record.replaced, self.record.reason = True, reason
        self.record.kernel, self.record.bytes_after = _kernel(self.new), _bytes(self.new)

    def put_back(self, reason: str) -> None:
        self.record.replaced, self.record.reason = False, reason
        self.record.kernel, self.record.bytes_after = _kernel(self.old), self.record.bytes_before


class _Error:
    """The relative L2 error over all float outputs, and the checks that a replacement's output must pass."""

    def __init__(self) -> None:
        self._difference, self._norm, self._any = 0.0, 0.0, False

    @property
    def value(self) -> float | None:
        if not self._any:
            return None
        return math.sqrt(self._difference / max(self._norm, torch.finfo(torch.float64).tiny))

    def add(self, expected: Any, got: Any) -> str | None:
        wanted, spec = pytree.tree_flatten(expected)
        found, found_spec = pytree.tree_flatten(got)
        if spec != found_spec:
            return f"must return {spec}, got {found_spec}"
        for x, y in zip(wanted, found, strict=True):
            if not isinstance(x, torch.Tensor):
                continue
            if not isinstance(y, torch.Tensor) or x.shape != y.shape or x.dtype != y.dtype:
                got_kind = f"{y.dtype} {list(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
                return f"must return {x.dtype} {list(x.shape)}, got {got_kind}"
            if x.is_floating_point():
                finite = x.isfinite()
                if not bool(y.isfinite()[finite].all()):
                    return "returns non-finite values where the layer's are finite; check its scales"
                self._any = True
                reference = x[finite].double()
                self._difference += float((y[finite].double() - reference).square().sum())
                self._norm += float(reference.square().sum())
        return None


class _Swap:
    """The replaced slots of a model; `put(True)` has the new layers in them, `put(False)` the old ones."""

    def __init__(self, model: nn.Module, candidates: list[_Candidate]) -> None:
        self.candidates = candidates
        self._slots = {
            c.name: (model.get_submodule(c.name.rpartition(".")[0])._modules, c.name.rpartition(".")[2])
            for c in candidates
        }

    def put(self, new: bool) -> None:
        for candidate in self.candidates:
            slots, child = self._slots[candidate.name]
            slots[child] = candidate.new if new else candidate.old

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
    errors = _Error()
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
        return call_model("convert", model, batch)

    found = _decisive(
        run,
        run,
        threshold,
        2 * seconds,
        setup_a=lambda: swap.put(False),
        setup_b=lambda: swap.put(True),
        device=model_device(model),
    )
    return _shape_time(Call((batch,), {}).first, found)


def _decisive(
    a: Callable[[], object], b: Callable[[], object], threshold: float, seconds: float, **options: Any
) -> Comparison:
    """A comparison, taken again at three times the length when the noise could turn the verdict."""
    found = compare(a, b, seconds=seconds, **options)
    if found.ratio_low < threshold < found.ratio_high:
        found = compare(a, b, seconds=3 * seconds, **options)
    return found


def _shape_time(first: torch.Tensor | None, found: Comparison) -> ShapeTime:
    return ShapeTime(
        shape=tuple(first.shape) if first is not None else (),
        dtype=str(first.dtype).removeprefix("torch.") if first is not None else "",
        stride=tuple(first.stride()) if first is not None else (),
        before_s=found.a_s,
        after_s=found.b_s,
        ratio=found.ratio,
        ratio_low=found.ratio_low,
        ratio_high=found.ratio_high,
    )


def _bytes(layer: nn.Module) -> int:
    """Bytes of parameters and buffers in memory, a packed layer's in its packed form."""
    packed = getattr(layer, "packed_bytes", None)
    if callable(packed):
        packed()  # packs, if that has not happened yet
    tensors = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _kernel(layer: nn.Module) -> str:
    kernel = getattr(layer, "kernel", None)
    return str(kernel()) if callable(kernel) else "torch"


def _fill(
    report: ConvertReport,
    model: nn.Module,
    candidates: Mapping[str, _Candidate],
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

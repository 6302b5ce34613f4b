"""One planned replacement: made, checked on the layer's real inputs, and timed against the layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tautorch._batches import opened
from tautorch.capture import Call
from tautorch.convert_report import LayerRecord, ShapeTime, format_error
from tautorch.timing import Comparison, decisive

Factory = Callable[[Any], nn.Module]


class Candidate:
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

    def build(
        self, factory: Callable[[nn.Module], object], calls: list[Call], gate: bool = False
    ) -> str | None:
        """Makes the replacement and checks it on the captured calls; returns what is wrong with it."""
        self.calls = calls
        try:
            new = factory(self.old)
        except Exception as error:
            return f"{self.name!r}: its factory failed: {type(error).__name__}: {error}"
        if not isinstance(new, nn.Module):
            return f"{self.name!r}: its factory must return an nn.Module, got {type(new).__name__}"
        new.eval()
        if gate and isinstance(getattr(new, "out_scale", None), torch.Tensor):
            return (
                f"{self.name!r}: {type(new).__name__} gives int8 codes (out_scale), which gate=True cannot "
                "judge alone: layers that pass codes on stand or fall together; convert them without a gate"
            )
        self.new = new
        self.record.new_class = type(new).__name__
        errors = OutputError()
        for call in calls if new is not self.old else ():
            expected = call.run(self.old)
            try:
                got = _as_float(new, call.run(new), expected)
            except Exception as error:
                return (
                    f"{self.name!r}: {type(new).__name__} failed on {call}: {type(error).__name__}: {error}"
                )
            if wrong := errors.add(expected, got):
                return f"{self.name!r}: {type(new).__name__} on {call} {wrong}"
        self.record.error = errors.value
        return None

    def decide(self, gate: bool, min_speedup: float, seconds: float, max_error: float | None = None) -> None:
        """Sets `record.replaced` and the reason, by measurement if `gate`."""
        error = self.record.error
        if self.new is self.old:
            self.record.reason = "kept: its factory returned the layer itself"
        elif max_error is not None and error is None:
            self.record.reason = "kept: it gave no output on the example inputs whose error could be measured"
        elif max_error is not None and error is not None and not error <= max_error:
            self.record.reason = (
                f"kept: {self.record.new_class} is off by {format_error(error)} (max_error is "
                f"{format_error(max_error)})"
            )
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
        found = decisive(
            lambda: call.run(self.old), lambda: call.run(self.new), min_speedup, seconds, device=device
        )
        return shape_time(first, found)

    def _replace(self, reason: str) -> None:
        self.record.replaced, self.record.reason = True, reason
        self.record.kernel, self.record.bytes_after = _kernel(self.new), _bytes(self.new)

    def put_back(self, reason: str) -> None:
        self.record.replaced, self.record.reason = False, reason
        self.record.kernel, self.record.bytes_after = _kernel(self.old), self.record.bytes_before


class OutputError:
    """The relative L2 error over all float outputs, and the checks that a replacement's output must pass."""

    def __init__(self) -> None:
        self._difference, self._norm, self._any = 0.0, 0.0, False

    @property
    def value(self) -> float | None:
        if not self._any:
            return None
        return math.sqrt(self._difference / max(self._norm, torch.finfo(torch.float64).tiny))

    def add(self, expected: Any, got: Any) -> str | None:
        wanted, spec = pytree.tree_flatten(opened(expected))
        found, found_spec = pytree.tree_flatten(opened(got))
        if spec != found_spec:
            return f"must return {spec}, got {found_spec}"
        for x, y in zip(wanted, found, strict=True):
            if not isinstance(x, torch.Tensor):
                continue
            if not isinstance(y, torch.Tensor) or x.shape != y.shape or x.dtype != y.dtype:
                got_kind = f"{y.dtype} {list(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
                return f"must return {x.dtype} {list(x.shape)}, got {got_kind}"
            if x.is_floating_point() and x.numel():
                finite = x.isfinite()
                if not bool(y.isfinite()[finite].all()):
                    return "returns non-finite values where the layer's are finite; check its scales"
                self._any = True
                reference = x[finite].double()
                self._difference += float((y[finite].double() - reference).square().sum())
                self._norm += float(reference.square().sum())
        return None


def _as_float(layer: nn.Module, got: Any, expected: Any) -> Any:
    """What the codes of a layer with int8 output stand for, in the dtype of the layer that it replaces."""
    scale, point = getattr(layer, "out_scale", None), getattr(layer, "out_zero_point", None)
    if not isinstance(scale, torch.Tensor) or not isinstance(point, torch.Tensor):
        return got
    return ((got.float() - point) * scale).to(expected.dtype) if isinstance(expected, torch.Tensor) else got


def shape_time(first: torch.Tensor | None, found: Comparison) -> ShapeTime:
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

"""Fold what follows a layer into it: batch norm into weights, activations into a compiled layer's epilogue.

What was folded is replaced by `nn.Identity`, so the model keeps its class, its code and its names.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tautorch._batches import (
    Batch,
    call_model,
    left_as_it_is,
    model_device,
    output_tensors,
    squared_change,
    to_device,
    training_modes_kept,
)
from tautorch.nn import MODULES
from tautorch.ownership import class_functions, refusal, run_alone

_PACKED = tuple(MODULES.values())
_FOLDS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d),
    nn.BatchNorm2d: (nn.Conv2d,),
    nn.BatchNorm3d: (nn.Conv3d,),
}
_TOLERANCE = 1e-2  # relative L2; a wrong fold is off by the size of the output, a right one by rounding


def fuse(
    model: nn.Module,
    example_inputs: Batch | None = None,
    *,
    layers: Iterable[str] | None = None,
    report: list[str] | None = None,
) -> nn.Module:
    """Folds layers of an eval-mode `model` together, in place, and returns it.

    - `nn.BatchNorm1d/2d/3d` into the `nn.Linear` or `nn.Conv1d/2d/3d` before it (Jacob et al., "Quantization
    and
      Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2).
      `BatchNorm1d` after `Linear` is taken to see [batch, features].
    - `nn.ReLU`, `nn.GELU`, `nn.SiLU` into the `activation` of a tautorch layer before it.

    Fold batch norm before `convert`, activations after it. Pairs are found on the `torch.fx` graph; where the
    model cannot be traced, on the graphs of the parts that can and that their parents only call. A layer is
    left alone if something else reads its output or its weight, and if the source of another method says it
    may (`def embed(self, x): return self.fc1(x)`; private methods count as part of those that use them).
    `report` gets one line per fold and per refusal. With `layers`, only what follows layers of these
    names is folded.

    example_inputs: one batch; with it every traceable part is used, and the model's output is compared before
        and after (an output without a finite float leaves it out). Raises ValueError if the output moves by
        more than rounding, and if the model is in training mode; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("fuse: model must be in eval mode, got training mode; call model.eval() first")
    batch = to_device(example_inputs, model_device(model))
    lines: list[str] = []
    only = None if layers is None else set(layers)
    with torch.no_grad(), training_modes_kept(model):
        before = None if batch is None else _run(model, batch)
        if batch is not None and not any(bool(t.isfinite().any()) for t in _floats(before)):
            batch = None
            lines.append("example_inputs: left out, as the output holds no finite float to compare")
        undo = _Undo()
        try:
            for prefix, part in _parts(model, everything=batch is not None):
                for group in part:
                    named = tuple((prefix + a, prefix + b) for a, b in group)
                    if only is None or all(layer in only for layer, _ in named):
                        lines += _fold(model, named, undo)
            if batch is not None:
                _check_close(before, _run(model, batch))
        except BaseException:
            undo.run()
            raise
    if report is not None:
        report += lines
    return model


def _run(model: nn.Module, batch: Any) -> Any:
    with left_as_it_is(model):
        return call_model("fuse", model, batch)


@dataclass(frozen=True)
class _Step:
    """A call of the module `name` on the output of the step `source` alone (None: on anything else)."""

    name: str
    source: int | None
    users: int


Group = tuple[tuple[str, str], ...]


def _groups(steps: Sequence[_Step]) -> list[Group]:
    """Pairs (layer, follower) to fold: all calls of one follower, each on a layer that it alone reads."""
    calls: dict[str, list[_Step]] = defaultdict(list)
    for step in steps:
        calls[step.name].append(step)
    found: list[Group] = []
    for name, uses in calls.items():
        sources = [steps[use.source] for use in uses if use.source is not None]
        if len(sources) == len(uses) and all(s.users == 1 and len(calls[s.name]) == 1 for s in sources):
            found.append(tuple((source.name, name) for source in sources))
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _PACKED) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> list[Group] | None:
    """The groups of a traceable module, None if it is not traceable.

    With optional arguments in its forward it is traced both with them and without, and only what holds in
    both counts: `if mask is None` takes one side in each.
    """
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    found: list[list[Group]] = []
    for concrete in [None, optional] if optional else [None]:
        try:
            with _attributes_kept(module):
                found.append(_groups(_steps(module, _Tracer().trace(module, concrete))))
        except Exception:  # whatever user code raises when it is given proxies
            return None
    return [group for group in found[0] if all(group in other for other in found)]


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Tracing runs forward; what it stores on modules is a proxy that nobody wants afterwards."""
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)


def _steps(module: nn.Module, graph: fx.Graph) -> list[_Step]:
    """The module calls of a graph; identities in between are looked through."""
    index: dict[fx.Node, int] = {}
    steps: list[_Step] = []
    for node in graph.nodes:
        if node.op == "call_module":
            source = _only_input(node)
            while source is not None and source.op == "call_module" and len(source.users) == 1:
                if type(module.get_submodule(str(source.target))) is not nn.Identity:
                    break
                source = _only_input(source)
            index[node] = len(steps)
            steps.append(_Step(str(node.target), index.get(source) if source else None, len(node.users)))
    return steps


def _only_input(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return first if isinstance(first, fx.Node) else None


def _parts(model: nn.Module, everything: bool, prefix: str = "") -> Iterator[tuple[str, list[Group]]]:
    """(prefix, groups) of the model if it can be traced, otherwise of the largest parts that can.

    Unless `everything`, a part counts only if its parent does nothing but call it: a parent that walks
    through `self.features` itself may keep any of the outputs inside.
    """
    groups = _traced(model)
    if groups is not None:
        yield prefix, groups
        return
    sequential = type(model) is nn.Sequential
    if sequential:
        names = [n for n, child in model.named_children() if type(child) is not nn.Identity]
        yield prefix, _groups([_Step(n, i - 1 if i else None, 1) for i, n in enumerate(names)])
    for name, child in model.named_children():
        if everything or sequential or _only_called(type(model), name):
            yield from _parts(child, everything, f"{prefix}{name}.")


def _only_called(cls: type[nn.Module], child: str) -> bool:
    """Whether the methods of `cls` mention `self.<child>` only to call it, and do so somewhere."""
    count = 0
    for _, tree in class_functions(cls):
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                if node.attr in ("children", "named_children", "modules", "named_modules", "_modules"):
                    return False
                if node.attr == child:
                    if id(node) not in called:
                        return False
                    count += 1
    return count > 0


class _Undo:
    """Changes to take back, the last one first."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def set(self, module: nn.Module, name: str, value: object) -> None:
        """Sets an attribute, parameter or child, remembering what was there."""
        before = getattr(module, name)
        self._steps.append(lambda: setattr(module, name, before))
        setattr(module, name, value)

    def run(self) -> None:
        for step in reversed(self._steps):
            step()
        self._steps.clear()


def _fold(model: nn.Module, group: Group, undo: _Undo) -> Iterator[str]:
    """Folds one group if it can be; yields what was done or why not."""
    name = group[0][1]
    follower = model.get_submodule(name)
    layers = [model.get_submodule(layer) for layer, _ in group]
    activation = _activation(follower)
    if isinstance(follower, _BatchNorm) and type(follower) in _FOLDS:
        if not all(isinstance(layer, _FOLDS[type(follower)]) for layer in layers):
            return
        what = "batch norm"
        reason = "it follows several layers" if len(layers) > 1 else _norm_refusal(layers[0], follower)
    elif activation is not None:
        if not all(isinstance(layer, _PACKED) for layer in layers):
            return
        what = activation
        taken = [str(layer.activation) for layer in layers if layer.activation != "none"]
        reason = f"its layer already applies {taken[0]}" if taken else None
        if any(getattr(layer, "out_scale", None) is not None for layer in layers):
            reason = "its layer gives int8 codes"  # whose zero is not that of what they stand for
    else:
        return
    for path in [name, *(layer for layer, _ in group)]:
        found = refusal(model, path)
        reason = reason or (f"{path}: {found}" if found else None)
    for path, _ in group:
        reason = reason or run_alone(model, path, name)
    if reason is not None:
        yield f"{name}: {what} not folded: {reason}"
        return
    for layer in layers:
        if isinstance(follower, _BatchNorm):
            _fold_norm(layer, follower, undo)
        else:
            undo.set(layer, "activation", activation)
    parent, _, child = name.rpartition(".")
    undo.set(model.get_submodule(parent), child, nn.Identity().eval())
    yield f"{name}: {what} folded into {', '.join(layer for layer, _ in group)}"


def _activation(module: nn.Module) -> str | None:
    """The name of an activation that the compiled epilogues have."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def _norm_refusal(layer: nn.Module, norm: _BatchNorm) -> str | None:
    weight = layer.weight
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return "it normalises with the statistics of the batch"
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return "the weight before it is not floating point"
    if weight.shape[0] != norm.num_features:
        return f"it has {norm.num_features} features, the layer before it {weight.shape[0]}"
    return None


def _fold_norm(layer: nn.Module, norm: _BatchNorm, undo: _Undo) -> None:
    """w' = w g / sqrt(var + eps), b' = (b - mean) g / sqrt(var + eps) + beta, computed in float64."""
    weight, bias, mean, var = (
        layer._parameters["weight"],
        layer._parameters["bias"],
        norm.running_mean,
        norm.running_var,
    )
    if weight is None or mean is None or var is None:
        raise TypeError("_norm_refusal lets none of these through")
    scale = (var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -mean.double() * scale if bias is None else (bias.double() - mean.double()) * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    trained = weight.requires_grad
    undo.set(layer, "weight", nn.Parameter(folded.to(weight), requires_grad=trained))
    steps = layer._buffers.get("weight_scale")  # of a weight that quantisation put on a grid
    if steps is not None:
        found = (steps.double() * scale.abs()).to(steps)
        undo.set(layer, "weight_scale", torch.where(found > 0, found, torch.ones_like(found)))
    undo.set(layer, "bias", nn.Parameter(shift.to(weight), requires_grad=trained))


def _floats(output: object) -> list[torch.Tensor]:
    """The float numbers of a model's output."""
    return [t for t in output_tensors(output) if t.is_floating_point() and t.numel()]


def _check_close(before: object, after: object) -> None:
    difference, norm = 0.0, 0.0
    for x, y in zip(_floats(before), _floats(after), strict=True):
        change, was = squared_change(x, y)
        difference, norm = difference + change, norm + was
    if not difference <= _TOLERANCE**2 * norm:
        raise ValueError(
            "fuse: nothing was changed, because the output moved by "
            f"{(difference / max(norm, 1e-300)) ** 0.5:.2g} (relative L2); "
            "something reads the output of a layer inside a part of the model"
        )

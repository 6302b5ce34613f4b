"""Which channels of a tensor can be scaled where it is made, so that nothing but its readers' columns change.

`record` runs a model once and writes down its torch calls. `Paths.absorber_of` asks, for the input of a
linear layer, which norm or linear layer before it could divide its outputs by a vector while the layer
multiplies its columns by it: it labels the outputs' elements by channel and follows the labels through every
later call. A call passes labels on if scaling its input by channel scales its output by channel (reshapes,
slices, ReLU, products with unscaled tensors, the values of an attention); any other reader of a scaled
element refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tautorch import distributed
from tautorch._batches import call_model, output_tensors, own_copy
from tautorch._layers import own_weight, readers_of
from tautorch.quantize.record import Step, Trace, record

# Rearrangements: run on the labels as they ran on the values.
_MOVES = frozenset(
    {"view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze"}
    | {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "__getitem__", "expand", "repeat"}
    | {"repeat_interleave", "swapaxes", "swapdims", "movedim", "narrow", "select", "flip", "roll", "clone"}
    | {"index_select", "view_as", "reshape_as", "expand_as", "detach", "t", "adjoint", "moveaxis", "ravel"}
)
# Element by element, f(s x) = s f(x) for s > 0.
_HOMOGENEOUS = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "neg", "__neg__", "identity"})
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as", "cpu", "cuda"})
_PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "__truediv__"})
_MATMULS = frozenset({"matmul", "bmm", "__matmul__"})


@dataclass
class Absorber:
    """Parameters to divide by s [C], and the columns to multiply: `columns[layer][j]` is the channel of j.

    `name` is the absorbing module's, `touched` holds the names of all parameters that change.
    """

    parameters: list[nn.Parameter]
    channels: int
    columns: dict[str, Tensor]
    name: str
    touched: frozenset[str]

    def key(self) -> tuple[Any, ...]:
        """What two runs of a model must agree on."""
        columns = sorted((name, tuple(index.tolist())) for name, index in self.columns.items())
        return self.name, tuple(columns)


class Paths:
    """Absorbers in a trace of `model` for the inputs of `targets`, linear layers by name."""

    def __init__(self, model: nn.Module, trace: Trace, targets: Mapping[str, nn.Linear]) -> None:
        self._model, self._trace, self._targets = model, trace, targets
        self._names = {id(layer.weight): name for name, layer in targets.items()}
        self._owners = {
            id(p): (module, f"{prefix}.{key}".lstrip("."))
            for prefix, module in model.named_modules()
            for key, p in module._parameters.items()
            if p is not None
        }
        self._reads: dict[str, int] = {}
        for index, step in enumerate(trace.steps):
            name = self._reader(step)
            if name is not None:
                self._reads[name] = -1 if name in self._reads else index  # -1: called more than once
        self._final = {id(t) for t in output_tensors(trace.output)}

    def absorber_of(self, name: str) -> Absorber | None:
        """The nearest absorber for the input of layer `name`, None where there is none."""
        index = self._reads.get(name, -1)
        if index < 0:
            return None
        for source in self._sources(self._trace.steps[index].argument(0, "input")):
            found = self._absorber(source, name)
            if found is not None:
                return found
        return None

    def read(self) -> set[str]:
        """The names of the parameters that the run read."""
        return {name for key, (_, name) in self._owners.items() if self._trace.readers.get(key)}

    def _reader(self, step: Step) -> str | None:
        if step.func is not F.linear:
            return None
        return self._names.get(id(step.argument(1, "weight")))

    def _sources(self, x: Tensor) -> Iterator[int]:
        """Steps before x that could absorb, the nearest first."""
        queue, seen = [x], set()
        while queue:
            tensor = queue.pop(0)
            index = self._trace.maker.get(id(tensor))
            if index is None or index in seen:
                continue
            seen.add(index)
            step = self._trace.steps[index]
            if self._parameters(step) is not None:
                yield index
            if _passes(step):
                queue += step.tensors

    def _parameters(self, step: Step) -> tuple[list[nn.Parameter], str] | None:
        """The parameters that a call's output channels are proportional to, and whose they are."""
        if step.func is F.linear:
            found = [step.argument(1, "weight"), step.argument(2, "bias")]
        elif step.func is F.layer_norm:
            found = [step.argument(2, "weight"), step.argument(3, "bias")]
        elif step.func is F.rms_norm:
            found = [step.argument(2, "weight")]
        elif step.name in _PRODUCTS:
            found = [t for t in step.args if isinstance(t, nn.Parameter) and t.dim() == 1][:1]
        else:
            return None
        out = step.results
        if not found or found[0] is None or len(out) != 1 or found[0].shape[0] != out[0].shape[-1]:
            return None
        if step.func is not F.linear and found[0].dim() != 1:
            return None
        parameters = [p for p in found if p is not None]
        for p in parameters:
            owner = self._owners.get(id(p))
            alone = owner is not None and len(readers_of(self._model, p)) == 1
            if not alone or len(self._trace.readers[id(p)]) != 1 or not p.is_floating_point():
                return None
        module, name = self._owners[id(parameters[0])]
        if isinstance(module, nn.Linear) and own_weight(module) is not None:
            return None
        return parameters, name.rpartition(".")[0]

    def _absorber(self, source: int, name: str) -> Absorber | None:
        found = self._parameters(self._trace.steps[source])
        if found is None:
            return None
        (out,) = self._trace.steps[source].results
        channels = out.shape[-1]
        every = torch.arange(channels, dtype=torch.int32)
        columns = self._follow(source, out, every, strict=False)
        if columns is None or name not in columns:
            return None
        wanted = torch.zeros(channels, dtype=torch.bool)
        wanted[columns[name].long()] = True
        columns = self._follow(source, out, torch.where(wanted, every, -1), strict=True)
        if columns is None or name not in columns:
            return None
        weights = [self._owners[id(self._targets[name].weight)][1] for name in columns]
        touched = frozenset([*weights, *(self._owners[id(p)][1] for p in found[0])])
        return Absorber(found[0], channels, columns, found[1], touched)

    def _follow(self, source: int, out: Tensor, channels: Tensor, strict: bool) -> dict[str, Tensor] | None:
        """Columns of the target layers that read the labelled channels (-1: unscaled) of a call's output.

        `strict`: None if anything else reads them. Otherwise such readers are passed over.
        """
        labels = {id(out): _like(out, channels)}
        columns: dict[str, Tensor] = {}
        if strict and id(out) in self._final:
            return None
        for step in self._trace.steps[source + 1 :]:
            if not any(id(t) in labels for t in step.tensors):
                continue
            name = self._reader(step)
            if name is not None:
                label = labels.get(id(step.argument(0, "input")))
                found = None if label is None else _uniform(label)
                if found is not None and self._reads[name] >= 0 and bool((found >= 0).all()):
                    columns[name] = found
                    continue
                made = None
            else:
                made = _pass_on(step, labels, strict)
            if made is None:
                if strict:
                    return None
                continue
            for tensor, label in zip(step.results, made, strict=True):
                if bool((label >= 0).any()):
                    if strict and id(tensor) in self._final:
                        return None
                    labels[id(tensor)] = label
        return columns


def _like(out: Tensor, channels: Tensor) -> Tensor:
    """The labels of a tensor whose last dimension is the channels, in its memory layout."""
    label = torch.empty_strided(out.shape, out.stride(), dtype=torch.int32)
    return label.copy_(channels.expand(out.shape))


def _uniform(label: Tensor) -> Tensor | None:
    """The labels along the last dimension if they are the same at all other places (a vector), else None."""
    rows = label.reshape(-1, label.shape[-1])
    return rows[0] if rows.shape[0] and bool((rows == rows[0]).all()) else None


def _passes(step: Step) -> bool:
    """Whether labels may go through the call, by its name."""
    known = _MOVES | _HOMOGENEOUS | _CASTS | _PRODUCTS | _QUOTIENTS | _MATMULS
    return step.name in known or step.func is F.scaled_dot_product_attention or _is_idle_dropout(step)


def _is_idle_dropout(step: Step) -> bool:
    return step.name == "dropout" and step.argument(2, "training") is False


def _pass_on(step: Step, labels: Mapping[int, Tensor], strict: bool) -> list[Tensor] | None:
    """Labels of a call's results, None where scaling the labelled elements does other than scale those.

    Unless `strict`, queries and keys may be labelled too: one linear layer often makes all three.
    """
    results = step.results
    labelled = [t for t in step.tensors if id(t) in labels]
    if not strict and step.func is F.scaled_dot_product_attention:
        labelled = [t for t in labelled if t is step.argument(2, "value")]
    if not results or any(r.numel() == 0 for r in results) or len(labelled) != 1:
        return None
    (source,) = labelled
    label = labels[id(source)]
    first = step.argument(0, "input") is source
    if step.name in _MOVES and first:
        return _moved(step, source, label)
    if len(results) != 1:
        return None
    shape = results[0].shape
    if (step.name in _HOMOGENEOUS or step.name in _CASTS or _is_idle_dropout(step)) and first:
        return [label] if label.shape == shape else None
    if step.name in _PRODUCTS or (step.name in _QUOTIENTS and first):
        return [label.expand(shape)]
    if step.func is F.scaled_dot_product_attention and step.argument(2, "value") is source:
        return _mixed(label, shape)
    if step.name in _MATMULS and not first and source.dim() > 1:
        return _mixed(label, shape)
    return None


def _moved(step: Step, source: Tensor, label: Tensor) -> list[Tensor] | None:
    def swap(value: Any) -> Any:
        return label if value is source else value

    args, kwargs = pytree.tree_map(swap, (step.args, step.kwargs))
    try:
        made = [t for t in pytree.tree_leaves(step.func(*args, **kwargs)) if isinstance(t, Tensor)]
    except (RuntimeError, TypeError):  # an index on another device, a layout that the labels do not have
        return None
    shapes = [t.shape for t in step.results]
    return made if [t.shape for t in made] == shapes else None


def _mixed(label: Tensor, shape: torch.Size) -> list[Tensor] | None:
    """Labels of a @ b from those of b: every row of b must have the same; heads of b may serve several."""
    row = label[..., :1, :]
    if not bool((label == row).all()):
        return None
    if row.dim() == len(shape) >= 3 and row.shape[-3] not in (1, shape[-3]):
        row = row.repeat_interleave(shape[-3] // row.shape[-3], dim=-3)
    return [row.expand(shape)]


def agreed_absorbers(
    op: str, model: nn.Module, targets: dict[str, nn.Linear], samples: list[Any]
) -> tuple[list[Absorber], list[list[Tensor]]]:
    """Absorbers in the order of the layers, each layer in one of them; and the outputs for the samples.

    Where runs differ (a branch that depends on the data, on this rank or another), an absorber counts if each
    of them finds the same one or reads none of its parameters.
    """
    found: list[list[Absorber]] = []
    reads: list[set[str]] = []
    outputs: list[list[Tensor]] = []
    for batch in samples:
        given = own_copy(batch)  # beforehand: copying is no part of what the model does
        trace = record(lambda given=given: call_model(op, model, given, own=False))  # type: ignore[misc]
        outputs.append([t.clone() for t in output_tensors(trace.output)])
        paths = Paths(model, trace, targets)
        found.append(_disjoint(paths, targets))
        reads.append(paths.read())
        del trace, paths
    mine = [({group.key() for group in groups}, read) for groups, read in zip(found, reads, strict=True)]
    runs = [run for each in distributed.all_gather(mine) for run in each]
    agreed: dict[tuple[Any, ...], Absorber] = {}
    for group in (group for groups in found for group in groups):
        if all(group.key() in keys or not group.touched & read for keys, read in runs):
            agreed.setdefault(group.key(), group)
    # A rank whose runs never came by a group does not have it: it is left out everywhere.
    common = set.intersection(*(set(keys) for keys in distributed.all_gather(list(agreed))))
    places = {name: place for place, name in enumerate(targets)}
    kept = [group for key, group in agreed.items() if key in common]
    return sorted(kept, key=lambda group: min(places[name] for name in group.columns)), outputs


def _disjoint(paths: Paths, targets: Iterable[str]) -> list[Absorber]:
    found: list[Absorber] = []
    taken: set[str] = set()
    for name in targets:
        if name in taken:
            continue
        absorber = paths.absorber_of(name)
        if absorber is not None and not taken & absorber.columns.keys():
            found.append(absorber)
            taken |= absorber.columns.keys()
    return found

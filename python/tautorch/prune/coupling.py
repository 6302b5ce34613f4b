"""Which channels must go together: Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tautorch._batches import Batch, call_model, left_as_it_is, output_tensors
from tautorch._layers import own_weight, readers_of

if TYPE_CHECKING:
    import torch_pruning


@dataclass(frozen=True)
class Member:
    """One side of one module in a group: channels `indices` of it stand for the group's channels `roots`."""

    name: str
    module: nn.Module
    outgoing: bool
    indices: Tensor
    roots: Tensor


@dataclass(frozen=True)
class Coupled:
    """Channels that must go together, and how: units of `head` channels, alike in each of `folds` groups."""

    module: nn.Module
    handler: Callable[..., Any]
    members: tuple[Member, ...]
    channels: int
    folds: int
    head: int
    refused: str | None

    @property
    def name(self) -> str:
        """The layers whose outputs these channels are."""
        return " + ".join(
            m.name for m in self.members if m.outgoing and isinstance(m.module, (nn.Linear, nn.Conv2d))
        )

    @property
    def units(self) -> int:
        """How many choices there are."""
        return self.channels // (self.folds * self.head)

    def channels_of(self, units: Tensor) -> list[int]:
        """The channels that go with these units."""
        inside = (units.unsqueeze(1) * self.head + torch.arange(self.head)).flatten()
        per_fold = self.channels // self.folds
        return sorted((inside + torch.arange(self.folds).unsqueeze(1) * per_fold).flatten().tolist())


def require_torch_pruning(op: str) -> Any:
    """The package; ImportError with the command that installs it."""
    try:
        import torch_pruning as package
    except ImportError as error:
        raise ImportError(
            f"{op}: whole channels need Torch-Pruning; install it with: pip install 'tautorch[channels]'"
        ) from error
    return package


@contextmanager
def _all_differentiable(model: nn.Module) -> Iterator[None]:
    """The graph is read off autograd, which passes over what is frozen."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def dependency_graph(op: str, model: nn.Module, example: Batch) -> torch_pruning.DependencyGraph:
    """Trace the model once, in eval mode."""
    package = require_torch_pruning(op)

    def outputs(out: Any) -> list[Tensor]:
        # Each output gets a node of its own, also where it is read further inside the model.
        found = [t * 1 for t in output_tensors(out) if t.requires_grad]
        if not found:
            raise ValueError(f"{op}: the model must return a tensor that its weights act on, got none")
        return found

    with warnings.catch_warnings(), left_as_it_is(model), torch.enable_grad():
        warnings.simplefilter("ignore")
        with _all_differentiable(model):
            return package.DependencyGraph().build_dependency(
                model,
                example_inputs=example,
                forward_fn=lambda m, batch: call_model(op, m, batch),
                output_transform=outputs,
                verbose=False,
            )


def coupled_groups(
    op: str, model: nn.Module, graph: torch_pruning.DependencyGraph, heads: Mapping[str, int]
) -> list[Coupled]:
    """Every group of coupled channels of the model, the refused ones with the reason."""
    names = {module: name for name, module in model.named_modules()}
    found = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        rooted = _from_the_consumer(graph, group, names, heads)
        found.append(_coupled(op, model, graph, rooted, names, heads))
    return found


def _from_the_consumer(
    graph: Any, group: Any, names: Mapping[nn.Module, str], heads: Mapping[str, int]
) -> Any:
    """Attention is indexed by what reads it: a fused projection's outputs are several times as many."""
    headed = any(
        names.get(dep.target.module) in heads and graph.is_out_channel_pruning_fn(dep.handler)
        for dep, _ in group
    )
    if headed:
        for dep, indices in group:
            if isinstance(dep.target.module, nn.Linear) and graph.is_in_channel_pruning_fn(dep.handler):
                return graph.get_pruning_group(dep.target.module, dep.handler, indices)
    return group


def _coupled(
    op: str,
    model: nn.Module,
    graph: Any,
    group: Any,
    names: Mapping[nn.Module, str],
    heads: Mapping[str, int],
) -> Coupled:
    members, refused, folds, head = [], None, 1, 1
    channels = len(group[0].idxs)
    for item in group.items:
        module, handler = item.dep.target.module, item.dep.handler
        if isinstance(module, graph.ops._OutputOp):
            refused = refused or "its channels are outputs of the model"
        if isinstance(module, nn.Parameter):
            refused = refused or "a parameter outside any layer has these channels"
        if module not in names:
            continue
        outgoing = bool(graph.is_out_channel_pruning_fn(handler))
        indices, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        members.append(Member(names[module], module, outgoing, indices, roots))
        refused = refused or _unsafe(model, names[module], module)
        folds = math.lcm(folds, _groups(module))
        if outgoing and names[module] in heads:
            count = heads[names[module]]
            if count < 1 or channels % count:
                raise ValueError(
                    f"{op}: heads of {names[module]!r} must divide its {channels} channels, got {count}"
                )
            head = channels // count
    if channels % (folds * head):
        refused = refused or f"its {channels} channels are not {folds} groups of whole heads"
    root = group[0].dep
    return Coupled(root.target.module, root.handler, tuple(members), channels, folds, head, refused)


def _groups(module: nn.Module) -> int:
    """Channels are removed alike in each group; of a depthwise convolution each channel is its own."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.modules.conv._ConvNd) and not is_depthwise(module):
        return module.groups
    return 1


def is_depthwise(module: nn.Module) -> bool:
    """One filter for each channel: its channels are passed on, not mixed."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups == module.out_channels == module.in_channels
        and module.groups > 1
    )


def _unsafe(model: nn.Module, name: str, module: nn.Module) -> str | None:
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return None
    reason = own_weight(module)
    if reason is None and len(readers_of(model, module.weight)) > 1:
        reason = "its weight is shared with another layer"
    return None if reason is None else f"{name!r} cannot be cut: {reason}"

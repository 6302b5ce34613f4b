"""Cutting channels out of a model, with proof that the rest still computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tautorch._batches import Batch, call_model, left_as_it_is, output_tensors
from tautorch.prune.coupling import Coupled, dependency_graph, is_depthwise

if TYPE_CHECKING:
    import torch_pruning


class Snapshot:
    """All that a module tree holds, by reference: enough to go back, as cutting makes new parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (
                module,
                dict(module.__dict__),
                {key: dict(value) for key, value in module.__dict__.items() if isinstance(value, dict)},
            )
            for module in model.modules()
        ]
        self._frozen = {
            (id(module), key)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad
        }

    def restore(self) -> None:
        """Put every attribute of every module back."""
        for module, attributes, dicts in self._modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, content in dicts.items():
                module.__dict__[key].clear()
                module.__dict__[key].update(content)

    def refreeze(self) -> None:
        """New parameters in the place of frozen ones are frozen too."""
        for module, _, _ in self._modules:
            for key, parameter in module._parameters.items():
                if parameter is not None and (id(module), key) in self._frozen:
                    parameter.requires_grad_(False)


def outputs_of(op: str, model: nn.Module, example: Batch) -> list[Tensor]:
    """The model's outputs in eval mode, from the same random state every time."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with left_as_it_is(model), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        return [tensor.clone() for tensor in output_tensors(call_model(op, model, example))]


def cut(
    op: str,
    model: nn.Module,
    graph: torch_pruning.DependencyGraph,
    example: Batch,
    group: Coupled,
    units: Tensor,
    verify: str,
    adjust: Callable[[nn.Module], object],
) -> tuple[str | None, torch_pruning.DependencyGraph]:
    """Remove `units` of a group; None, or why the model was left as it was, and the graph to go on with."""
    pruning: Any = graph.get_pruning_group(group.module, group.handler, group.channels_of(units))
    if not graph.check_pruning_group(pruning):
        return "a layer would lose all its channels", graph
    before = Snapshot(model)
    with _removed_inputs_at_zero(graph, pruning):
        expected = outputs_of(op, model, example)
    try:
        with torch.no_grad():
            pruning.prune()
        before.refreeze()
        adjust(model)
        reason = _difference(expected, outputs_of(op, model, example), verify)
    except Exception as error:  # whatever the model's code raises for shapes it does not expect
        reason = f"the model fails without them: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if reason is None:
        return None, graph
    before.restore()
    return reason, dependency_graph(op, model, example)


@contextmanager
def _removed_inputs_at_zero(graph: Any, pruning: Any) -> Iterator[None]:
    """What reads the removed channels sees nothing of them: the weights there are zero inside."""
    swapped: list[tuple[nn.Parameter, Tensor]] = []
    for dep, indices in pruning:
        module = dep.target.module
        mixes = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not is_depthwise(module)
        if mixes and graph.is_in_channel_pruning_fn(dep.handler):
            zeroed = module.weight.detach().clone()
            _zero_inputs(module, zeroed, indices)
            swapped.append((module.weight, module.weight.data))
            module.weight.data = zeroed
    try:
        yield
    finally:
        for parameter, data in reversed(swapped):
            parameter.data = data


def _zero_inputs(module: nn.Module, weight: Tensor, channels: list[int]) -> None:
    """Zero the weights that read these input channels."""
    indices = torch.tensor(channels, device=weight.device)
    if getattr(module, "transposed", False):
        weight[indices] = 0.0
        return
    inputs = weight.shape[1]
    by_group = weight.view(int(getattr(module, "groups", 1)), -1, *weight.shape[1:])
    by_group[indices // inputs, :, indices % inputs] = 0.0


def _difference(expected: list[Tensor], got: list[Tensor], verify: str) -> str | None:
    """Why `got` is not what zeroing the channels gives, or None."""
    shapes = [list(t.shape) for t in expected], [list(t.shape) for t in got]
    if shapes[0] != shapes[1]:
        return f"outputs would change from {shapes[0]} to {shapes[1]}"
    if verify == "shape":
        return None
    for want, have in zip(expected, got, strict=True):
        if not want.is_floating_point():
            continue
        scale = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 1.0
        # Sums run in another order and length; mixing up channels is off by a share of the output itself.
        tolerance = min(0.05, 1000 * torch.finfo(want.dtype).eps)
        if not torch.allclose(want, have, rtol=0.0, atol=tolerance * max(scale, 1e-30), equal_nan=True):
            return (
                "removing them is not the same as zeroing them (a reshape into heads or a norm over channels "
                'mixes them): give heads={...}, or allow it with verify="shape"'
            )
    return None

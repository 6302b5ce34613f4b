"""The calls that layers really get when a model runs on example inputs, to time and to compare them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tautorch._batches import call_model, own_copy, refuse_transformed


@dataclass
class Call:
    """One call of a layer as the model makes it, with its own copy of the tensors (strides kept)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def first(self) -> torch.Tensor | None:
        return next(
            (v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, torch.Tensor)), None
        )

    def signature(self) -> tuple[Any, ...]:
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        kinds = [(v.shape, v.dtype, v.stride()) if isinstance(v, torch.Tensor) else repr(v) for v in leaves]
        return (str(spec), *kinds)

    def __str__(self) -> str:
        first = self.first
        return f"a {first.dtype} input {list(first.shape)}" if first is not None else "a call without tensors"

    def run(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


def capture(
    op: str, model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]
) -> dict[str, list[Call]]:
    """Runs the model on `batches`; returns each layer's distinct calls, by layer name, with copied tensors.

    Calls are distinct by the shape, dtype and strides of every tensor argument and by every other argument.
    Eval mode and no_grad are the caller's business; `op` names the caller in errors.
    """
    seen: dict[str, dict[tuple[Any, ...], Call]] = {name: {} for name in layers}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_transformed(op, name)
        call = Call(args, kwargs)
        key = call.signature()
        if key not in seen[name]:
            seen[name][key] = Call(*own_copy((args, kwargs)))

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            call_model(op, model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: list(calls.values()) for name, calls in seen.items()}

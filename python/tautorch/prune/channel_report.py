"""What removing channels did to each layer and to the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tautorch._batches import Batch, call_model, left_as_it_is
from tautorch.prune._tables import table, text

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ChannelRecord:
    """One Linear or convolution: inputs, outputs, parameters and MACs of the example, before and after."""

    name: str
    kind: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]


@dataclass
class ChannelReport:
    """Pass an empty one to `prune_channels(..., report=report)`; `str()` is a table.

    `layers` has each Linear and convolution, `parameters` and `macs` those of the whole model before and
    after (MACs of Linear and convolutions on the example input), and `left` why channels were left alone.
    """

    layers: list[ChannelRecord] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    left: dict[str, str] = field(default_factory=dict)

    def fill(self, before: Measured, after: Measured, left: Mapping[str, str]) -> None:
        """Set everything from two measurements."""
        self.layers = [
            ChannelRecord(
                name,
                kind,
                *((old[i], after.layers[name][1][i]) for i in range(4)),
            )
            for name, (kind, old) in before.layers.items()
        ]
        self.parameters = (before.parameters, after.parameters)
        self.macs = (before.macs, after.macs)
        self.left = dict(left)

    def __rich__(self) -> Table:
        def change(pair: tuple[int, int]) -> str:
            return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} → {pair[1]:,}"

        def share(pair: tuple[int, int]) -> str:
            return f"{1 - pair[1] / max(pair[0], 1):.1%}"

        rows = [
            (
                layer.name,
                layer.kind,
                change(layer.inputs),
                change(layer.outputs),
                change(layer.parameters),
                change(layer.macs),
                share(layer.macs),
            )
            for layer in self.layers
        ]
        columns = ("layer", "kind", "inputs", "outputs", "parameters", "MACs", "MACs saved")
        total = ("total", "", "", "", change(self.parameters), change(self.macs), share(self.macs))
        return table("Channels", columns, rows, total)

    def __str__(self) -> str:
        notes = [f"left: {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join([text(self.__rich__()), *notes])


@dataclass(frozen=True)
class Measured:
    """{layer: (kind, (inputs, outputs, parameters, MACs))} and the totals."""

    layers: dict[str, tuple[str, tuple[int, int, int, int]]]
    parameters: int
    macs: int


def measure(op: str, model: nn.Module, example: Batch) -> Measured:
    """Run the example once and count."""
    macs: dict[str, int] = {}
    layers: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
    handles = []
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    }

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            weight: Any = module.weight
            # A transposed convolution uses each of its weights once for each position of its input.
            x = args[0] if getattr(module, "transposed", False) else out
            channels = weight.shape[0]
            macs[name] = macs.get(name, 0) + x.numel() * (weight.numel() // channels)

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(watch(name)))
        with left_as_it_is(model):
            call_model(op, model, example)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in modules.items():
        inputs, outputs = _sizes(module)
        own = sum(p.numel() for p in module.parameters())
        layers[name] = (type(module).__name__, (inputs, outputs, own, macs.get(name, 0)))
    total = sum(p.numel() for p in model.parameters())
    return Measured(layers, total, sum(macs.values()))


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, module.out_channels
    raise TypeError(f"channels: a layer must be Linear or a convolution, got {type(module).__name__}")

"""What a model costs: parameters, and multiply-accumulates on one input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tautorch._batches import Batch
from tautorch.students.checks import check_same_outputs, run


@dataclass(frozen=True)
class LayerCost:
    """A Linear or Conv2d layer: its parameters, and its MACs over all its calls."""

    name: str
    kind: str
    parameters: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """All parameters of a model, and the MACs of its Linear and Conv2d layers on one batch."""

    parameters: int
    macs: int
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=0)
        lines = [
            f"{layer.name:<{width}}  {layer.kind:<7}{layer.parameters:>14,}{layer.macs:>18,}"
            for layer in self.layers
        ]
        return "\n".join([*lines, f"all: {self.parameters:,} parameters, {self.macs:,} MACs"])


@dataclass(frozen=True)
class StudentReport:
    """The costs of a teacher and its student on the same batch."""

    teacher: Cost
    student: Cost

    def __str__(self) -> str:
        pairs = (
            ("parameters", self.teacher.parameters, self.student.parameters),
            ("MACs", self.teacher.macs, self.student.macs),
        )
        return "; ".join(f"{what} {a:,} -> {b:,} ({a / max(b, 1):.2f}x fewer)" for what, a, b in pairs)


def cost(model: nn.Module, example_input: Batch) -> Cost:
    """Parameters and MACs of `model` on one batch, layer by layer in the order of the model.

    Linear and Conv2d count, as in the papers; norms, activations and products of attention do not. Shared
    parameters count once. The model is run in eval mode and left as it was.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    macs = dict.fromkeys(layers, 0)

    def watch(name: str, layer: nn.Linear | nn.Conv2d) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            macs[name] += out.numel() * (layer.weight.numel() // layer.weight.shape[0])

        return hook

    handles = [layer.register_forward_hook(watch(name, layer)) for name, layer in layers.items()]
    try:
        run("cost", model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    rows = tuple(
        LayerCost(name, type(layer).__name__, sum(p.numel() for p in layer.parameters()), macs[name])
        for name, layer in layers.items()
    )
    return Cost(sum(p.numel() for p in model.parameters()), sum(macs.values()), rows)


def compare(teacher: nn.Module, student: nn.Module, example_input: Batch) -> StudentReport:
    """Both costs on the same batch; ValueError if the outputs differ in form or shape."""
    check_same_outputs("compare", teacher, student, example_input)
    return StudentReport(cost(teacher, example_input), cost(student, example_input))

"""What losses share that look into the models: attaching to them, and keeping what their layers output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def attached_all(losses: Iterable[Any], teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
    """Attach each of the losses that look into the models; the others are passed over."""
    with ExitStack() as stack:
        for loss in losses:
            if hasattr(loss, "attached"):
                stack.enter_context(loss.attached(teacher, student))
        yield


def on_top(
    name: str, term: Tensor, base: Any, outputs: tuple[Any, Any, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(term + base(*outputs), the term by name and what the base reports, for `Distiller` to show)."""
    found = {name: term.detach()}
    if base is None:
        return term, found
    total = term + base(*outputs)
    return total, {**found, **(getattr(base, "components", None) or {})}


def layer_pairs(op: str, layers: Any) -> list[tuple[str, str]]:
    """[(student's layer, teacher's layer), ...] of a mapping or a list of pairs; ValueError otherwise."""
    pairs = list(layers.items()) if isinstance(layers, Mapping) else layers
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        raise ValueError(f"{op}: layers must be pairs (student's name, teacher's name), got {layers!r}")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(n, str) for n in pair):
            raise ValueError(f"{op}: layers must be pairs (student's name, teacher's name), got {pair!r}")
    return [(mine, theirs) for mine, theirs in pairs]


def find_layer(op: str, role: str, model: nn.Module | None, name: str) -> nn.Module:
    """The module of that name; ValueError for a missing teacher or one without it."""
    if model is None:
        raise ValueError(f"{op}: the {role} must be a module to look into, got None")
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules or not name:
        shown = ", ".join([key for key in modules if key][:12])
        raise ValueError(f"{op}: the {role}'s layer must be one of its modules, got {name!r}; it has {shown}")
    return modules[name]


class Features:
    """The newest output of some layers of teacher and student, from one forward pass to the loss."""

    def __init__(self, op: str, pairs: list[tuple[str, str]], what: str = "feature") -> None:
        self._op, self.pairs, self._what = op, pairs, what
        self._found: dict[tuple[str, str], Tensor] = {}

    @contextmanager
    def watching(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """While open, remember what the layers output; ValueError for an unknown layer."""
        with ExitStack() as stack:
            for role, model, name in self._places(teacher, student):
                stack.enter_context(self._watch(find_layer(self._op, role, model, name), role, name))
            stack.callback(self._found.clear)
            yield

    def _places(
        self, teacher: nn.Module | None, student: nn.Module
    ) -> Iterator[tuple[str, nn.Module | None, str]]:
        for role, model, index in (("student", student, 0), ("teacher", teacher, 1)):
            for name in dict.fromkeys(pair[index] for pair in self.pairs):
                yield role, model, name

    def keep(self, role: str, name: str, value: Tensor) -> None:
        """Remember `value` until the loss takes it."""
        self._found[role, name] = value

    @contextmanager
    def _watch(self, layer: nn.Module, role: str, name: str) -> Iterator[None]:
        """While open, `keep` what is wanted of the layer: here its output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise TypeError(f"{self._op}: the {role}'s layer must give a tensor, got {kind}")
            # A copy: the next layer may work in place, as ReLU(inplace=True) and `out += x` do.
            self.keep(role, name, output.clone())

        handle = layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """(student's, teacher's without gradient) of each pair, and forget; ValueError where none came."""
        found = dict(self._found)
        self._found.clear()
        missing = [
            f"the {role}'s {name!r}"
            for pair in self.pairs
            for role, name in zip(("student", "teacher"), pair, strict=True)
            if (role, name) not in found
        ]
        if missing:
            raise ValueError(
                f"{self._op}: the layers must run in the forward pass, got no {self._what} of "
                f"{' and '.join(missing)}; use `with loss.attached(teacher, student):`"
            )
        return [(found["student", a], found["teacher", b].detach()) for a, b in self.pairs]

"""Writing down what a model calls, by running it once; nothing of it is traced symbolically or changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# What a tensor is rather than what it holds, unless a tensor is returned.
_METADATA = frozenset(
    {"__get__", "size", "dim", "ndimension", "numel", "stride", "__len__", "is_floating_point", "is_complex"}
    | {"is_contiguous", "element_size", "data_ptr", "storage_offset", "get_device", "nelement"}
)
_MOVING_PROPERTIES = ("T", "mT")


@dataclass
class Step:
    """One torch call."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @cached_property
    def results(self) -> list[Tensor]:
        """The tensors it returned."""
        return [t for t in pytree.tree_leaves(self.out) if isinstance(t, Tensor)]

    def argument(self, place: int, name: str) -> Any:
        """An argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and any(func == getattr(Tensor, p).__get__ for p in _MOVING_PROPERTIES):
            name = "t"
        step = Step(func, name, args, dict(named), out)
        if name not in _METADATA or step.results:
            self.steps.append(step)
        return out


@dataclass
class Trace:
    """The calls of one run of a model, and what it returned; the tensors live as long as this."""

    steps: list[Step]
    output: Any
    readers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    maker: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, step in enumerate(self.steps):
            for tensor in step.tensors:
                if not self.readers[id(tensor)] or self.readers[id(tensor)][-1] != index:
                    self.readers[id(tensor)].append(index)
            given = {id(t) for t in step.tensors}
            for tensor in step.results:
                if id(tensor) not in given:
                    self.maker.setdefault(id(tensor), index)


class Signature(TorchFunctionMode):
    """While active, which calls are made and which parameters they read; `take()` tells, and begins anew."""

    def __init__(self) -> None:
        super().__init__()
        self._value = 0

    def take(self) -> int:
        """What the calls since the last `take()` hash to."""
        value, self._value = self._value, 0
        return value

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        read = tuple(id(t) for t in (*args, *(kwargs or {}).values()) if isinstance(t, nn.Parameter))
        self._value = hash((self._value, getattr(func, "__name__", ""), read))
        return func(*args, **(kwargs or {}))


def record(run: Callable[[], Any]) -> Trace:
    """Write down the torch calls of `run()`."""
    with _Recorder() as recorder:
        output = run()
    return Trace(recorder.steps, output)


@contextmanager
def each_run(model: nn.Module) -> Iterator[list[int]]:
    """A list that grows by the signature of each run of the model."""
    runs: list[int] = []
    with Signature() as signature:
        begin = model.register_forward_pre_hook(lambda *_: signature.take() and None)
        end = model.register_forward_hook(lambda *_: runs.append(signature.take()))
        try:
            yield runs
        finally:
            begin.remove()
            end.remove()

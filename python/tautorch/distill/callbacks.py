"""What may listen to a `Distiller`: any object with one or more of these methods, or a plain callable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class OnFit(Protocol):
    """Called once, before the first step of a `fit` (after a checkpoint was loaded)."""

    def on_fit(self, distiller: Any) -> None:
        """`distiller` is the Distiller that runs."""


@runtime_checkable
class OnStep(Protocol):
    """Called after each optimizer step; a plain callable is called the same way."""

    def on_step(self, distiller: Any) -> None:
        """`distiller.global_step` counts the steps done, this one included."""


@runtime_checkable
class OnEpoch(Protocol):
    """Called after each epoch."""

    def on_epoch(self, distiller: Any) -> None:
        """`distiller.history[-1]` is the epoch's record."""


@runtime_checkable
class OnEnd(Protocol):
    """Called once when `fit` is left, by an error too."""

    def on_end(self, distiller: Any) -> None:
        """Close what `on_fit` opened."""


@runtime_checkable
class Stateful(Protocol):
    """Whose state goes into the checkpoint: tensors and plain Python values only."""

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""

    def load_state_dict(self, state: Any) -> Any:
        """Continue from a saved state."""


def states(callbacks: Iterable[Any]) -> list[Any]:
    """What each of them has for a checkpoint, None of those without a state."""
    return [callback.state_dict() if isinstance(callback, Stateful) else None for callback in callbacks]


def load_states(callbacks: Iterable[Any], saved: Iterable[Any]) -> None:
    """Continue from `states`; after the student's weights, as a mask handle applies its masks to them."""
    for callback, state in zip(callbacks, saved, strict=True):
        if isinstance(callback, Stateful) and state is not None:
            callback.load_state_dict(state)

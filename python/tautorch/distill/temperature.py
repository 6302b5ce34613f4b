"""Temperatures that change while the student learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from tautorch.distill.arguments import positive, whole

Kind = Literal["constant", "linear", "cosine"]


class TemperatureSchedule:
    """Moves a loss's `temperature` from `start` to `end` over the training.

    `Distiller(callbacks=[TemperatureSchedule(loss, 8.0, 1.0)])`; in a loop of your own call `step()` after
    each optimizer step. With t the share of the steps done, at most 1:

    - "constant": `start` throughout;
    - "linear": start + (end - start) t;
    - "cosine": end + (start - end) (1 + cos(pi t)) / 2.

    High first and low at last goes from what the teacher finds similar to what it answers, as in Jafari et
    al. 2021, "Annealing Knowledge Distillation", arXiv:2104.07163.

    Args:
        loss: anything with a `temperature`: `SoftTarget`, `Adaptive`, `Mutual`, `PolicyKL`; of a loss that
            wraps others, give the inner one.
        start, end: temperatures > 0; `end` may be left out for "constant".
        kind: see above.
        steps: optimizer steps from `start` to `end`; None takes the Distiller's `total_steps`.

    Step, length and settings are in checkpoints.
    """

    def __init__(
        self,
        loss: Any,
        start: float,
        end: float | None = None,
        *,
        kind: Kind = "linear",
        steps: int | None = None,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(
                f"TemperatureSchedule: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}"
            )
        if not isinstance(getattr(loss, "temperature", None), float):
            raise TypeError(
                f"TemperatureSchedule: loss must have a temperature, got {type(loss).__name__}; of a loss "
                "around others give the inner one"
            )
        self.start = positive("TemperatureSchedule", "start", start)
        if end is None and kind != "constant":
            raise ValueError(f'TemperatureSchedule: end must be given for kind "{kind}", got None')
        self.end = self.start if end is None else positive("TemperatureSchedule", "end", end)
        if steps is not None:
            whole("TemperatureSchedule", "steps", steps)
        self.loss, self.kind, self.steps = loss, kind, steps
        self._asks = steps is None and kind != "constant"
        self.steps_done = 0
        if steps is not None or kind == "constant":
            loss.temperature = self.value()

    def value(self) -> float:
        """The temperature for the step to come."""
        if self.kind == "constant":
            return self.start
        if self.steps is None:
            raise ValueError("TemperatureSchedule: steps must be given outside a Distiller, got None")
        t = min(1.0, self.steps_done / self.steps)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * t
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2

    def step(self) -> float:
        """Count one optimizer step and set the temperature; returns it."""
        self.steps_done += 1
        self.loss.temperature = self.value()
        return float(self.loss.temperature)

    def on_fit(self, distiller: Any) -> None:
        """Take the training's length from the Distiller unless it was given, and set the temperature."""
        self.steps_done = distiller.global_step
        if self._asks and (self.steps is None or self.steps_done == 0):
            if distiller.total_steps is None:
                raise ValueError(
                    "TemperatureSchedule: steps must be given for a loader of unknown length, got None"
                )
            self.steps = distiller.total_steps
        self.loss.temperature = self.value()

    def on_step(self, distiller: Any) -> None:
        """The Distiller's callback after each optimizer step."""
        self.step()

    def state_dict(self) -> dict[str, Any]:
        """Step, length and settings, for a checkpoint."""
        names = ("steps_done", "steps", "start", "end", "kind")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; ValueError, and no change, if it was of another schedule."""
        for name in ("kind", "start", "end"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"TemperatureSchedule: {name} must be {state[name]!r} as at the checkpoint, "
                    f"got {getattr(self, name)!r}"
                )
        self.steps_done, self.steps = state["steps_done"], state["steps"]
        self.loss.temperature = self.value()

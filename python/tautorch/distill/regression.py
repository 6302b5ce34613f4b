"""Distillation of real-valued outputs."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import at_least_single, positive, unit_interval
from tautorch.distill.losses import mix

Distance = Literal["mse", "huber"]


class Regression(nn.Module):
    """L = alpha * d(student, target) + (1 - alpha) * d(student, teacher), d averaged over all elements.

    d is the squared difference ("mse") or Huber's ("huber"): r^2 / 2 up to |r| = delta, then
    delta (|r| - delta / 2), which a few wild outputs of the teacher cannot dominate. For logits this is
    `DirectLogits`.

    Args:
        alpha: weight of the true target, in [0, 1]; 0 needs none.
        distance: "mse" or "huber".
        delta: where Huber's distance becomes linear, > 0, in the outputs' units.

    Outputs and target are floating tensors of one shape. Computed in float32, float64 for float64 outputs.
    """

    def __init__(self, alpha: float = 0.0, *, distance: Distance = "mse", delta: float = 1.0) -> None:
        super().__init__()
        self.alpha = unit_interval("Regression", "alpha", alpha)
        if distance not in get_args(Distance):
            raise ValueError(f'Regression: distance must be "mse" or "huber", got {distance!r}')
        self.distance = distance
        self.delta = positive("Regression", "delta", delta)

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        student = _values("student's output", student_out, None)
        total, self.components = mix(
            self.alpha,
            lambda: self._distance(student, _values("target", target, student)),
            lambda: self._distance(student, _values("teacher's output", teacher_out, student).detach()),
        )
        return total

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        mse = self.distance == "mse"
        mean: Tensor = F.mse_loss(a, b) if mse else F.huber_loss(a, b, delta=self.delta)
        return mean

    def extra_repr(self) -> str:
        """The settings."""
        delta = f", delta={self.delta:g}" if self.distance == "huber" else ""
        return f"alpha={self.alpha:g}, distance={self.distance!r}{delta}"


def _values(what: str, value: Any, like: Tensor | None) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Regression: the {what} must be a floating point tensor, got {got}")
    if like is None and value.numel() == 0:
        raise ValueError(f"Regression: the {what} must hold at least one value, got {list(value.shape)}")
    if like is not None and value.shape != like.shape:
        # [N] against [N, 1] would broadcast to N x N differences.
        raise ValueError(
            f"Regression: the {what} must be {list(like.shape)} like the student's output, "
            f"got {list(value.shape)}"
        )
    wide = at_least_single(value)
    return wide if like is None else wide.to(like.dtype)

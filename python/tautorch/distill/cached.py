"""The loss against a teacher's cached outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import hard_loss, label_rows, one_logits, positive, unit_interval
from tautorch.distill.cache import TeacherCache
from tautorch.distill.losses import divergence, mix


class CachedTarget(nn.Module):
    """`SoftTarget` against a `TeacherCache`: alpha * CE + (1 - alpha) * T^2 * KL, no teacher needed.

    Of a full cache this is SoftTarget's loss, up to the rounding of the stored type. Of a top-k cache the KL
    is that of k + 1 outcomes: the teacher's k best classes and "any other". It is smaller than the full one
    by exactly r * KL(teacher's others || student's others), r the mass the teacher leaves to them: the
    student is told how much goes to the rest, not how it is divided, and is never pushed to give it nothing
    (as it would be by a KL over the renormalised k).

    Args:
        cache: what the entries come from; fixes classes, and T of a top-k cache.
        alpha: weight of the hard labels, in [0, 1]; 0 needs none.
        temperature: T > 0; None is the cache's for a top-k cache (another is a ValueError), 4 for a full one.

    `target` is (labels, entry) as `CachedDataset` and a DataLoader give it, or the entry alone; the teacher's
    output is not used. Rows whose label is -100 are left out.
    """

    def __init__(self, cache: TeacherCache, alpha: float = 0.1, *, temperature: float | None = None) -> None:
        super().__init__()
        self.alpha = unit_interval("CachedTarget", "alpha", alpha)
        if temperature is None:
            temperature = 4.0 if cache.top_k is None else cache.temperature
        self.temperature = positive("CachedTarget", "temperature", temperature)
        if cache.top_k is not None and self.temperature != cache.temperature:
            raise ValueError(
                f"CachedTarget: temperature must be {cache.temperature:g}, that of the top-k cache, got "
                f"{self.temperature:g}; cache again or use a full cache"
            )
        self.top_k, self.classes, self._cached = cache.top_k, cache.classes, cache.temperature

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        if self.top_k is not None and self.temperature != self._cached:
            raise ValueError(
                f"CachedTarget: temperature must stay {self._cached:g}, that of the top-k cache, got "
                f"{self.temperature:g}; a TemperatureSchedule needs a full cache"
            )
        labels, entry = target if isinstance(target, (tuple, list)) and len(target) == 2 else (None, target)
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"CachedTarget: target must be (labels, entry) or an entry of the cache, got "
                f"{type(target).__name__}; use CachedDataset"
            )
        student = one_logits("CachedTarget", "student", student_out)
        if student.shape[1] != self.classes:
            raise ValueError(
                f"CachedTarget: the student must have the cache's {self.classes} classes, got "
                f"{list(student_out.shape)}"
            )
        rows = {name: self._rows(entry, name, student_out) for name in self._names()}
        hard: Any = None
        if labels is not None:
            hard, kept = label_rows("CachedTarget", labels, *student.shape)
            if kept is not None:
                student, rows = student[kept], {name: tensor[kept] for name, tensor in rows.items()}
        elif self.alpha > 0:
            raise ValueError(
                f"CachedTarget: target must hold labels with alpha={self.alpha:g}, got the entry alone; or "
                "use alpha=0"
            )
        factor = self.temperature**2
        total, self.components = mix(
            self.alpha, lambda: hard_loss(student, hard), lambda: factor * self._kl(student, rows).mean()
        )
        return total

    def _names(self) -> list[str]:
        return ["log_probs"] if self.top_k is None else ["log_probs", "indices", "log_rest"]

    def _rows(self, entry: Mapping[str, Tensor], name: str, student_out: Tensor) -> Tensor:
        tail = [] if name == "log_rest" else [self.classes if self.top_k is None else self.top_k]
        want = [*student_out.shape[:-1], *tail]
        got = list(entry[name].shape) if name in entry else "nothing"
        if got != want:
            raise ValueError(f"CachedTarget: the entry's {name} must be {want} like the logits, got {got}")
        tensor = entry[name].reshape(-1, *tail)
        return (
            tensor if name == "indices" else tensor.to(torch.promote_types(student_out.dtype, torch.float32))
        )

    def _kl(self, student: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """KL of each row at the temperature, before T^2."""
        log_s = F.log_softmax(student / self.temperature, -1)
        if self.top_k is None:
            log_q = F.log_softmax(rows["log_probs"] / self.temperature, -1)
        else:
            log_q, top = rows["log_probs"], rows["indices"]
            picked = log_s.gather(1, top)
            if self.top_k < self.classes:
                rest = log_s.scatter(1, top, float("-inf")).logsumexp(-1, keepdim=True)
                picked = torch.cat([picked, rest], 1)
                log_q = torch.cat([log_q, rows["log_rest"][:, None]], 1)
            log_s = picked
            # The stored values are rounded: they sum to one again afterwards.
            log_q = log_q - log_q.logsumexp(-1, keepdim=True)
        return divergence(log_q, log_s)

    def extra_repr(self) -> str:
        """The settings."""
        return f"temperature={self.temperature:g}, alpha={self.alpha:g}, top_k={self.top_k}"

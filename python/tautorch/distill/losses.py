"""Distillation losses on logits: `loss(student_out, teacher_out, target) -> scalar tensor`.

Logits are [..., C] with the classes last; every leading position counts alike, as one row of a batch.
`target` is int64 [...] (positions equal to -100 are left out of both terms), probabilities [..., C], or
None where the loss does not use it (alpha = 0). Computed in float32, float64 for float64 logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import hard_loss, label_rows, logit_rows, positive, unit_interval


class Loss(Protocol):
    """What `Distiller` minimises: a callable of this form, an `nn.Module` if it has weights of its own."""

    def __call__(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The scalar loss of one batch."""


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of each row of [rows, C] logits, both softened by T."""
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return divergence(log_q, log_p) * temperature**2


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) of each row. What q rules out costs nothing, also where both logits are minus infinity."""
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)


def mix(
    alpha: float, hard: Callable[[], Tensor], soft: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(alpha * hard + (1 - alpha) * soft, the two by name for `Distiller` to show), each if it counts."""
    weights = {name: weight for name, weight in (("hard", alpha), ("soft", 1 - alpha)) if weight > 0}
    terms = {name: (hard if name == "hard" else soft)() for name in weights}
    total = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
    return total, {name: term.detach() for name, term in terms.items()}


class Mixed(nn.Module):
    """alpha * cross entropy with the target + (1 - alpha) * a loss between the two logits."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = unit_interval(type(self).__name__, "alpha", alpha)

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The mixed loss of one batch, a scalar; ValueError/TypeError when the shapes do not match."""
        name = type(self).__name__
        student, teacher = logit_rows(name, student_out, teacher_out)
        if target is not None:
            target, kept = label_rows(name, target, *student.shape)
            if kept is not None:
                student, teacher = student[kept], teacher[kept]
        elif self.alpha > 0:
            raise ValueError(
                f"{name}: target must be given with alpha={self.alpha:g}, got None; or use alpha=0"
            )
        total, self.components = mix(
            self.alpha, lambda: hard_loss(student, target), lambda: self.distance(student, teacher)
        )
        return total

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss between logits [rows, C], before the weight (1 - alpha)."""
        raise NotImplementedError


class SoftTarget(Mixed):
    """L = alpha * CE(student, target) + (1 - alpha) * T^2 * KL(teacher || student), both softened by T.

    The KL divergence is summed over classes, averaged over rows. Hinton, Vinyals & Dean 2015, "Distilling
    the Knowledge in a Neural Network", arXiv:1503.02531.

    Args:
        temperature: T > 0; 1 gives plain soft labels, the teacher's own distribution; 2 to 8 show what it
            finds similar.
        alpha: weight of the hard labels, in [0, 1]; 0 needs none.
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 0.1) -> None:
        super().__init__(alpha)
        self.temperature = positive("SoftTarget", "temperature", temperature)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 * KL(teacher || student) of [rows, C] logits, mean over rows."""
        return kl_rows(student, teacher, self.temperature).mean()

    def extra_repr(self) -> str:
        """The two settings."""
        return f"temperature={self.temperature:g}, alpha={self.alpha:g}"


class HardLabel(Mixed):
    """L = alpha * CE(student, target) + (1 - alpha) * CE(student, argmax of the teacher).

    The teacher as a labeller (Lee 2013, "Pseudo-Label", ICML workshop; "hard-label distillation" in Touvron
    et al. 2021, DeiT, arXiv:2012.12877).
    """

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__(alpha)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Cross entropy of [rows, C] student logits with the teacher's best class."""
        return F.cross_entropy(student, teacher.argmax(dim=-1))

    def extra_repr(self) -> str:
        """The setting."""
        return f"alpha={self.alpha:g}"


class DirectLogits(Mixed):
    """L = alpha * CE(student, target) + (1 - alpha) * mean (student - teacher)^2 over rows and classes.

    Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184.
    """

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__(alpha)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared difference of [rows, C] logits."""
        return F.mse_loss(student, teacher)

    def extra_repr(self) -> str:
        """The setting."""
        return f"alpha={self.alpha:g}"

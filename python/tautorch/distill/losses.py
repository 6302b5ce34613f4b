"""Distillation losses on logits: `loss(student_out, teacher_out, target) -> scalar tensor`.

Logits are [..., C] with the classes last; every leading position counts alike, as one row of a batch.
`target` is int64 [...] (positions equal to -100 are left out of both terms), probabilities [..., C], or
None where the loss does not use it (alpha = 0). Computed in float32, float64 for float64 logits.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100


class Loss(Protocol):
    """What `Distiller` minimises: a callable of this form, an `nn.Module` if it has weights of its own."""

    def __call__(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The scalar loss of one batch."""


class _Mixed(nn.Module):
    """alpha * cross entropy with the target + (1 - alpha) * a loss between the two logits."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = _in_unit_interval(type(self).__name__, "alpha", alpha)

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The mixed loss of one batch, a scalar; ValueError/TypeError when the shapes do not match."""
        name = type(self).__name__
        student, teacher = _logits(name, student_out, teacher_out)
        if target is not None:
            student, teacher, target = _rows(name, student, teacher, target)
        elif self.alpha > 0:
            raise ValueError(
                f"{name}: target must be given with alpha={self.alpha:g}, got None; or use alpha=0"
            )
        total = student.new_zeros(())
        if self.alpha > 0:
            total = total + self.alpha * F.cross_entropy(student, target)
        if self.alpha < 1:
            total = total + (1 - self.alpha) * self.distance(student, teacher)
        return total

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss between logits [rows, C], before the weight (1 - alpha)."""
        raise NotImplementedError


class SoftTarget(_Mixed):
    """L = alpha * CE(student, target) + (1 - alpha) * T^2 * KL(teacher || student), both softened by T.

    The KL divergence is summed over classes, averaged over rows. Hinton, Vinyals & Dean 2015, "Distilling
    the Knowledge in a Neural Network", arXiv:1503.02531.

    Args:
        temperature: T > 0; 1 is the teacher's own distribution, 2 to 8 show what it finds similar.
        alpha: weight of the hard labels, in [0, 1]; 0 needs none.
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 0.1) -> None:
        super().__init__(alpha)
        if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"SoftTarget: temperature must be a finite number > 0, got {temperature!r}")
        self.temperature = float(temperature)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 * KL(teacher || student) of [rows, C] logits, mean over rows."""
        log_p = F.log_softmax(student / self.temperature, dim=-1)
        log_q = F.log_softmax(teacher / self.temperature, dim=-1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * self.temperature**2

    def extra_repr(self) -> str:
        """The two settings."""
        return f"temperature={self.temperature:g}, alpha={self.alpha:g}"


class HardLabel(_Mixed):
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


class DirectLogits(_Mixed):
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


def _in_unit_interval(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be a number in [0, 1], got {value!r}")
    return float(value)


def _logits(op: str, student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    for name, value in (("student", student), ("teacher", teacher)):
        if value is None:
            raise TypeError(f"{op}: the {name} must give logits, got None; give Distiller a {name}")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{op}: the {name}'s output must be a tensor of logits, got {type(value).__name__}; "
                "give Distiller(output=lambda out: out.logits) or the like"
            )
        if not value.is_floating_point() or value.dim() < 2:
            got = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"{op}: the {name}'s logits must be floating point [..., C], got {got}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"{op}: student and teacher must give logits of one shape, got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    if student.numel() == 0:
        raise ValueError(f"{op}: logits must hold at least one row, got {list(student.shape)}")
    classes = student.shape[-1]
    student, teacher = student.reshape(-1, classes), teacher.detach().reshape(-1, classes)
    # Half precision has too few digits for exp and log of probabilities.
    kind = torch.promote_types(student.dtype, torch.float32)
    return student.to(kind), teacher.to(kind)


def _rows(op: str, student: Tensor, teacher: Tensor, target: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten the target to rows like the logits, and drop the rows it marks as ignored."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    rows, classes = student.shape
    if target.is_floating_point():
        if target.shape[-1:] != (classes,) or target.numel() != student.numel():
            raise ValueError(
                f"{op}: target probabilities must be like the logits [{rows} rows, {classes}], "
                f"got {list(target.shape)}"
            )
        return student, teacher, target.reshape(rows, classes).to(student.dtype)
    if target.dtype != torch.int64 or target.numel() != rows:
        raise ValueError(
            f"{op}: target must be int64 with one class for each of {rows} rows, "
            f"got {target.dtype} {list(target.shape)}"
        )
    labels = target.reshape(rows)
    kept = labels != IGNORED
    valid = labels[kept]
    if valid.numel() == 0:
        raise ValueError(f"{op}: target must name a class in at least one row, got {IGNORED} in all {rows}")
    if int(valid.min()) < 0 or int(valid.max()) >= classes:
        raise ValueError(
            f"{op}: target classes must be in [0, {classes}), got {int(valid.min())} to {int(valid.max())}"
        )
    if valid.numel() == rows:
        return student, teacher, labels
    return student[kept], teacher[kept], valid

"""Weights of the loss's terms that follow the sample, or are learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import hard_loss, label_rows, logit_rows, positive, whole
from tautorch.distill.features import attached_all
from tautorch.distill.losses import Loss, kl_rows

Trust = Literal["target", "correct", "confidence", "entropy"]


class Adaptive(nn.Module):
    """L = mean over samples of w * T^2 KL(teacher || student) + (1 - w) * CE(student, target).

    A sample's weight w in [0, 1] says how far the teacher is believed there, from its own softmax p at
    temperature 1, C classes:

    - "target": p of the true class;
    - "correct": 1 where the teacher is right, else 0 (Meng et al. 2019, "Conditional Teacher-Student
      Learning", arXiv:1904.12399);
    - "confidence": its largest p;
    - "entropy": 1 - entropy(p) / log C.

    The first two look at the labels and so never pass on the teacher's mistakes; the last two believe a
    teacher that is sure and wrong.

    Args:
        trust: which of them.
        temperature: T > 0 of the soft term.

    Logits are [..., C]; `target` is int64 [...], -100 to leave a position out.
    """

    def __init__(self, trust: Trust = "target", *, temperature: float = 4.0) -> None:
        super().__init__()
        if trust not in get_args(Trust):
            raise ValueError(f"Adaptive: trust must be one of {', '.join(get_args(Trust))}, got {trust!r}")
        self.trust = trust
        self.temperature = positive("Adaptive", "temperature", temperature)

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        student, teacher = logit_rows("Adaptive", student_out, teacher_out)
        labels, kept = label_rows("Adaptive", target, *student.shape)
        if labels.is_floating_point():
            raise ValueError(f"Adaptive: target must be int64 classes, got {labels.dtype} probabilities")
        if kept is not None:
            student, teacher = student[kept], teacher[kept]
        w = self.weights(teacher, labels)
        soft = kl_rows(student, teacher, self.temperature)
        return (w * soft + (1 - w) * hard_loss(student, labels, "none")).mean()

    def weights(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """w [rows] of the teacher's logits [rows, C] and the labels [rows]."""
        log_p = F.log_softmax(teacher, -1)
        if self.trust == "target":
            return log_p.gather(1, labels[:, None]).squeeze(1).exp()
        if self.trust == "correct":
            return (teacher.argmax(-1) == labels).to(teacher.dtype)
        if self.trust == "confidence":
            return log_p.amax(-1).exp()
        p = log_p.exp()
        entropy: Tensor = -torch.special.xlogy(p, p).sum(-1)
        return 1 - entropy / math.log(max(teacher.shape[1], 2))

    def extra_repr(self) -> str:
        """The settings."""
        return f"trust={self.trust!r}, temperature={self.temperature:g}"


class LogVariances(nn.Module):
    """Learned weights: the sum over terms L_i of exp(-s_i) L_i + s_i / 2, s_i = log sigma_i^2, first 0.

    Kendall, Gal & Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", arXiv:1705.07115
    (their form for cross entropies). At its best s_i, a term's weight is 1 / (2 L_i): terms must stay above
    0, and the sum may well be negative. The parameters must be in the optimizer, without weight decay.
    """

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(whole("LogVariances", "terms", terms)))

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        """The weighted sum of scalar terms."""
        s = self.log_variances
        return (torch.exp(-s) * torch.stack(list(terms))).sum() + s.sum() / 2


class Uncertainty(nn.Module):
    """Several losses on the same outputs, weighted by learned uncertainties: see `LogVariances`.

    `Uncertainty(SoftTarget(alpha=0), HardLabel(alpha=1), SpatialAttention({...}))`. Give the optimizer
    `[*student.parameters(), *loss.parameters()]`, which `Distiller` checks; keep them free of weight decay.
    For losses on different heads use `MultiTask(losses, weights="uncertainty")`.
    """

    def __init__(self, *losses: Loss) -> None:
        super().__init__()
        if len(losses) < 2 or not all(callable(loss) for loss in losses):
            raise ValueError(f"Uncertainty: losses must be two or more callables, got {losses!r}")
        self.losses = list(losses)
        self.loss_modules = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))
        self.weigh = LogVariances(len(losses))

    @contextmanager
    def attached(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """Attach the losses that look into the models."""
        with attached_all(self.losses, teacher, student):
            yield

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The weighted loss of one batch, a scalar."""
        terms = [loss(student_out, teacher_out, target) for loss in self.losses]
        self.components = {
            f"{k}_{type(loss).__name__}": term.detach()
            for k, (loss, term) in enumerate(zip(self.losses, terms, strict=True))
        }
        found: Tensor = self.weigh(terms)
        return found

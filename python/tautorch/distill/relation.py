"""Distillation of how the samples of a batch relate to one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import at_least_single, positive
from tautorch.distill.features import Features, attached_all, on_top
from tautorch.distill.losses import Loss

Kind = Literal["distance", "angle", "similarity"]


class Relation(nn.Module):
    """L = base(student, teacher, target) + weight * d(relations in the student, relations in the teacher).

    Relations need no common width or meaning of single channels, so no adapter. For a batch of B samples,
    whose features are flattened to rows x_i:

    - "distance": |x_i - x_j| over the mean of those above 0; Huber's distance, mean over pairs i != j.
    - "angle": cosine of the angle at x_j between x_i and x_k; Huber's distance, mean over all B^3 triples,
      as in the paper's own code. Both: Park et al. 2019, "Relational Knowledge Distillation",
      arXiv:1904.05068 (weights 25 and 50 there).
    - "similarity": the rows of X X^T, each divided by its l2 norm; sum of squared differences over B^2.
      Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682.

    Args:
        kind: see above; to have two, nest one as the other's base.
        student_layer, teacher_layer: qualified names of the modules whose tensor outputs [B, ...] are taken;
            both None takes the models' outputs.
        base: the loss on the outputs; None for the relations alone.
        weight: of the relation term, > 0.

    With layers, `Distiller` attaches it; in a loop of your own use `with loss.attached(teacher, student):`.
    Raises ValueError for features of less than two samples (three for "angle").
    """

    def __init__(
        self,
        kind: Kind = "distance",
        *,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        base: Loss | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"Relation: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if (student_layer is None) != (teacher_layer is None):
            raise ValueError(
                "Relation: student_layer and teacher_layer must be given together, got "
                f"{student_layer!r} and {teacher_layer!r}"
            )
        self.kind, self.base = kind, base
        self.weight = positive("Relation", "weight", weight)
        self._features: Features | None = None
        if student_layer is not None and teacher_layer is not None:
            self._features = Features("Relation", [(student_layer, teacher_layer)])

    @contextmanager
    def attached(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """While open, remember the features of each forward pass; ValueError for an unknown layer."""
        watch = nullcontext() if self._features is None else self._features.watching(teacher, student)
        with watch, attached_all([self.base], teacher, student):
            yield

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        mine, theirs = student_out, teacher_out
        if self._features is not None:
            ((mine, theirs),) = self._features.take()
        mine = _rows("student", mine)
        theirs = _rows("teacher", theirs).detach().to(mine.dtype)
        least = 3 if self.kind == "angle" else 2
        if len(mine) != len(theirs) or len(mine) < least:
            raise ValueError(
                f"Relation: a batch must have at least {least} samples, the same for both, got {len(mine)} "
                f"from the student and {len(theirs)} from the teacher"
            )
        with torch.autocast(mine.device.type, enabled=False):
            total = self.weight * _DISTANCES[self.kind](mine, theirs)
        outputs = student_out, teacher_out, target
        total, self.components = on_top("relation", total, self.base, outputs)
        return total

    def extra_repr(self) -> str:
        """The settings."""
        return f"kind={self.kind!r}, weight={self.weight:g}"


def _rows(who: str, feature: Any) -> Tensor:
    if not isinstance(feature, Tensor) or not feature.is_floating_point() or feature.dim() < 2:
        got = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise TypeError(f"Relation: the {who}'s feature must be a float tensor [B, ...], got {got}")
    return at_least_single(feature).flatten(1)


def _distances(x: Tensor) -> Tensor:
    """[B, B] over the mean of those above 0; without the Gram matrix, which loses small distances."""
    found = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return found / (found.sum() / (found > 0).sum().clamp_min(1)).clamp_min(1e-12)


def _cosines(x: Tensor) -> Tensor:
    """[j, i, k]: the cosine of the angle at x_j between x_i and x_k; 0 and no gradient for equal samples."""
    between = x[None] - x[:, None]
    length = between.norm(dim=-1, keepdim=True)
    directions = torch.where(length > 0, between / length.clamp_min(1e-12), 0.0)
    return directions @ directions.transpose(1, 2)


def _distance(mine: Tensor, theirs: Tensor) -> Tensor:
    pairs = ~torch.eye(len(mine), dtype=torch.bool, device=mine.device)
    found: Tensor = F.huber_loss(_distances(mine)[pairs], _distances(theirs)[pairs])
    return found


def _angle(mine: Tensor, theirs: Tensor) -> Tensor:
    found: Tensor = F.huber_loss(_cosines(mine), _cosines(theirs))
    return found


def _similarity(mine: Tensor, theirs: Tensor) -> Tensor:
    a, b = (F.normalize(x @ x.T) for x in (mine, theirs))
    return (a - b).square().sum() / len(mine) ** 2


_DISTANCES = {"distance": _distance, "angle": _angle, "similarity": _similarity}

"""Token by token distillation of decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tautorch.distill.arguments import IGNORED
from tautorch.distill.features import attached_all
from tautorch.distill.losses import Loss


class TokenLevel(nn.Module):
    """A loss on logits at every position of a sequence: base(student_out, teacher_out, target), shifted.

    The logits at position t predict token t + 1, so with `shift` the labels move one to the left and the last
    position is dropped; positions whose label is `ignore_index` (padding, the prompt) count in neither term,
    and the loss is the mean over those that do. With the student's and teacher's vocabularies the same this
    is the word-level distillation of Kim & Rush 2016, "Sequence-Level Knowledge Distillation",
    arXiv:1606.07947; for their sequence-level one, train on what the teacher generates, with
    `HardLabel(alpha=1)`.

    Args:
        base: a loss on [..., C] logits: `SoftTarget`, `HardLabel`, `Adaptive`, `CachedTarget`, ...
        shift: False where the labels are shifted already.
        ignore_index: of the labels; -100 always is ignored too.

    Logits are [B, L, C], `target` is int64 [B, L], for `CachedTarget` a pair of it and the cached entry.
    Without labels (None) every position counts and nothing is shifted.
    """

    def __init__(self, base: Loss, *, shift: bool = True, ignore_index: int = IGNORED) -> None:
        super().__init__()
        if not callable(base):
            raise TypeError(f"TokenLevel: base must be a loss, got {type(base).__name__}")
        self.base, self.shift, self.ignore_index = base, bool(shift), ignore_index

    @property
    def components(self) -> Mapping[str, Any]:
        """What the base reports of the last batch."""
        return getattr(self.base, "components", {})

    @contextmanager
    def attached(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """Attach the base if it looks into the models."""
        with attached_all([self.base], teacher, student):
            yield

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        labels, entry = target if isinstance(target, (tuple, list)) and len(target) == 2 else (target, None)
        if isinstance(labels, Mapping):
            labels, entry = None, labels
        if labels is None:
            return self.base(student_out, teacher_out, target)
        for who, logits in (("student", student_out), ("teacher", teacher_out)):
            if isinstance(logits, Tensor) and logits.dim() != 3:
                raise ValueError(
                    f"TokenLevel: the {who}'s logits must be [B, L, C], got {list(logits.shape)}"
                )
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 2:
            got = (
                f"{labels.dtype} {list(labels.shape)}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            raise TypeError(f"TokenLevel: target must be int64 [B, L], got {got}")
        if self.ignore_index != IGNORED:
            labels = labels.masked_fill(labels == self.ignore_index, IGNORED)
        if self.shift:
            if labels.shape[1] < 2:
                raise ValueError(f"TokenLevel: shift needs two tokens or more, got {list(labels.shape)}")
            labels = labels[:, 1:]
            student_out, teacher_out, entry = (_but_last(item) for item in (student_out, teacher_out, entry))
        return self.base(student_out, teacher_out, labels if entry is None else (labels, entry))

    def extra_repr(self) -> str:
        """The settings."""
        return f"shift={self.shift}, ignore_index={self.ignore_index}"


def _but_last(item: Any) -> Any:
    """Without the last position of [B, L, ...], in a mapping too."""
    if isinstance(item, Mapping):
        return {key: _but_last(value) for key, value in item.items()}
    return item[:, :-1] if isinstance(item, Tensor) else item

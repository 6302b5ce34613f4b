"""Mutual learning: students that teach one another, without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tautorch.distill.arguments import hard_loss, label_rows, logit_rows, one_logits, positive, unit_interval
from tautorch.distill.losses import kl_rows


class Peers(nn.Module):
    """K students in one module: the same inputs to each, a tuple of K outputs back.

    Each gets copies of the inputs, which it may change in place.

    Train it with `Distiller(None, peers, Mutual(), optimizer)`: one optimizer over all of them, and their
    checkpoints, exact resume and DDP are the Distiller's. `peers[k]` is the k-th student, `len(peers)` is K.

    Args:
        students: at least two different modules; they may differ in architecture. ValueError otherwise, and
            for students that share parameters.
        output: what to take of each student's output, e.g. `lambda out: out.logits`.
    """

    def __init__(self, students: Iterable[nn.Module], *, output: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        models = list(students)
        for model in models:
            if not isinstance(model, nn.Module):
                raise TypeError(f"Peers: students must be nn.Modules, got {type(model).__name__}")
        if len(models) < 2:
            raise ValueError(f"Peers: students must be two or more, got {len(models)}")
        owners = [id(tensor) for model in models for tensor in {*model.parameters(), *model.buffers()}]
        if len(set(map(id, models))) < len(models) or len(set(owners)) < len(owners):
            raise ValueError("Peers: students must share no parameters, got one twice; use copy.deepcopy")
        self.students = nn.ModuleList(models)
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Each student's output."""
        outputs = (_on_copies(student, args, kwargs) for student in self.students)
        return tuple(outputs if self.output is None else map(self.output, outputs))

    def __len__(self) -> int:
        return len(self.students)

    def __getitem__(self, index: int) -> nn.Module:
        return self.students[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.students)


def _on_copies(student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    return student(*args, **kwargs)


class Mutual(nn.Module):
    """L = sum over k of alpha * CE(z_k, target) + (1 - alpha) * mean over j != k of T^2 KL(p_j || p_k).

    p_j is student j's softmax at temperature T, taken from this very batch and held constant, so every target
    is renewed at every step. Zhang et al. 2018, "Deep Mutual Learning", arXiv:1706.00384: alpha 0.5 and T 1
    are half the paper's loss. The paper updates one student after the other, each from the others' newest
    outputs; here all K step at once from one forward pass each, which costs K forward passes a step instead
    of up to K^2, and lets one optimizer, one checkpoint and DDP serve them all.

    Args:
        alpha: weight of the hard labels, in [0, 1]; 0 needs none.
        temperature: T > 0.

    The student's output is a tuple of K logits [..., C] of one shape, as `Peers` gives; the teacher's is not
    used. Rows whose int64 target is -100 are left out of both terms.
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.alpha = unit_interval("Mutual", "alpha", alpha)
        self.temperature = positive("Mutual", "temperature", temperature)

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of all students on one batch, a scalar."""
        logits = self._rows(student_out)
        if target is not None:
            target, kept = label_rows("Mutual", target, *logits[0].shape)
            if kept is not None:
                logits = [rows[kept] for rows in logits]
        elif self.alpha > 0:
            raise ValueError(
                f"Mutual: target must be given with alpha={self.alpha:g}, got None; or use alpha=0"
            )
        total = logits[0].new_zeros(())
        for k, mine in enumerate(logits):
            if self.alpha > 0:
                total = total + self.alpha * hard_loss(mine, target)
            if self.alpha < 1:
                others = [theirs.detach() for j, theirs in enumerate(logits) if j != k]
                terms = [kl_rows(mine, theirs, self.temperature).mean() for theirs in others]
                total = total + (1 - self.alpha) * torch.stack(terms).mean()
        return total

    def _rows(self, outputs: Any) -> list[Tensor]:
        if not isinstance(outputs, (tuple, list)) or len(outputs) < 2:
            got = f"{len(outputs)} of them" if isinstance(outputs, (tuple, list)) else type(outputs).__name__
            raise TypeError(
                f"Mutual: the outputs must be a tuple of two or more logits, got {got}; use Peers"
            )
        for other in outputs[1:]:
            logit_rows("Mutual", outputs[0], other)
        return [one_logits("Mutual", "student", output) for output in outputs]

    def extra_repr(self) -> str:
        """The two settings."""
        return f"alpha={self.alpha:g}, temperature={self.temperature:g}"

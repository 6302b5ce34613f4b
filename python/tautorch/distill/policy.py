"""Losses between the outputs of two policies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import at_least_single, logit_rows, positive
from tautorch.distill.losses import divergence


class PolicyKL(nn.Module):
    """L = KL(softmax(teacher / T) || softmax(student)), summed over actions, averaged over the batch.

    For discrete actions. The teacher alone is divided by T. Logits of a policy want T = 1; the Q-values of a
    DQN differ little between actions and want T = 0.01 to become a sharp policy: Rusu et al. 2016, "Policy
    Distillation", arXiv:1511.06295. The target is not used.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive("PolicyKL", "temperature", temperature)

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of [..., actions] outputs, a scalar."""
        student, teacher = logit_rows("PolicyKL", student_out, teacher_out)
        log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher / self.temperature, -1)
        return divergence(log_q, log_p).mean()

    def extra_repr(self) -> str:
        """The setting."""
        return f"temperature={self.temperature:g}"


class GaussianKL(nn.Module):
    """L = KL(N(teacher) || N(student)) of diagonal Gaussians, summed over actions, averaged over the batch.

    For continuous actions. Each output is (mean, log standard deviation), [..., D] both, the second may
    broadcast to the first (one parameter for all states). The target is not used. To match means alone use
    `Regression` with `output=lambda out: out[0]`.
    """

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        mean, log_std = _gaussian("student", student_out)
        their_mean, their_log_std = (item.detach() for item in _gaussian("teacher", teacher_out))
        if mean.shape != their_mean.shape:
            raise ValueError(
                f"GaussianKL: student and teacher must give means of one shape, got {list(mean.shape)} and "
                f"{list(their_mean.shape)}"
            )
        ratio = torch.exp(2 * (their_log_std - log_std))
        distance = ((their_mean - mean) * torch.exp(-log_std)).square()
        rows = log_std - their_log_std + 0.5 * (ratio + distance - 1)
        return rows.sum(-1).mean()


def _gaussian(who: str, output: Any) -> tuple[Tensor, Tensor]:
    pair = isinstance(output, (tuple, list)) and len(output) == 2
    if not pair or not all(isinstance(item, Tensor) and item.is_floating_point() for item in output):
        got = f"{len(output)} items" if isinstance(output, (tuple, list)) else type(output).__name__
        raise TypeError(f"GaussianKL: the {who} must give (mean, log_std), two float tensors, got {got}")
    mean, log_std = output
    if mean.dim() < 1 or mean.numel() == 0 or not _broadcasts(log_std.shape, mean.shape):
        raise ValueError(
            f"GaussianKL: the {who}'s log_std must broadcast to its mean [..., D], got {list(log_std.shape)} "
            f"and {list(mean.shape)}"
        )
    return at_least_single(mean), at_least_single(log_std).expand(mean.shape)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))

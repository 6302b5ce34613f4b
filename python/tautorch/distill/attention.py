"""Distillation of where the teacher looks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import at_least_single, positive
from tautorch.distill.attention_maps import HIDDEN, AttentionMaps
from tautorch.distill.features import Features, attached_all, layer_pairs, on_top
from tautorch.distill.losses import Loss

Layers = Mapping[str, str] | Sequence[tuple[str, str]]


class AttentionTransfer(nn.Module):
    """L = base + weight * sum over layer pairs of d(teacher's attention, student's attention).

    The attention weights of transformers, as `softmax(Q K^T / sqrt(d) + mask)` before dropout. They are
    recomputed in Python where a fused kernel hides them (`F.scaled_dot_product_attention` with any mask,
    causal, scale or grouped queries; `nn.MultiheadAttention` on any path), differentiably for the student.
    Jiao et al. 2020, "TinyBERT", arXiv:1909.10351 (squared differences, there of the scores before the
    softmax); Wang et al. 2020, "MiniLM", arXiv:2002.10957 (KL).

    Args:
        layers: (student's, teacher's) qualified names of the modules around one attention each, as a dict or
            a list of pairs.
        distance: "kl", KL(teacher || student) of each query's weights, averaged over heads, queries and batch
            without those that attend to nothing; or "mse", averaged over all weights.
        heads: "mean" compares the averages over heads, which may differ in number; "each" head k with head k.
        base: the loss on the outputs; None for the attention alone.
        weight: of the attention term, > 0.

    `Distiller` attaches it; in a loop of your own use `with loss.attached(teacher, student):` around it.
    Raises ValueError where the modules, heads, or lengths do not match, or where the student's mask hides
    what the teacher looks at ("kl").
    """

    def __init__(
        self,
        layers: Layers,
        *,
        distance: Literal["kl", "mse"] = "kl",
        heads: Literal["mean", "each"] = "mean",
        base: Loss | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if distance not in ("kl", "mse"):
            raise ValueError(f'AttentionTransfer: distance must be "kl" or "mse", got {distance!r}')
        if heads not in ("mean", "each"):
            raise ValueError(f'AttentionTransfer: heads must be "mean" or "each", got {heads!r}')
        self.distance, self.heads, self.base = distance, heads, base
        self.weight = positive("AttentionTransfer", "weight", weight)
        self._maps = AttentionMaps("AttentionTransfer", layer_pairs("AttentionTransfer", layers))

    @contextmanager
    def attached(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """While open, remember the weights of each forward pass; ValueError for an unknown layer."""
        with self._maps.watching(teacher, student), attached_all([self.base], teacher, student):
            yield

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of the batch that both models have just seen, a scalar."""
        terms = [self._term(mine, theirs) for mine, theirs in self._maps.take()]
        total = self.weight * torch.stack(terms).sum()
        outputs = student_out, teacher_out, target
        total, self.components = on_top("attention", total, self.base, outputs)
        return total

    def _term(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.heads == "mean":
            student, teacher = _mean_heads(student), _mean_heads(teacher)
        if student.shape != teacher.shape:
            raise ValueError(
                "AttentionTransfer: weights must have one shape [batch, heads, queries, keys], got "
                f"{list(student.shape)} from the student and {list(teacher.shape)} from the teacher"
                + ("" if student.shape[2:] != teacher.shape[2:] else '; use heads="mean"')
            )
        teacher = teacher.to(student.dtype)
        p = teacher.exp()
        if self.distance == "mse":
            return F.mse_loss(student.exp(), p)
        if bool(((p > 0) & (student <= HIDDEN / 2)).any()):
            raise ValueError(
                "AttentionTransfer: the student's mask must show what the teacher attends to, got hidden "
                'positions; give both models one mask, or use distance="mse"'
            )
        rows = (p * (teacher - student)).sum(-1)
        return rows.sum() / (p.sum(-1) > 0).sum().clamp_min(1)

    def extra_repr(self) -> str:
        """The settings."""
        return f"distance={self.distance!r}, heads={self.heads!r}, weight={self.weight:g}"


def _mean_heads(log_weights: Tensor) -> Tensor:
    """The logarithm of the mean over heads, exact where single heads underflow."""
    return torch.logsumexp(log_weights, 1, keepdim=True) - math.log(log_weights.shape[1])


class SpatialAttention(nn.Module):
    """L = base + weight / 2 * sum over layer pairs of ||q_student - q_teacher||^2, averaged over the batch.

    q is a convolution's activation-based attention map, the sum over channels of the squared feature,
    flattened and divided by its l2 norm. Zagoruyko & Komodakis 2017, "Paying More Attention to Attention",
    arXiv:1612.03928, who weigh it with 1000 / (H W).

    Args:
        layers: (student's, teacher's) qualified names of modules that give [B, C, H, W]; channels may differ,
            and the larger map is averaged down to the size of the smaller.
        base, weight: as in `AttentionTransfer`.
    """

    def __init__(self, layers: Layers, *, base: Loss | None = None, weight: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.weight = positive("SpatialAttention", "weight", weight)
        self._features = Features("SpatialAttention", layer_pairs("SpatialAttention", layers))

    @contextmanager
    def attached(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """While open, remember the features of each forward pass; ValueError for an unknown layer."""
        with self._features.watching(teacher, student), attached_all([self.base], teacher, student):
            yield

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of the batch that both models have just seen, a scalar."""
        terms = [_map_distance(mine, theirs) for mine, theirs in self._features.take()]
        total = self.weight / 2 * torch.stack(terms).sum()
        outputs = student_out, teacher_out, target
        total, self.components = on_top("attention", total, self.base, outputs)
        return total

    def extra_repr(self) -> str:
        """The setting."""
        return f"weight={self.weight:g}"


def _map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    for who, feature in (("student", student), ("teacher", teacher)):
        if feature.dim() != 4:
            raise ValueError(
                f"SpatialAttention: the {who}'s feature must be [B, C, H, W], got {list(feature.shape)}"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"SpatialAttention: features must be of one batch, got {student.shape[0]} rows from the student "
            f"and {teacher.shape[0]} from the teacher"
        )
    maps = [at_least_single(feature).square().mean(1, keepdim=True) for feature in (student, teacher)]
    height, width = (min(a, b) for a, b in zip(maps[0].shape[2:], maps[1].shape[2:], strict=True))
    mine, theirs = (F.normalize(F.adaptive_avg_pool2d(q, (height, width)).flatten(1)) for q in maps)
    return (mine - theirs).square().sum(-1).mean()

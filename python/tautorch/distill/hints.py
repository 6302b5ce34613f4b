"""Distillation from inner features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill.arguments import at_least_single, positive, whole
from tautorch.distill.features import Features, attached_all, on_top
from tautorch.distill.losses import Loss


class ChannelAdapter(nn.Module):
    """A learned linear map of channels: dim 1 of [B, C, H, W] features, the last of any others.

    `weight` is [out, in], `bias` [out], initialised as `nn.Linear`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        whole("ChannelAdapter", "in_channels", in_channels)
        whole("ChannelAdapter", "out_channels", out_channels)
        linear = nn.Linear(in_channels, out_channels)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], or [B, in, H, W] -> [B, out, H, W]."""
        if x.dim() == 4:
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return F.linear(x, self.weight, self.bias)


class FeatureHint(nn.Module):
    """L = base(student, teacher, target) + weight * mean (adapter(student's feature) - teacher's feature)^2.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550.

    Args:
        student_layer, teacher_layer: qualified names of the modules whose (tensor) outputs are matched.
        channels: (student's, teacher's) number of channels, for a learned `ChannelAdapter` in between; None
            matches the features as they are. Its parameters must be in the optimizer: give it
            `[*student.parameters(), *loss.parameters()]`, which `Distiller` checks.
        base: the loss on the outputs; None for the features alone.
        weight: of the feature term, > 0.

    `Distiller` attaches it; in a loop of your own use `with hint.attached(teacher, student):` around it.
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str,
        *,
        channels: tuple[int, int] | None = None,
        base: Loss | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = positive("FeatureHint", "weight", weight)
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.adapter = ChannelAdapter(*channels) if channels is not None else None
        self.base = base
        self._features = Features("FeatureHint", [(student_layer, teacher_layer)])

    @contextmanager
    def attached(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """While open, remember the features of each forward pass; ValueError for an unknown layer."""
        with self._features.watching(teacher, student), attached_all([self.base], teacher, student):
            yield

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The loss of the batch that both models have just seen, a scalar."""
        ((mine, theirs),) = self._features.take()
        if self.adapter is not None:
            want, dim = self.adapter.weight.shape[1], 1 if mine.dim() == 4 else -1
            if mine.shape[dim] != want:
                raise ValueError(
                    f"FeatureHint: the student's feature must have {want} channels in dim {dim}, "
                    f"got {list(mine.shape)}"
                )
            mine = self.adapter(mine)
        if mine.shape != theirs.shape:
            raise ValueError(
                f"FeatureHint: features must have one shape, got {list(mine.shape)} from the student and "
                f"{list(theirs.shape)} from the teacher; set channels=(student's, teacher's) or other layers"
            )
        mine = at_least_single(mine)
        total = self.weight * F.mse_loss(mine, theirs.to(mine.dtype))
        outputs = student_out, teacher_out, target
        total, self.components = on_top("hint", total, self.base, outputs)
        return total

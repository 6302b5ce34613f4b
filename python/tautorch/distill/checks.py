"""What a `Distiller` refuses, before or in the middle of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tautorch.distill.checkpoint import LAST


def split_pair(batch: Any) -> tuple[Any, Any]:
    """(inputs, target) of a batch: a pair as it is, a tensor or dict without target; TypeError otherwise."""
    if isinstance(batch, (Tensor, Mapping)):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, target = batch
        return tuple(inputs) if isinstance(inputs, list) else inputs, target
    raise TypeError(
        "Distiller: a batch must be (inputs, target), a tensor or a dict, "
        f"got {type(batch).__name__}{f' of {len(batch)}' if hasattr(batch, '__len__') else ''}; "
        "give Distiller(split=lambda batch: (inputs, target))"
    )


def check_models(teacher: Any, student: Any) -> None:
    """Two modules, the teacher in eval mode throughout; TypeError or ValueError otherwise."""
    for name, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Distiller: {name} must be an nn.Module, got {type(model).__name__}")
    if teacher is student:
        raise ValueError("Distiller: teacher and student must be two models, got one; use copy.deepcopy")
    training = [name or "the whole teacher" for name, module in teacher.named_modules() if module.training]
    if training:
        raise ValueError(
            f"Distiller: teacher must be in eval mode, got {', '.join(training[:3])} in training mode; "
            "call teacher.eval()"
        )


def check_optimizer(teacher: nn.Module, student: nn.Module, loss: Any, optimizer: Optimizer) -> None:
    """The optimizer trains the student and the loss's own weights, never the teacher; else ValueError."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError("Distiller: optimizer must leave the teacher alone, got its parameters")
    if not any(id(parameter) in trained for parameter in student.parameters()):
        raise ValueError("Distiller: optimizer must hold the student's parameters, got none of them")
    if isinstance(loss, nn.Module):
        for name, parameter in loss.named_parameters():
            if parameter.requires_grad and id(parameter) not in trained:
                raise ValueError(
                    f"Distiller: optimizer must hold the loss's own parameters, got no {name}; "
                    "make it over [*student.parameters(), *loss.parameters()]"
                )


def check_loader(loader: Any, epochs: int) -> None:
    """An iterable that can be read `epochs` times; TypeError or ValueError otherwise."""
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(f"Distiller: loader must be an iterable of batches, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise ValueError("Distiller: loader must be re-iterable, got an iterator; pass a list or DataLoader")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"Distiller: epochs must be an int >= 1, got {epochs!r}")


def checkpoint_folder(checkpoint: str | PathLike[str] | None, resume: bool, every: int | None) -> Path | None:
    """The directory of the checkpoints; errors for options that need one, or that would overwrite a run."""
    if every is not None and (every < 1 or checkpoint is None):
        raise ValueError(f"Distiller: checkpoint_every must be >= 1 and have checkpoint=, got {every}")
    if checkpoint is None:
        if resume:
            raise ValueError("Distiller: resume must have checkpoint=, the directory of the run, got None")
        return None
    folder = Path(checkpoint)
    if (folder / LAST).exists() and not resume:
        raise FileExistsError(
            f"Distiller: {folder / LAST} must not exist for a new run; pass resume=True to continue it, "
            "or another directory"
        )
    return folder


def finite_loss(loss: Any, step: int) -> float:
    """The value of a loss that can be trained on; TypeError, ValueError or FloatingPointError otherwise."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"Distiller: loss must return a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError("Distiller: loss must depend on the student's parameters, got one without gradient")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"Distiller: loss must be finite, got {value} at step {step}; lower the learning rate, or look "
            "for NaN in the inputs; the student is as it was before this step"
        )
    return value


def check_gradients(optimizer: Optimizer, step: int) -> None:
    """FloatingPointError if any gradient that the optimizer is about to use is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not math.isfinite(float(nn.utils.get_total_norm(gradients))):
        raise FloatingPointError(
            f"Distiller: gradients must be finite, got NaN or Inf at step {step}; lower the learning rate; "
            "the student is as it was before this step"
        )

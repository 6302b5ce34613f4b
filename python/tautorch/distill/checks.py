"""What a `Distiller` refuses, before or in the middle of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tautorch import distributed
from tautorch._layers import pruned_share
from tautorch.distill.checkpoint import LAST
from tautorch.nn.tail import grid_of
from tautorch.prune import MaskHandle


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
    """Two modules, the teacher in eval mode throughout, or None; TypeError or ValueError otherwise."""
    for name, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module) and not (model is None and name == "teacher"):
            raise TypeError(f"Distiller: {name} must be an nn.Module, got {type(model).__name__}")
    if teacher is None:
        return
    if teacher is student:
        raise ValueError("Distiller: teacher and student must be two models, got one; use copy.deepcopy")
    training = [name or "the whole teacher" for name, module in teacher.named_modules() if module.training]
    if training:
        raise ValueError(
            f"Distiller: teacher must be in eval mode, got {', '.join(training[:3])} in training mode; "
            "call teacher.eval()"
        )


def check_optimizer(teacher: nn.Module | None, student: nn.Module, loss: Any, optimizer: Optimizer) -> None:
    """The optimizer trains the student and the loss's own weights, never the teacher; else ValueError."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if teacher is not None and any(id(parameter) in trained for parameter in teacher.parameters()):
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


def check_options(scheduler: Any, interval: Any, amp: Any, clip_norm: float | None, accumulate: Any) -> None:
    """The Distiller's settings; TypeError or ValueError for the first that cannot be."""
    if interval not in ("epoch", "step"):
        raise ValueError(f'Distiller: scheduler_interval must be "epoch" or "step", got {interval!r}')
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"Distiller: scheduler must have a step() method, got {type(scheduler).__name__}")
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"Distiller: amp must be torch.bfloat16, torch.float16 or None, got {amp!r}")
    if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"Distiller: clip_norm must be a finite number > 0, got {clip_norm!r}")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"Distiller: accumulate must be an int >= 1, got {accumulate!r}")


def check_stopping(evaluate: Any, keep_best: bool, patience: Any, min_delta: float, scheduler: Any) -> None:
    """What depends on a score; ValueError otherwise."""
    if keep_best and evaluate is None:
        raise ValueError("Distiller: keep_best must have evaluate=, got None")
    if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
        raise ValueError(f"Distiller: patience must be an int >= 1, got {patience!r}")
    if not (math.isfinite(min_delta) and min_delta >= 0):
        raise ValueError(f"Distiller: min_delta must be a finite number >= 0, got {min_delta!r}")
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "max" and evaluate is None:
        raise ValueError('Distiller: ReduceLROnPlateau(mode="max") must have evaluate=, got None')


def check_ranks(student: nn.Module, loader: Any) -> None:
    """With several ranks: a student that is kept equal, and loaders of one length; ValueError otherwise."""
    if not distributed.active():
        return
    kept = any(isinstance(module, DistributedDataParallel) for module in student.modules())
    if not kept and not distributed.is_sharded(student):
        raise ValueError(
            f"Distiller: with {distributed.world_size()} ranks the student must be wrapped in "
            "DistributedDataParallel or by fully_shard, got neither; to train on each rank by itself, use "
            "`with tautorch.distributed.local():`"
        )
    lengths = distributed.all_gather(len(loader) if isinstance(loader, Sized) else None)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"Distiller: loader must have as many batches on each rank, got {lengths}; use a "
            "torch.utils.data.DistributedSampler"
        )


def score_value(score: Any) -> float:
    """What `evaluate` returned as a number; ValueError for NaN, which nothing can be better than."""
    value = float(score)
    if math.isnan(value):
        raise ValueError("Distiller: evaluate must return a number, got NaN")
    return value


@contextmanager
def zeros_held(
    student: nn.Module,
    optimizer: Optimizer,
    callbacks: Iterable[Any],
    keep: bool | None,
    masks: Mapping[str, Tensor] | None,
) -> Iterator[dict[str, Tensor] | None]:
    """Keeps what pruning and quantising did to the student, or ValueError where training would undo it.

    `masks` are those that a run which goes on had from here; none make them of the zeros there are now.
    """
    distributed.reshard(student)
    layers = {
        name: layer
        for name, layer in student.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        and isinstance(layer._parameters.get("weight"), Tensor)
        and layer.weight.requires_grad
    }
    for name, layer in layers.items():
        if grid_of(layer, distributed.full_tensor(layer.weight)) is not None:
            raise ValueError(
                f"Distiller: layer {name!r} of the student lies on the grid that it was quantised to, which "
                "training leaves; train it after quantize.prepare_qat, or freeze its weight"
            )
    if keep:
        kept = {name: distributed.full_tensor(layer.weight).detach() != 0 for name, layer in layers.items()}
        if not masks:
            masks = {name: mask for name, mask in kept.items() if bool(mask.any()) and not bool(mask.all())}
        with MaskHandle(student, masks, optimizer) as handle:
            yield handle.masks
        return
    held = {
        id(weight)
        for owner in mask_owners(optimizer, callbacks)
        for weight in getattr(owner, "held_weights", list)()
    }
    for name, layer in layers.items():
        if keep is not None or id(layer.weight) in held:
            continue
        share = pruned_share(distributed.full_tensor(layer.weight))
        if share:
            raise ValueError(
                f"Distiller: {share:.0%} of the weights of the student's layer {name!r} are pruned, and "
                "training would fill them; give keep_zeros=True (or callbacks=[prune.hold_masks(student)]) "
                "to keep them, or keep_zeros=False to let them go"
            )
    yield None


def mask_owners(optimizer: Optimizer, callbacks: Iterable[Any]) -> list[Any]:
    """What may hold masks: the callbacks, and the owners of the hooks after the optimizer's step."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return [*callbacks, *(owner for hook in hooks if (owner := getattr(hook, "__self__", None)) is not None)]


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


def loss_value(loss: Any) -> float:
    """The value of a loss that can be trained on; TypeError or ValueError otherwise."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"Distiller: loss must return a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError("Distiller: loss must depend on the student's parameters, got one without gradient")
    return float(loss.detach())


def check_finite_loss(value: float, step: int) -> None:
    """FloatingPointError for NaN and Inf."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"Distiller: loss must be finite, got {value} at step {step}; lower the learning rate, or look "
            "for NaN in the inputs; the student is as it was before this step"
        )


def raise_gradients(step: int) -> None:
    """FloatingPointError: the gradients are not finite."""
    raise FloatingPointError(
        f"Distiller: gradients must be finite, got NaN or Inf at step {step}; lower the learning rate; "
        "the student is as it was before this step"
    )

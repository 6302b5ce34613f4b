"""One optimizer step: forward, backward, the checks, and back to where it was if any of them fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tautorch import distributed
from tautorch._batches import call_model, model_device, to_device
from tautorch.distill import checks

if TYPE_CHECKING:
    from tautorch.distill.distiller import Distiller

# GradScaler starts at 2^16 and halves at each overflow: 32 in a row are no accident.
_LEAST_SCALE = 2.0**-16


def train_step(run: Distiller, batches: Sequence[Any]) -> dict[str, float]:
    """Accumulate the gradients of `batches`, their mean loss, and step the optimizer once.

    Returns {"loss", "lr", "grad_norm"} and "loss/NAME" for each component that the loss reports, all as the
    mean over batches and ranks. If anything fails before the optimizer's step, the student's buffers are put
    back and no gradient is left.
    """
    before = [
        (module._buffers, name, buffer, None if buffer is None else buffer.clone())
        for module in run.student.modules()
        for name, buffer in module._buffers.items()
    ]
    learning_rate = float(run.optimizer.param_groups[0]["lr"])
    try:
        run.optimizer.zero_grad(set_to_none=True)
        record = _backward(run, batches)
        # A NaN on any rank is a NaN in the mean over the ranks: all of them stop here together.
        checks.check_finite_loss(record["loss"], run.global_step)
        _average_own_gradients(run.loss)
        run.scaler.unscale_(run.optimizer)
        # What masks undo after the step is no part of the norm, which would clip the rest for it.
        for owner in checks.mask_owners(run.optimizer, run.callbacks):
            if hasattr(owner, "mask_gradients"):
                owner.mask_gradients()
        norm = gradient_norm(run.optimizer)
        if not math.isfinite(norm) and not run.scaler.is_enabled():
            checks.raise_gradients(run.global_step)
    except BaseException:
        run.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for slots, name, buffer, saved in before:
                slots[name] = buffer
                if buffer is not None and saved is not None:
                    buffer.copy_(saved)
        raise
    if run.clip_norm is not None and math.isfinite(norm):
        clip_gradients(run.optimizer, run.clip_norm, norm)
    # With infinite gradients in half precision the scaler leaves the step out and lowers its scale.
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.scaler.is_enabled() and run.scaler.get_scale() < _LEAST_SCALE:
        checks.raise_gradients(run.global_step)
    return {**record, "lr": learning_rate, "grad_norm": norm}


def _backward(run: Distiller, batches: Sequence[Any]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for index, batch in enumerate(batches):
        with _synchronised(run.student, last=index == len(batches) - 1):
            loss = _forward(run, batch)
            value = checks.loss_value(loss)
            run.scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        for name, part in {"loss": value, **_components(run.loss)}.items():
            sums[name] = sums.get(name, 0.0) + part / len(batches)
    if not distributed.active():
        return sums
    mean = distributed.all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64))
    return dict(zip(sums, (mean / distributed.world_size()).tolist(), strict=True))


def _components(loss: Any) -> dict[str, float]:
    """{"loss/NAME": value} of a loss that has `components`."""
    parts = getattr(loss, "components", None)
    if not isinstance(parts, Mapping):
        return {}
    return {
        f"loss/{name}": float(part.detach() if isinstance(part, Tensor) else part)
        for name, part in parts.items()
    }


def _forward(run: Distiller, batch: Any) -> Tensor:
    device = model_device(run.student)
    inputs, target = to_device(run.split(batch), device)
    with autocast(run.amp, device):
        teacher_out = None
        if run.teacher is not None:
            with torch.no_grad():
                teacher_out = run.output(call_model("Distiller", run.teacher, inputs))
        student_out = run.output(call_model("Distiller", run.student, inputs, own=False))
        return run.loss(student_out, teacher_out, target)


def autocast(dtype: torch.dtype | None, device: torch.device | None) -> AbstractContextManager[Any]:
    """`torch.autocast` to `dtype` on `device`, or nothing for None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type if device is not None else "cpu", dtype=dtype)


@contextmanager
def _synchronised(student: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged between ranks in the last of the accumulated batches only."""
    with ExitStack() as stack:
        for module in student.modules() if distributed.active() else ():
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
            set_sync: Any = getattr(module, "set_requires_gradient_sync", None)
            if set_sync is not None:
                set_sync(last, recurse=False)
        yield


def _average_own_gradients(loss: Any) -> None:
    """The loss's own weights are in no wrapper that would average their gradients over the ranks."""
    if not distributed.active() or not isinstance(loss, nn.Module):
        return
    if any(isinstance(module, DistributedDataParallel) for module in loss.modules()):
        return
    for parameter in loss.parameters():
        if parameter.grad is not None and not distributed.is_sharded(parameter):
            parameter.grad.copy_(distributed.all_reduce(parameter.grad) / distributed.world_size())


def _gradients(optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients in use: the ordinary ones, and the sharded ones, which torch does not mix with them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    sharded = [distributed.is_sharded(parameter) for parameter in parameters]
    pairs = list(zip(parameters, sharded, strict=True))
    return [p for p, apart in pairs if not apart], [p for p, apart in pairs if apart]


def gradient_norm(optimizer: Optimizer) -> float:
    """The L2 norm of all gradients together, of all ranks' shards where they are sharded."""
    norms = [
        float(distributed.full_tensor(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])))
        for group in _gradients(optimizer)
        if group
    ]
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


def clip_gradients(optimizer: Optimizer, limit: float, norm: float) -> None:
    """Scale all gradients by limit / norm if their `norm` is above the limit, as `clip_grad_norm_` does."""
    for group in _gradients(optimizer):
        if group:
            nn.utils.clip_grads_with_norm_(group, limit, torch.tensor(norm, device=group[0].device))

"""What a `Distiller` saves and loads: one format for one process, DDP and FSDP2, with whole tensors in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tautorch import distributed
from tautorch.distill import checkpoint as checkpoints
from tautorch.distill.callbacks import Stateful, load_states, states

if TYPE_CHECKING:
    from tautorch.distill.distiller import Distiller


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel, whose names are one process's; any other as it is."""
    return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict whose tensors are copies."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def gathered(value: Any) -> Any:
    """Whole tensors in place of sharded ones, on rank 0's CPU; the other ranks take part and get None."""
    if isinstance(value, Tensor) and distributed.is_sharded(value):
        whole = distributed.full_tensor(value)
        return whole.cpu() if distributed.is_main() else None
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(item) for item in value)
    return value


def load_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of whole tensors, each rank taking its part."""
    mine = module.state_dict()
    module.load_state_dict({name: _shard(value, mine.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of whole tensors: a state of its parameter's shape is sharded as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {
        index: {
            key: _shard(value, parameters[index] if index < len(parameters) else None)
            for key, value in slot.items()
        }
        for index, slot in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": slots})


def _shard(value: Any, like: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(like, Tensor) and value.shape == like.shape:
        return distributed.shard_like(value, like)
    return value


def save(
    run: Distiller,
    folder: Path,
    generators: list[torch.Generator],
    epoch_start: Mapping[str, Any],
    batch: int,
    totals: Mapping[str, float],
) -> None:
    """Write `last.pt`: called on every rank, written by rank 0.

    `batch` batches of this epoch are done, with these sums of their records; `epoch_start` is the random
    state in which the epoch's order was drawn.
    """
    share_buffers(run.student)
    scheduler: Any = run.scheduler
    state = {
        "format": checkpoints.FORMAT,
        "student": gathered(unwrapped(run.student).state_dict()),
        "loss_state": gathered(run.loss.state_dict()) if isinstance(run.loss, nn.Module) else None,
        "optimizer": gathered(run.optimizer.state_dict()),
        "scheduler": scheduler.state_dict() if isinstance(scheduler, Stateful) else None,
        "scaler": run.scaler.state_dict(),
        "callbacks": states(run.callbacks),
        "epoch": run.epoch,
        "global_step": run.global_step,
        "history": run.history,
        "best": gathered(run.best),
        "zeros": run.zeros,
        "batch": batch,
        "totals": dict(totals),
        "epoch_start": distributed.all_gather(dict(epoch_start)),
        "random": distributed.all_gather(checkpoints.random_state(generators)),
    }
    if distributed.is_main():
        checkpoints.save_atomic(state, folder / checkpoints.LAST)


def restore(run: Distiller, folder: Path, generators: list[torch.Generator]) -> dict[str, Any]:
    """Load `last.pt` into everything; the student's weights come last, after all that may refuse."""
    state = checkpoints.load_checkpoint(folder / checkpoints.LAST)
    student = unwrapped(run.student)
    checkpoints.check_fits("student", student, state["student"])
    if isinstance(run.loss, nn.Module):
        checkpoints.check_fits("loss", run.loss, state["loss_state"] or {})
    scheduler: Any = run.scheduler
    if len(state["callbacks"]) != len(run.callbacks) or (state["scheduler"] is None) != (
        not isinstance(scheduler, Stateful)
    ):
        raise ValueError(
            f"Distiller: callbacks and scheduler must be as at the checkpoint ({len(state['callbacks'])} "
            f"callbacks, scheduler {state['scheduler'] is not None}), got {len(run.callbacks)} and "
            f"{run.scheduler is not None}"
        )
    if bool(state["scaler"]) != run.scaler.is_enabled():
        raise ValueError(
            "Distiller: amp must be as at the checkpoint, torch.float16 in one of them and not in the other"
        )
    _restore_random(state, generators)
    load_optimizer(run.optimizer, state["optimizer"])
    if isinstance(scheduler, Stateful):
        scheduler.load_state_dict(state["scheduler"])
    before = copied(student.state_dict())
    try:
        load_module(student, state["student"])
        load_states(run.callbacks, state["callbacks"])
    except BaseException:
        student.load_state_dict(before)
        raise
    if isinstance(run.loss, nn.Module):
        load_module(run.loss, state["loss_state"])
    run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.global_step = state["epoch"], state["global_step"]
    run.history, run.best, run.zeros = state["history"], state["best"], state.get("zeros")
    return state


def _restore_random(state: dict[str, Any], generators: list[torch.Generator]) -> None:
    """Put this rank's generators back; with other ranks than then, only at the end of an epoch."""
    ranks = len(state["random"])
    if ranks == distributed.world_size():
        state["epoch_start"] = state["epoch_start"][distributed.rank()]
        checkpoints.set_random_state(state["random"][distributed.rank()], generators)
    elif state["batch"] == 0:
        # Nothing to go on exactly: the ranks keep the seeds they were started with.
        state["epoch_start"] = checkpoints.random_state(generators)
    else:
        raise ValueError(
            f"Distiller: a checkpoint from within an epoch must be resumed by {ranks} ranks, as it was "
            f"written, got {distributed.world_size()}; one from the end of an epoch goes with any number"
        )


def share_buffers(model: nn.Module) -> None:
    """Rank 0's buffers (running statistics) everywhere: each rank saw other batches."""
    distributed.broadcast_tensors(buffer for buffer in model.buffers() if not distributed.is_sharded(buffer))


def share_parameters(module: nn.Module) -> None:
    """Rank 0's weights everywhere, for a module that no wrapper looks after."""
    distributed.broadcast_tensors(
        tensor for tensor in (*module.parameters(), *module.buffers()) if not distributed.is_sharded(tensor)
    )

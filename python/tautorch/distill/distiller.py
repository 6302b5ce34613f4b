"""Training a student, with or without a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tautorch import distributed
from tautorch._batches import model_device, training_modes_kept
from tautorch.distill import checkpoint as checkpoints
from tautorch.distill import checks, state
from tautorch.distill.callbacks import OnEnd, OnEpoch, OnFit, OnStep
from tautorch.distill.losses import Loss
from tautorch.distill.progress import Bar
from tautorch.distill.step import train_step

if TYPE_CHECKING:
    from rich.progress import Progress

Callback = OnFit | OnStep | OnEpoch | OnEnd | Callable[[Any], Any]
_LISTENERS = (OnFit, OnStep, OnEpoch, OnEnd)


@runtime_checkable
class Attachable(Protocol):
    """A loss that looks into the models, such as `FeatureHint`: attached for the length of a `fit`."""

    def attached(self, teacher: nn.Module | None, student: nn.Module) -> AbstractContextManager[None]:
        """A context in which the loss sees both models' forward passes."""


class Distiller:
    """Trains `student` to minimise `loss(student_out, teacher_out, target)`.

    Args:
        teacher: frozen: run without gradients, in eval mode (ValueError otherwise, never switched silently).
            None trains without one: the loss is given None for its output.
        student: trained in place. With several ranks it is wrapped, by you, in `DistributedDataParallel` or
            with `fully_shard`; each rank's loader gives its share of the batches.
        loss: see `tautorch.distill.losses`; any callable of that form. One with an attribute `components`,
            {name: value of the last batch}, has these shown and logged.
        optimizer: over the student's parameters, and the loss's own where it has any.
        scheduler: anything with `step()`, called after every epoch or step, as `scheduler_interval` says.
            `ReduceLROnPlateau` is given the loss, or in its mode "max" the score.
        amp: torch.bfloat16 or torch.float16: both models and the loss run under `torch.autocast`; float16
            with a `GradScaler`, whose left-out steps (infinite gradients, as the scale is found) count like
            the others, for schedules and callbacks too. None: in the dtypes the models have.
        clip_norm: gradients are scaled down to this L2 norm, all parameters together.
        accumulate: batches of the loader for each optimizer step; their mean loss is minimised. The last
            step of an epoch takes what is left.
        callbacks: objects with `on_fit`, `on_step`, `on_epoch` or `on_end` (`tautorch.prune.Schedule`, a mask
            handle, `JsonLog`), or plain callables, which are called after each optimizer step; all are given
            this object. Those with `state_dict` and `load_state_dict` are saved in checkpoints.
        keep_zeros: of a pruned student: True holds its zeros through each `fit` (as `prune.hold_masks`
            does), False lets training fill them. None raises ValueError where neither a callback nor the
            optimizer's hook holds them.
        output: what the loss sees of a model's output, e.g. `lambda out: out.logits`.
        split: how a batch of the loader becomes (inputs, target). By default a pair is just that, and a
            tensor or dict is inputs without target. Inputs are a tensor, a tuple of positional or a dict of
            keyword arguments; all tensors are moved to the student's device.
        progress: a bar of its own, none, or a task on the `rich.progress.Progress` given; on rank 0 only.

    During `fit`, `epoch` and `global_step` count what is done, `total_steps` is None for a loader of unknown
    length, `record` holds the last step's {"loss", "lr", "grad_norm"} and "loss/NAME" of each component, and
    `history` a record for each epoch: {"epoch", "loss", "lr"}, the components' means, and "score".
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | ReduceLROnPlateau | Any | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        amp: torch.dtype | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        callbacks: Iterable[Callback] = (),
        keep_zeros: bool | None = None,
        output: Callable[[Any], Any] | None = None,
        split: Callable[[Any], tuple[Any, Any]] | None = None,
        progress: bool | Progress = True,
    ) -> None:
        checks.check_options(scheduler, scheduler_interval, amp, clip_norm, accumulate)
        self.teacher, self.student, self.loss, self.optimizer = teacher, student, loss, optimizer
        self.scheduler, self.scheduler_interval = scheduler, scheduler_interval
        self.amp, self.clip_norm, self.accumulate = amp, clip_norm, accumulate
        self.callbacks: list[Any] = list(callbacks)
        self.keep_zeros = keep_zeros
        self.output = output if output is not None else lambda out: out
        self.split = split if split is not None else checks.split_pair
        self.progress = progress
        self.epoch = self.global_step = 0
        self.total_steps: int | None = None
        self.record: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        # What keep_zeros=True holds, from the first step of a run that was interrupted on.
        self.zeros: dict[str, Tensor] | None = None
        self.scaler = torch.amp.GradScaler(enabled=False)
        checks.check_models(teacher, student)
        checks.check_optimizer(teacher, student, loss, optimizer)
        for callback in self.callbacks:
            if not isinstance(callback, _LISTENERS) and not callable(callback):
                raise TypeError(
                    "Distiller: callbacks must have on_fit, on_step, on_epoch or on_end, or be callable, "
                    f"got {type(callback).__name__}"
                )

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        *,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = False,
        checkpoint_every: int | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        keep_best: bool = False,
        best_from: int = 0,
        patience: int | None = None,
        min_delta: float = 0.0,
    ) -> list[dict[str, float]]:
        """Train for `epochs` passes over `loader`; returns `history`.

        Args:
            loader: a re-iterable of batches, such as a DataLoader. `set_epoch` of its sampler is called.
            epochs: in all, those before a resumed checkpoint included.
            checkpoint: a directory, seen by all ranks; `last.pt` is replaced there, atomically, after every
                epoch. It holds whole tensors: one process, DDP and FSDP2 read each other's.
            resume: continue from `last.pt` if it is there. On one machine's CPU the run then ends with
                bit-identical weights: the optimizer, schedulers, callbacks, random generators and the place
                in the loader's order are restored.
            checkpoint_every: also save after every so many optimizer steps, within epochs.
            evaluate: called after each epoch with the student (without its DDP wrapper) in eval mode, without
                gradients; higher is better. Recorded as "score", the mean over the ranks.
            keep_best: end with the weights of the best score, also written as `best.pt` (a state_dict).
            best_from: the first epoch (from 0) that may be best; set it past a pruning schedule's end.
            patience: stop after so many epochs without a better score, or lower loss without `evaluate`;
                better by more than `min_delta`.

        Raises FloatingPointError for a loss or gradient that is not finite: the student is then as it was
        before that step. ValueError for a loader that is empty or can be read once only, a checkpoint of
        another model, or `resume` without a checkpoint; FileExistsError when a new run would overwrite one.
        """
        checks.check_loader(loader, epochs)
        folder = checks.checkpoint_folder(checkpoint, resume, checkpoint_every)
        checks.check_stopping(evaluate, keep_best, patience, min_delta, self.scheduler)
        checks.check_ranks(self.student, loader)
        generators = checkpoints.loader_generators(loader)
        length = len(loader) if isinstance(loader, Sized) else None
        self.epoch = 0
        self.record, self.history, self.best, self.zeros = {}, [], None, None
        self._count(None if length is None else epochs * math.ceil(length / self.accumulate))
        device = model_device(self.student)
        kind = device.type if device is not None else "cpu"
        self.scaler = torch.amp.GradScaler(kind, enabled=self.amp is torch.float16)
        if isinstance(self.loss, nn.Module):
            state.share_parameters(self.loss)
        place = self._resume(folder, generators) if folder is not None and resume else None
        with (
            training_modes_kept(self.student),
            self._attached(),
            Bar(
                self.progress if distributed.is_main() else False,
                "distil",
                self.total_steps,
                self.global_step,
            ) as bar,
            self._listening(),
            checks.zeros_held(
                state.unwrapped(self.student), self.optimizer, self.callbacks, self.keep_zeros, self.zeros
            ) as self.zeros,
        ):
            while self.epoch < epochs and not self._out_of_patience(patience, best_from, min_delta):
                checks.check_models(self.teacher, self.student)
                self._run_epoch(loader, epochs, generators, place, bar, folder, checkpoint_every)
                place = None
                self._end_epoch(evaluate, keep_best and self.epoch >= best_from, folder)
                if folder is not None:
                    state.save(self, folder, generators, checkpoints.random_state(generators), 0, {})
            if keep_best:
                self._take_best()
        return self.history

    def _count(self, steps: int | None) -> None:
        """Begin to count the `steps` optimizer steps to come; None if nobody knows how many."""
        self.global_step, self.total_steps = 0, steps

    def _resume(self, folder: Path, generators: list[torch.Generator]) -> dict[str, Any] | None:
        if distributed.is_main():
            checkpoints.remove_parts(folder)
        found = distributed.broadcast_value((folder / checkpoints.LAST).exists())
        return state.restore(self, folder, generators) if found else None

    def _run_epoch(
        self,
        loader: Iterable[Any],
        epochs: int,
        generators: list[torch.Generator],
        place: dict[str, Any] | None,
        bar: Bar,
        folder: Path | None,
        every: int | None,
    ) -> None:
        self.student.train()
        for name in ("sampler", "batch_sampler"):
            set_epoch: Any = getattr(getattr(loader, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epoch)
        if place is not None:
            checkpoints.set_random_state(place["epoch_start"], generators)
        start = checkpoints.random_state(generators)
        batches, done, totals = iter(loader), 0, dict[str, float]()
        if place is not None and place["batch"] > 0:
            # The same order is drawn again and the batches already learnt from are passed over.
            done, totals = place["batch"], place["totals"]
            skipped = sum(1 for _ in islice(batches, done))
            if skipped != done:
                raise ValueError(
                    f"Distiller: loader must give the {done} batches that are already done, got {skipped}"
                )
            checkpoints.set_random_state(place["random"][distributed.rank()], generators)
        while group := list(islice(batches, self.accumulate)):
            self.record = train_step(self, group)
            for name, value in self.record.items():
                if name.startswith("loss"):
                    totals[name] = totals.get(name, 0.0) + value * len(group)
            done += len(group)
            self.global_step += 1
            if self.scheduler_interval == "step":
                self._step_scheduler(self.record)
            for callback in self.callbacks:
                if isinstance(callback, OnStep):
                    callback.on_step(self)
                elif callable(callback) and not isinstance(callback, _LISTENERS):
                    callback(self)
            bar.advance(f"distil {self.epoch + 1}/{epochs}", self.record)
            if folder is not None and every is not None and self.global_step % every == 0:
                state.save(self, folder, generators, start, done, totals)
        if done == 0:
            raise ValueError("Distiller: loader must give at least one batch, got none")
        means = {name: total / done for name, total in totals.items()}
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.history.append({"epoch": self.epoch, "lr": learning_rate, **means})

    def _step_scheduler(self, record: dict[str, float]) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(record["score" if self.scheduler.mode == "max" else "loss"])
        elif self.scheduler is not None:
            self.scheduler.step()

    def _end_epoch(
        self, evaluate: Callable[[nn.Module], float] | None, may_be_best: bool, folder: Path | None
    ) -> None:
        record = self.history[-1]
        state.share_buffers(self.student)
        student = state.unwrapped(self.student)
        if evaluate is not None:
            with training_modes_kept(student), torch.no_grad():
                student.eval()
                mine = torch.tensor(checks.score_value(evaluate(student)), dtype=torch.float64)
            distributed.reshard(student)
            record["score"] = float(distributed.all_reduce(mine)) / distributed.world_size()
        if self.scheduler_interval == "epoch":
            self._step_scheduler(record)
        self.epoch += 1
        for callback in self.callbacks:
            if isinstance(callback, OnEpoch):
                callback.on_epoch(self)
        if may_be_best and (self.best is None or record["score"] > self.best["score"]):
            weights = state.copied(student.state_dict())
            self.best = {"score": record["score"], "epoch": record["epoch"], "student": weights}
            if folder is not None:
                whole = state.gathered(weights)
                if distributed.is_main():
                    checkpoints.save_atomic(whole, folder / checkpoints.BEST)

    def _take_best(self) -> None:
        if self.best is not None:
            state.load_module(state.unwrapped(self.student), self.best["student"])

    def _out_of_patience(self, patience: int | None, first: int, min_delta: float) -> bool:
        """From the history alone, so that a resumed run stops where it would have."""
        best, since = -math.inf, 0
        for record in self.history[first:]:
            value = record.get("score", -record["loss"])
            best, since = (value, 0) if value > best + min_delta else (best, since + 1)
        return patience is not None and since >= patience

    @contextmanager
    def _attached(self) -> Iterator[None]:
        loss: Any = self.loss
        student = state.unwrapped(self.student)
        with loss.attached(self.teacher, student) if isinstance(loss, Attachable) else nullcontext():
            yield

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """on_fit on entering; on_end on leaving, after an error too."""
        try:
            for callback in self.callbacks:
                if isinstance(callback, OnFit):
                    callback.on_fit(self)
            yield
        finally:
            for callback in self.callbacks:
                if isinstance(callback, OnEnd):
                    callback.on_end(self)

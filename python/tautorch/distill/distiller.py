"""Training a student from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tautorch._batches import call_model, model_device, to_device, training_modes_kept
from tautorch.distill import checkpoint as checkpoints
from tautorch.distill import checks
from tautorch.distill.callbacks import OnEpoch, OnFit, OnStep, Stateful
from tautorch.distill.losses import Loss
from tautorch.distill.progress import Bar

if TYPE_CHECKING:
    from rich.progress import Progress

Callback = OnFit | OnStep | OnEpoch | Callable[[Any], Any]


@runtime_checkable
class Attachable(Protocol):
    """A loss that looks into the models, such as `FeatureHint`: attached for the length of a `fit`."""

    def attached(self, teacher: nn.Module, student: nn.Module) -> AbstractContextManager[None]:
        """A context in which the loss sees both models' forward passes."""


class Distiller:
    """Trains `student` to minimise `loss(student_out, teacher_out, target)`.

    Args:
        teacher: frozen: run without gradients, in eval mode (ValueError otherwise, never switched silently).
        student: trained in place.
        loss: see `tautorch.distill.losses`; any callable of that form.
        optimizer: over the student's parameters, and the loss's own where it has any.
        scheduler: stepped after every epoch or step, as `scheduler_interval` says.
        callbacks: objects with `on_fit`, `on_step` or `on_epoch` (`tautorch.prune.Schedule`, a mask handle),
            or plain callables, which are called after each optimizer step; all are given this object. Those
            with `state_dict` and `load_state_dict` are saved in checkpoints.
        output: what the loss sees of a model's output, e.g. `lambda out: out.logits`.
        split: how a batch of the loader becomes (inputs, target). By default a pair is just that, and a
            tensor or dict is inputs without target. Inputs are a tensor, a tuple of positional or a dict of
            keyword arguments; all tensors are moved to the student's device.
        progress: a bar of its own, none, or a task on the `rich.progress.Progress` given.

    During `fit`, `epoch` and `global_step` count what is done, `total_steps` is None for a loader of unknown
    length, and `history` holds a record for each epoch: {"epoch", "loss", "lr"} and "score" where evaluated.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        callbacks: Iterable[Callback] = (),
        output: Callable[[Any], Any] | None = None,
        split: Callable[[Any], tuple[Any, Any]] | None = None,
        progress: bool | Progress = True,
    ) -> None:
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f'Distiller: scheduler_interval must be "epoch" or "step", got {scheduler_interval!r}'
            )
        self.teacher, self.student, self.loss, self.optimizer = teacher, student, loss, optimizer
        self.scheduler, self.scheduler_interval = scheduler, scheduler_interval
        self.callbacks: list[Any] = list(callbacks)
        self.output = output if output is not None else lambda out: out
        self.split = split if split is not None else checks.split_pair
        self.progress = progress
        self.epoch = self.global_step = 0
        self.total_steps: int | None = None
        self.history: list[dict[str, float]] = []
        self._best: dict[str, Any] | None = None
        checks.check_models(teacher, student)
        checks.check_optimizer(teacher, student, loss, optimizer)
        for callback in self.callbacks:
            if not isinstance(callback, (OnFit, OnStep, OnEpoch)) and not callable(callback):
                raise TypeError(
                    "Distiller: callbacks must have on_fit, on_step or on_epoch, or be callable, "
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
    ) -> list[dict[str, float]]:
        """Train for `epochs` passes over `loader`; returns `history`.

        Args:
            loader: a re-iterable of batches, such as a DataLoader.
            epochs: in all, those before a resumed checkpoint included.
            checkpoint: a directory; `last.pt` is replaced there, atomically, after every epoch.
            resume: continue from `last.pt` if it is there. On one machine's CPU the run then ends with
                bit-identical weights: the optimizer, schedulers, callbacks, random generators and the place
                in the loader's order are restored.
            checkpoint_every: also save after every so many optimizer steps, within epochs.
            evaluate: called after each epoch with the student in eval mode, without gradients; higher is
                better. Recorded as "score".
            keep_best: end with the weights of the best score, also written as `best.pt` (a state_dict).
            best_from: the first epoch (from 0) that may be best; set it past a pruning schedule's end.

        Raises FloatingPointError for a loss or gradient that is not finite: the student is then as it was
        before that step. ValueError for a loader that is empty or can be read once only, a checkpoint of
        another model, or `resume` without a checkpoint; FileExistsError when a new run would overwrite one.
        """
        checks.check_loader(loader, epochs)
        folder = checks.checkpoint_folder(checkpoint, resume, checkpoint_every)
        if keep_best and evaluate is None:
            raise ValueError("Distiller: keep_best must have evaluate=, got None")
        generators = checkpoints.loader_generators(loader)
        length = len(loader) if isinstance(loader, Sized) else None
        self.epoch = self.global_step = 0
        self.history, self._best = [], None
        self.total_steps = None if length is None else epochs * length
        place = None
        if folder is not None and resume and (folder / checkpoints.LAST).exists():
            place = self._restore(folder, generators)
        with (
            training_modes_kept(self.student),
            self._attached(),
            Bar(self.progress, "distil", self.total_steps, self.global_step) as bar,
        ):
            for callback in self.callbacks:
                if isinstance(callback, OnFit):
                    callback.on_fit(self)
            while self.epoch < epochs:
                checks.check_models(self.teacher, self.student)
                self._run_epoch(loader, epochs, generators, place, bar, folder, checkpoint_every)
                place = None
                self._end_epoch(evaluate, keep_best and self.epoch >= best_from, folder)
                if folder is not None:
                    self._save(folder, generators, checkpoints.random_state(generators), 0, 0.0)
            if keep_best:
                self._take_best()
        return self.history

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
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        if place is not None:
            checkpoints.set_random_state(place["epoch_start"], generators)
        start = checkpoints.random_state(generators)
        batches, done, total = iter(loader), 0, 0.0
        if place is not None and place["batch"] > 0:
            # The same order is drawn again and the batches already learnt from are passed over.
            done, total = place["batch"], place["loss"]
            skipped = sum(1 for _ in islice(batches, done))
            if skipped != done:
                raise ValueError(
                    f"Distiller: loader must give the {done} batches that are already done, got {skipped}"
                )
            checkpoints.set_random_state(place["random"], generators)
        for batch in batches:
            value = self._step(batch)
            done, total = done + 1, total + value
            self.global_step += 1
            if self.scheduler is not None and self.scheduler_interval == "step":
                self._step_scheduler(value)
            for callback in self.callbacks:
                if isinstance(callback, OnStep):
                    callback.on_step(self)
                elif callable(callback) and not isinstance(callback, (OnFit, OnEpoch)):
                    callback(self)
            bar.advance(f"distil {self.epoch + 1}/{epochs}", value)
            if folder is not None and every is not None and self.global_step % every == 0:
                self._save(folder, generators, start, done, total)
        if done == 0:
            raise ValueError("Distiller: loader must give at least one batch, got none")
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.history.append({"epoch": self.epoch, "loss": total / done, "lr": learning_rate})

    def _step(self, batch: Any) -> float:
        """One optimizer step; if anything fails first, the student's buffers are put back."""
        before = [(buffer, buffer.clone()) for buffer in self.student.buffers()]
        try:
            inputs, target = to_device(self.split(batch), model_device(self.student))
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                teacher_out = self.output(call_model("Distiller", self.teacher, inputs))
            student_out = self.output(call_model("Distiller", self.student, inputs))
            loss = self.loss(student_out, teacher_out, target)
            value = checks.finite_loss(loss, self.global_step)
            loss.backward()  # type: ignore[no-untyped-call]
            checks.check_gradients(self.optimizer, self.global_step)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, saved in before:
                    buffer.copy_(saved)
            raise
        self.optimizer.step()
        return value

    def _step_scheduler(self, loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _end_epoch(
        self, evaluate: Callable[[nn.Module], float] | None, may_be_best: bool, folder: Path | None
    ) -> None:
        record = self.history[-1]
        if self.scheduler is not None and self.scheduler_interval == "epoch":
            self._step_scheduler(record["loss"])
        if evaluate is not None:
            with training_modes_kept(self.student), torch.no_grad():
                self.student.eval()
                record["score"] = float(evaluate(self.student))
        self.epoch += 1
        for callback in self.callbacks:
            if isinstance(callback, OnEpoch):
                callback.on_epoch(self)
        if may_be_best and (self._best is None or record["score"] > self._best["score"]):
            state = _copy(self.student.state_dict())
            self._best = {"score": record["score"], "epoch": record["epoch"], "student": state}
            if folder is not None:
                checkpoints.save_atomic(state, folder / checkpoints.BEST)

    def _take_best(self) -> None:
        if self._best is not None:
            self.student.load_state_dict(self._best["student"])

    def _save(
        self,
        folder: Path,
        generators: list[torch.Generator],
        epoch_start: Mapping[str, Any],
        batch: int,
        loss: float,
    ) -> None:
        state = {
            "format": checkpoints.FORMAT,
            "student": self.student.state_dict(),
            "loss_state": self.loss.state_dict() if isinstance(self.loss, nn.Module) else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "callbacks": [c.state_dict() if isinstance(c, Stateful) else None for c in self.callbacks],
            "epoch": self.epoch,
            "global_step": self.global_step,
            "history": self.history,
            "best": self._best,
            "batch": batch,
            "loss": loss,
            "epoch_start": epoch_start,
            "random": checkpoints.random_state(generators),
        }
        checkpoints.save_atomic(state, folder / checkpoints.LAST)

    def _restore(self, folder: Path, generators: list[torch.Generator]) -> dict[str, Any]:
        """Load `last.pt` into everything; the student's weights come last, after all that may refuse."""
        state = checkpoints.load_checkpoint(folder / checkpoints.LAST)
        checkpoints.check_fits("student", self.student, state["student"])
        if isinstance(self.loss, nn.Module):
            checkpoints.check_fits("loss", self.loss, state["loss_state"] or {})
        if len(state["callbacks"]) != len(self.callbacks) or (state["scheduler"] is None) != (
            self.scheduler is None
        ):
            raise ValueError(
                f"Distiller: callbacks and scheduler must be as at the checkpoint ({len(state['callbacks'])} "
                f"callbacks, scheduler {state['scheduler'] is not None}), got {len(self.callbacks)} and "
                f"{self.scheduler is not None}"
            )
        checkpoints.set_random_state(state["random"], generators)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        before = _copy(self.student.state_dict())
        try:
            # Callbacks come after the weights: a mask handle applies its masks to what is there.
            self.student.load_state_dict(state["student"])
            for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
                if isinstance(callback, Stateful) and saved is not None:
                    callback.load_state_dict(saved)
        except BaseException:
            self.student.load_state_dict(before)
            raise
        if isinstance(self.loss, nn.Module):
            self.loss.load_state_dict(state["loss_state"])
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        self.history, self._best = state["history"], state["best"]
        return state

    @contextmanager
    def _attached(self) -> Iterator[None]:
        loss: Any = self.loss
        with loss.attached(self.teacher, self.student) if isinstance(loss, Attachable) else nullcontext():
            yield


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

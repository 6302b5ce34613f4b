"""Policy distillation on the student's own rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tautorch import distributed
from tautorch.distill import callbacks, checks
from tautorch.distill import checkpoint as checkpoints
from tautorch.distill.arguments import unit_interval, whole
from tautorch.distill.distiller import Distiller
from tautorch.distill.losses import Loss
from tautorch.distill.progress import Bar
from tautorch.distill.rollout import Act, World, acting, reader

if TYPE_CHECKING:
    from rich.progress import Progress

# Observations that the teacher labels at once.
_LABEL_BATCH = 1024


def dagger(
    teacher: nn.Module,
    student: nn.Module,
    env: Any,
    loss: Loss,
    optimizer: Optimizer,
    *,
    rounds: int = 10,
    steps: int = 1000,
    epochs: int = 5,
    batch_size: int = 64,
    beta: float | Callable[[int], float] = 0.0,
    capacity: int = 100_000,
    seed: int = 0,
    act: Act | None = None,
    output: Callable[[Any], Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    keep_best: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | Progress = True,
    **options: Any,
) -> list[dict[str, float]]:
    """Train `student` to act like `teacher` in the states that the student itself gets into.

    Each round runs the student in `env`, has the teacher say what it would have done in every state visited,
    adds that to the data of all rounds, and trains on them. DAgger: Ross, Gordon & Bagnell 2011,
    arXiv:1011.0686; with `PolicyKL` on a Q-network's values: Rusu et al. 2016, "Policy Distillation",
    arXiv:1511.06295. Policies map observations [n, ...] to outputs and keep no state between steps.

    Args:
        teacher: in eval mode (ValueError otherwise); not changed.
        student: trained in place, by a `Distiller`.
        env: of gymnasium's API, single or vectorised. Observations are arrays of numbers.
        loss: `loss(student_out, teacher_out, None)`: `PolicyKL` or `SoftTarget(alpha=0)` for discrete
            actions, `GaussianKL` or `Regression` for continuous ones.
        optimizer: over the student's parameters; its state goes on from round to round.
        rounds, steps: how often, and how many environment steps each time (all copies of a vectorised
            environment together).
        epochs, batch_size: of the training in each round.
        beta: the share of the actions in round i = 0, 1, ... that are the teacher's: beta ** i, or beta(i).
            0, the default, lets the teacher act in round 0 alone; `lambda i: 0.0` never.
        capacity: the most samples kept. Beyond, those kept are a uniform draw of all ever visited (reservoir
            sampling).
        seed: of the episodes, of who acts, of the order of training and of what is kept.
        act, output: as in `evaluate_policy`; `output` is used on both policies.
        evaluate: called after each round with the student in eval mode; higher is better.
        keep_best: end with the student of the round that `evaluate` liked best.
        checkpoint: a directory where `last.pt` is written, atomically, after each round.
        resume: continue from it; on one machine's CPU the run ends with bit-identical weights.
        progress: a bar of its own, none, or a task on the `rich.progress.Progress` given.
        options: more of `Distiller`'s, such as `scheduler=`.

    Returns a record per round: {"round", "beta", "samples" kept, "episodes" ended, "loss" of the last epoch},
    "return", the mean over the ended episodes (those the mixture ran), and "score" where evaluated. Raises
    ValueError or TypeError for bad settings before anything runs, FloatingPointError for a loss or output
    that is not finite.
    """
    for name, value in (("rounds", rounds), ("steps", steps), ("epochs", epochs), ("batch_size", batch_size)):
        whole("dagger", name, value)
    whole("dagger", "seed", seed, 0)
    if not callable(beta):
        unit_interval("dagger", "beta", beta)
    if keep_best and evaluate is None:
        raise ValueError("dagger: keep_best must have evaluate=, got None")
    if distributed.active():
        raise ValueError("dagger: one process must run it, got several ranks; use distributed.local()")
    if hasattr(loss, "attached"):
        raise TypeError(f"dagger: loss must be one of the outputs alone, got {type(loss).__name__}")
    world = World("dagger", env, act)
    output = output if output is not None else lambda out: out
    data = Samples(capacity)
    checks.check_models(teacher, student)
    distiller = _InRounds(None, student, _Recorded(loss), optimizer, output=output, progress=False, **options)
    sizes = (min(capacity, steps * (i + 1)) for i in range(rounds))
    distiller.total_steps = sum(
        epochs * math.ceil(math.ceil(size / batch_size) / distiller.accumulate) for size in sizes
    )
    run = _Run(student, distiller, data, checks.checkpoint_folder(checkpoint, resume, None), resume)
    with Bar(progress, "dagger", rounds, len(run.history)) as bar, distiller.listening():
        for i in range(len(run.history), rounds):
            share = unit_interval("dagger", f"beta({i})", float(beta(i) if callable(beta) else beta**i))
            draws = np.random.default_rng([seed, i])
            visited, record = _collect(world, student, teacher, output, steps, share, draws)
            data.add([visited, *_label(teacher, output, visited)], draws)
            order = torch.Generator().manual_seed(int(draws.integers(2**62)))
            trained = distiller.fit(data.batches(batch_size, order), epochs)
            record = {"round": i, "beta": share, "samples": len(data), **record, "loss": trained[-1]["loss"]}
            if evaluate is not None:
                with acting(student):
                    record["score"] = checks.score_value(evaluate(student))
            run.end_round(record)
            bar.advance(f"dagger {i + 1}/{rounds}", record)
    if keep_best:
        run.take_best()
    return run.history


def _collect(
    world: World,
    student: nn.Module,
    teacher: nn.Module,
    output: Callable[[Any], Any],
    steps: int,
    share: float,
    draws: np.random.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """`steps` states that the mixture of both policies visits, on the CPU, and how its episodes went."""
    seen: list[Any] = []
    returns: list[float] = []
    read, read_teacher = reader("dagger", student), reader("dagger", teacher)
    count, total = 0, np.zeros(world.size)
    with acting(student):
        observations = world.reset([int(s) for s in draws.integers(2**31, size=world.size)])
        while count < steps:
            live = world.live
            seen.append(np.array(observations)[live])
            count += int(live.sum())
            expert = draws.random(world.size) < share
            actions = None if expert.all() else world.actions(output(student(read(observations))))
            if expert.any():
                theirs = world.actions(output(teacher(read_teacher(observations))))
                mixed = expert.reshape(-1, *[1] * (theirs.ndim - 1))
                actions = theirs if actions is None else np.where(mixed, theirs, actions)
            observations, rewards, over = world.step(actions)
            total += np.where(live, rewards, 0.0)
            if over.any():
                returns.extend(total[over].tolist())
                total[over] = 0.0
    record = {"episodes": float(len(returns)), "return": float(np.mean(returns)) if returns else math.nan}
    return read(np.concatenate(seen)[:steps]).cpu(), record


def _label(teacher: nn.Module, output: Callable[[Any], Any], visited: Tensor) -> list[Tensor]:
    """What the teacher outputs in each state, on the CPU: one tensor, or one for each part of a tuple."""
    parts, read = [], reader("dagger", teacher)
    with acting(teacher):
        for x in torch.split(visited, _LABEL_BATCH):
            found = output(teacher(read(x.float().numpy() if x.is_floating_point() else x.numpy())))
            found = list(found) if isinstance(found, (tuple, list)) else [found]
            if isinstance(found[0], Tensor):
                # A Gaussian's spread may be one parameter for all states.
                found[1:] = [item.expand_as(found[0]) if item.dim() < 2 else item for item in found[1:]]
            for item in found:
                if not isinstance(item, Tensor) or item.shape[:1] != x.shape[:1]:
                    got = list(item.shape) if isinstance(item, Tensor) else type(item).__name__
                    raise TypeError(f"dagger: the teacher must give tensors [{len(x)}, ...], got {got}")
                if not bool((item < math.inf).all()):  # minus infinity rules an action out
                    raise FloatingPointError("dagger: the teacher must give finite outputs, got NaN or Inf")
            parts.append([item.cpu() for item in found])
    return [torch.cat(items) for items in zip(*parts, strict=True)]


class Samples:
    """At most `capacity` rows of some tensors: all that were added, or a uniform draw of them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = whole("dagger", "capacity", capacity)
        self.seen = 0
        self.tensors: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.tensors[0]) if self.tensors else 0

    def add(self, rows: list[Tensor], draws: np.random.Generator) -> None:
        """Add rows by reservoir sampling: each ever added is kept with the same probability."""
        room = min(self.capacity - len(self), len(rows[0]))
        old = self.tensors or [item[:0] for item in rows]
        self.tensors = [torch.cat([a, b[:room]]) for a, b in zip(old, rows, strict=True)]
        ranks = self.seen + 1 + np.arange(room, len(rows[0]))
        places = np.floor(draws.random(len(ranks)) * ranks).astype(np.int64)
        # A place drawn twice goes to the later row.
        taken = {int(place): room + i for i, place in enumerate(places) if place < self.capacity}
        if taken:
            to, source = torch.tensor(list(taken)), torch.tensor(list(taken.values()))
            for mine, item in zip(self.tensors, rows, strict=True):
                mine[to] = item[source]
        self.seen += len(rows[0])

    def batches(self, size: int, generator: torch.Generator) -> _Batches:
        """A re-iterable of shuffled batches (observations, what the teacher output)."""
        return _Batches(self.tensors, size, generator)


class _Batches:
    """Whole batches are indexed at once, where a DataLoader would fetch and collate row by row."""

    def __init__(self, tensors: list[Tensor], size: int, generator: torch.Generator) -> None:
        self._tensors, self._size, self.generator = tensors, size, generator

    def __len__(self) -> int:
        return math.ceil(len(self._tensors[0]) / self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        order = torch.randperm(len(self._tensors[0]), generator=self.generator)
        for rows in torch.split(order, self._size):
            x, *told = (tensor[rows] for tensor in self._tensors)
            yield x, told[0] if len(told) == 1 else tuple(told)


class _Recorded(nn.Module):
    """A loss that finds the teacher's output in the place of the target."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def components(self) -> Mapping[str, Any]:
        """What the loss reports of the last batch."""
        return getattr(self.loss, "components", {})

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        return self.loss(student_out, target, None)


class _InRounds(Distiller):
    """Of whose training a fit is a part: steps are counted, and callbacks told, through all rounds."""

    def _count(self, steps: int | None) -> None:
        pass

    @contextmanager
    def _listening(self) -> Iterator[None]:
        yield

    def listening(self) -> AbstractContextManager[None]:
        """Around all rounds, what `_listening` is around one fit."""
        return super()._listening()


class _Run:
    """What a run has come to, in memory and in its checkpoint."""

    def __init__(
        self, student: nn.Module, distiller: Distiller, data: Samples, folder: Path | None, resume: bool
    ) -> None:
        self._student, self._distiller, self._data, self._folder = student, distiller, data, folder
        self.history: list[dict[str, float]] = []
        self._best: dict[str, Any] | None = None
        if folder is not None and resume and (folder / checkpoints.LAST).exists():
            self._restore(checkpoints.load_checkpoint(folder / checkpoints.LAST))

    def end_round(self, record: dict[str, float]) -> None:
        """Note the round, remember the student if it is the best, and save."""
        self.history.append(record)
        if "score" in record and (self._best is None or record["score"] > self._best["score"]):
            state = {name: value.clone() for name, value in self._student.state_dict().items()}
            self._best = {"score": record["score"], "student": state}
        if self._folder is None:
            return
        scheduler = self._distiller.scheduler
        state = {
            "format": checkpoints.FORMAT,
            "student": self._student.state_dict(),
            "loss_state": self._distiller.loss.state_dict(),  # type: ignore[attr-defined]
            "optimizer": self._distiller.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "callbacks": callbacks.states(self._distiller.callbacks),
            "global_step": self._distiller.global_step,
            "samples": self._data.tensors,
            "seen": self._data.seen,
            "history": self.history,
            "best": self._best,
            "random": checkpoints.random_state([]),
        }
        checkpoints.save_atomic(state, self._folder / checkpoints.LAST)

    def _restore(self, state: dict[str, Any]) -> None:
        if "samples" not in state:
            raise ValueError("dagger: checkpoint must be one of dagger's, got a Distiller's")
        checkpoints.check_fits("student", self._student, state["student"])
        if (state["scheduler"] is None) != (self._distiller.scheduler is None):
            raise ValueError("dagger: scheduler must be as at the checkpoint, given there or here alone")
        listening, saved = self._distiller.callbacks, state.get("callbacks", [])
        if len(saved) != len(listening):
            raise ValueError(
                f"dagger: callbacks must be as at the checkpoint ({len(saved)}), got {len(listening)}"
            )
        checkpoints.set_random_state(state["random"], [])
        self._distiller.optimizer.load_state_dict(state["optimizer"])
        if self._distiller.scheduler is not None:
            self._distiller.scheduler.load_state_dict(state["scheduler"])
        self._distiller.loss.load_state_dict(state["loss_state"])  # type: ignore[attr-defined]
        self._student.load_state_dict(state["student"])
        callbacks.load_states(listening, saved)
        self._distiller.global_step = state.get("global_step", 0)
        self._data.tensors, self._data.seen = state["samples"], state["seen"]
        self.history, self._best = state["history"], state["best"]

    def take_best(self) -> None:
        """Give the student the weights of its best round."""
        if self._best is not None:
            self._student.load_state_dict(self._best["student"])

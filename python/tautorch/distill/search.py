"""A small search over the settings of a distillation loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from tautorch.distill import checkpoint as checkpoints
from tautorch.distill import checks
from tautorch.distill.arguments import positive, unit_interval, whole
from tautorch.distill.distiller import Distiller
from tautorch.distill.losses import Loss, SoftTarget
from tautorch.distill.progress import Bar

if TYPE_CHECKING:
    from rich.progress import Progress

Method = Literal["grid", "halving"]


@dataclass(frozen=True)
class Trial:
    """One setting, trained for `epochs` once per seed, and its scores on the validation split."""

    temperature: float
    alpha: float
    epochs: int
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean over the seeds; minus infinity for a training that failed."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class SearchResult:
    """All trials in the order they ran, and the best of those that ran longest."""

    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        """The highest mean score of the trials with the most epochs; the earliest of equals."""
        longest = max(trial.epochs for trial in self.trials)
        return max((t for t in self.trials if t.epochs == longest), key=lambda trial: trial.score)

    def __str__(self) -> str:
        """A table, the best first."""
        lines = ["temperature  alpha  epochs      score  spread over seeds"]
        for trial in sorted(self.trials, key=lambda t: (-t.epochs, -t.score)):
            spread = max(trial.scores) - min(trial.scores) if math.isfinite(trial.score) else math.nan
            mark = " *" if trial is self.best else ""
            lines.append(
                f"{trial.temperature:11g}  {trial.alpha:5g}  {trial.epochs:6d}  {trial.score:9.5g}  "
                f"{spread:.3g}{mark}"
            )
        return "\n".join(lines)


def search(
    teacher: nn.Module | None,
    student: nn.Module,
    loader: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    *,
    epochs: int,
    temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    alphas: Sequence[float] = (0.1, 0.5, 0.9),
    loss: Callable[[float, float], Loss] | None = None,
    method: Method = "grid",
    eta: int = 3,
    seeds: Sequence[int] = (0,),
    scheduler: Callable[[Optimizer], Any] | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> SearchResult:
    """Train a copy of `student` with each temperature and alpha, and score it on a validation split.

    - "grid": every pair for `epochs`.
    - "halving": every pair for epochs / eta^k, the best eta^(k - 1) of them for eta times as long, and so on
      to the best one for `epochs`, k being the least that eta^k reaches all pairs (or the most that leaves
      an epoch); each rung trains anew, so that the last trial is what `Distiller` gives with its settings.
      Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification", arXiv:1502.07943.

    Given the same arguments the result is the same: each training starts from the same copy, from its seed,
    and from the loader's generators as they are now. The given student, the loader and the global random
    generators are left as they were. Score on data that is in neither the training nor the test split: the
    best of many trials is optimistic on the split it was chosen on.

    Args:
        teacher, student, loader: as in `Distiller` and its `fit`; `student` is copied, never trained.
        evaluate: the score of a student in eval mode, higher is better.
        optimizer: makes one over a copy's parameters, e.g. `lambda parameters: Adam(parameters, 1e-3)`.
        epochs: of the longest training.
        temperatures, alphas: what is tried, T > 0 and alpha in [0, 1]. With alpha 1 the temperature does not
            matter, and only the first is tried.
        loss: makes the loss from (temperature, alpha); `SoftTarget` by default. Of an nn.Module the optimizer
            is given the parameters too.
        eta: of "halving", >= 2.
        seeds: a training for each; the score is their mean.
        scheduler: makes one from the optimizer; None for none.
        options: more of `Distiller`'s, such as `clip_norm=`; callbacks cannot be shared by all trainings.

    A training whose loss is not finite scores minus infinity. Raises ValueError or TypeError for bad
    settings before anything runs, and RuntimeError if every training failed.
    """
    if method not in get_args(Method):
        raise ValueError(f"search: method must be one of {', '.join(get_args(Method))}, got {method!r}")
    whole("search", "epochs", epochs)
    whole("search", "eta", eta, 2)
    for name, values in (("temperatures", temperatures), ("alphas", alphas), ("seeds", seeds)):
        if not isinstance(values, Sequence) or not len(values):
            raise ValueError(f"search: {name} must be a list of at least one, got {values!r}")
    if not callable(evaluate) or not callable(optimizer):
        raise TypeError("search: evaluate and optimizer must be callables")
    if options.get("callbacks"):
        raise ValueError("search: callbacks must be left out, they would be shared by all trainings")
    settings = [
        (positive("search", "temperatures", t), unit_interval("search", "alphas", alpha))
        for alpha in dict.fromkeys(alphas)
        for t in dict.fromkeys(temperatures if alpha < 1 else temperatures[:1])
    ]
    checks.check_loader(loader, epochs)
    checks.check_models(teacher, student)
    make = loss if loss is not None else SoftTarget
    rungs = _rungs(method, len(settings), epochs, eta)
    result = SearchResult()
    total = sum(count for count, _ in rungs) * len(seeds)
    with Bar(progress, "search", total, 0) as bar:
        for count, length in rungs:
            trials = []
            for temperature, alpha in settings[:count]:
                scores = []
                for seed in seeds:
                    made = make(temperature, alpha)
                    score = _train(
                        *(teacher, student, loader, evaluate, optimizer, scheduler, made, length, seed),
                        options,
                    )
                    scores.append(score)
                    bar.advance(f"search T={temperature:g} alpha={alpha:g}", {"loss/score": score})
                trials.append(Trial(temperature, alpha, length, tuple(scores)))
            result.trials.extend(trials)
            ranked = sorted(trials, key=lambda trial: -trial.score)
            settings = [(trial.temperature, trial.alpha) for trial in ranked]
    if result.best.score == -math.inf:
        raise RuntimeError(
            "search: at least one training must stay finite, got NaN or Inf in all; lower the learning rate"
        )
    return result


def _rungs(method: Method, settings: int, epochs: int, eta: int) -> list[tuple[int, int]]:
    """(number of settings, epochs) of each round, the shortest first."""
    rungs = [(1, epochs)]
    while method == "halving" and rungs[0][0] < settings and rungs[0][1] >= eta:
        rungs.insert(0, (rungs[0][0] * eta, rungs[0][1] // eta))
    rungs[0] = (settings, rungs[0][1])
    return rungs


def _train(
    teacher: nn.Module | None,
    student: nn.Module,
    loader: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    scheduler: Callable[[Optimizer], Any] | None,
    loss: Loss,
    epochs: int,
    seed: int,
    options: dict[str, Any],
) -> float:
    generators = checkpoints.loader_generators(loader)
    before = checkpoints.random_state(generators)
    try:
        copied = copy.deepcopy(student)
        torch.manual_seed(seed)
        own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
        stepper = optimizer([*copied.parameters(), *own])
        made = {} if scheduler is None else {"scheduler": scheduler(stepper)}
        Distiller(teacher, copied, loss, stepper, progress=False, **made, **options).fit(loader, epochs)
        with torch.no_grad():
            score = float(evaluate(copied.eval()))
        return score if not math.isnan(score) else -math.inf
    except FloatingPointError:
        return -math.inf
    finally:
        checkpoints.set_random_state(before, generators)

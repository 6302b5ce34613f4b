"""Pruning little by little while the model trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tautorch._batches import Batches, check_batches
from tautorch._layers import select_layers
from tautorch.prune.choice import Rule, choose
from tautorch.prune.importance import Importance, LossOf, check_importance
from tautorch.prune.patterns import (
    Normalize,
    Ranking,
    check_normalize,
    check_ranking,
    check_share,
    check_sparsity,
    parse_pattern,
)
from tautorch.prune.pruner import MaskHandle, apply_choice

Kind = Literal["oneshot", "cubic", "steps", "iterative"]


class Schedule:
    """Raise a model's sparsity over its training, and keep the masks in between.

    Call `step()` after each optimizer step, or give it to `Distiller(callbacks=[schedule])`. Step t is the
    number of calls so far; masks are made again, from the weights of that moment, where t is due. Until
    the first of these it holds no zeros: of a model that is pruned already give `Distiller(keep_zeros=True)`.

    - "oneshot": the whole sparsity at step `begin`.
    - "cubic": s_t = s (1 - (1 - (t - begin) / (end - begin))^3) every `every` steps from `begin` to `end`
      (Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878).
    - "steps": the sparsities of `steps`, a mapping {step: sparsity} whose last one is the final.
    - "iterative": `rounds` rounds of pruning and fine-tuning: from `begin` on, every `every` steps, the same
      share of what is left goes, s_r = 1 - (1 - s)^(r / rounds) (Han et al. 2015, arXiv:1506.02626).

    An n:m pattern passes through ceil((1 - s_t) m):m on its way (Kao et al. 2022, arXiv:2209.07617).

    Args:
        model: pruned in place, step by step; nothing happens before the first step that is due.
        sparsity: the final one, in [0, 1); with "steps" it may be left out.
        every, begin, end: optimizer steps; `end` is needed by "cubic".
        rounds: of "iterative".
        rewind: after each renewal of the masks put all parameters and buffers back to what they were at this
            step (0: now), masked: lottery tickets (Frankle & Carbin 2019, arXiv:1803.03635) and, a little
            into training, their late form (Frankle et al. 2020, arXiv:1912.05671). Costs a copy of the model.
        optimizer: loses its momenta at each rewind (under a Distiller its own does); learning rates are the
            scheduler's business.
        pattern, importance, layers, calibration, ranking, dampening, loss, normalize, refit: as in
            `prune`; `calibration` must be re-iterable.

    Raises ValueError/TypeError for arguments out of range, before anything changes.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        pattern: str = "unstructured",
        importance: Importance = "magnitude",
        kind: Kind = "cubic",
        begin: int = 0,
        end: int | None = None,
        every: int = 1,
        steps: Mapping[int, float] | None = None,
        rounds: int | None = None,
        rewind: int | None = None,
        optimizer: Optimizer | None = None,
        layers: Iterable[str] | None = None,
        calibration: Batches | None = None,
        ranking: Ranking | None = None,
        dampening: float = 0.01,
        loss: LossOf | None = None,
        normalize: Normalize = "none",
        refit: int = 0,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"Schedule: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if not isinstance(layers, (str, type(None))):
            layers = list(layers)
        self._form = parse_pattern("Schedule", pattern)
        if ranking is not None:
            check_ranking("Schedule", ranking, self._form)
        check_normalize("Schedule", normalize, ranking or "local")
        if calibration is not None:
            check_batches("Schedule", calibration)
        if isinstance(calibration, Iterator):
            raise ValueError("Schedule: calibration must be re-iterable, got an iterator; pass a list")
        check_importance("Schedule", importance, calibration, loss)
        select_layers("Schedule", model, layers)
        self._plan = _plan(kind, sparsity, begin, end, every, steps, rounds)
        if rewind is not None and not 0 <= rewind < min(self._plan):
            raise ValueError(
                f"Schedule: rewind must be a step before the first pruning, {min(self._plan)}, got {rewind}"
            )
        self._final = self._plan[max(self._plan)]
        check_share("Schedule", self._form, self._final)
        self._model = model
        self._options: dict[str, Any] = {
            "importance": importance,
            "layers": layers,
            "calibration": calibration,
            "ranking": ranking,
            "dampening": dampening,
            "loss": loss,
            "normalize": normalize,
            "refit": refit,
        }
        self._handle = MaskHandle(model, {})
        self._rewind, self._optimizer = rewind, optimizer
        self._early: dict[str, Tensor] = _values(model) if rewind == 0 else {}
        self.steps_done = 0
        self.sparsity = 0.0

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks held now, by layer name; empty before the first due step."""
        return self._handle.masks

    @property
    def done(self) -> bool:
        """Whether the final sparsity is reached."""
        return self.steps_done >= max(self._plan)

    def step(self) -> float:
        """Count one optimizer step, renew the masks if due, apply them; returns the sparsity in force."""
        due = self._plan.get(self.steps_done + 1)
        if due is not None and due != self.sparsity:
            pattern, share = self._at(due)
            if pattern is not None:
                rule = Rule("Schedule", pattern=pattern, sparsity=share, **self._options)
                choice = choose(rule, self._model)
                apply_choice(self._model, choice)
                self._handle.update(choice.masks)
                self._go_back()
            self.sparsity = due
        else:
            self._handle.apply()
        self.steps_done += 1
        if self.steps_done == self._rewind:
            self._early = _values(self._model)
        return self.sparsity

    def _go_back(self) -> None:
        if self._rewind is None:
            return
        with torch.no_grad():
            for name, tensor in _tensors(self._model):
                tensor.copy_(self._early[name])
        self._handle.apply()
        if self._optimizer is not None:
            self._optimizer.state.clear()

    def _at(self, sparsity: float) -> tuple[str | None, float]:
        """The pattern and sparsity for now; no pattern where an n:m one would still keep everything."""
        if not self._form.of:
            return self._form.name, sparsity
        keep = max(self._form.keep, math.ceil((1 - sparsity) * self._form.of - 1e-9))
        if keep == self._form.of:
            return None, 0.0
        return f"{keep}:{self._form.of}", 1 - keep / self._form.of

    def mask_gradients(self) -> None:
        """See `MaskHandle.mask_gradients`."""
        self._handle.mask_gradients()

    def held_weights(self) -> list[Tensor]:
        """See `MaskHandle.held_weights`."""
        return self._handle.held_weights()

    def on_step(self, distiller: Any) -> None:
        """The Distiller's callback after each optimizer step."""
        if self._optimizer is None:
            self._optimizer = getattr(distiller, "optimizer", None)
        self.step()

    def remove(self) -> None:
        """Stop holding the masks; the weights stay zero until trained."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Steps done, sparsity, masks and the values to rewind to, for a checkpoint."""
        return {
            "steps_done": self.steps_done,
            "sparsity": self.sparsity,
            "early": dict(self._early),
            **self._handle.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; ValueError/TypeError, and no change, if its masks do not fit."""
        early = state.get("early", {})
        if self._rewind is not None and early and set(early) != {name for name, _ in _tensors(self._model)}:
            raise ValueError("Schedule: the checkpoint must hold the values of this model to rewind to")
        self._handle.load_state_dict(state)
        self._early = {name: value.clone() for name, value in early.items()}
        self.steps_done = int(state["steps_done"])
        self.sparsity = float(state["sparsity"])


def _plan(
    kind: Kind,
    sparsity: float | None,
    begin: int,
    end: int | None,
    every: int,
    steps: Mapping[int, float] | None,
    rounds: int | None,
) -> dict[int, float]:
    """{step: sparsity}, steps counted from 1."""
    if (rounds is not None) != (kind == "iterative"):
        raise ValueError(
            f'Schedule: rounds must be given with kind "iterative" and only there, got {rounds} and {kind!r}'
        )
    if (steps is not None) != (kind == "steps"):
        raise ValueError(f'Schedule: steps must be given with kind "steps" and only there, got kind {kind!r}')
    if begin < 0 or every < 1:
        raise ValueError(f"Schedule: begin must be >= 0 and every >= 1, got {begin} and {every}")
    if steps is not None:
        plan = {int(step): check_sparsity("Schedule", value) for step, value in sorted(steps.items())}
        values = list(plan.values())
        if not plan or min(plan) < 1 or values != sorted(values):
            raise ValueError(f"Schedule: steps must be {{step >= 1: rising sparsity}}, got {dict(steps)}")
        if sparsity is not None and check_sparsity("Schedule", sparsity) != values[-1]:
            raise ValueError(f"Schedule: sparsity must equal the last of steps, {values[-1]}, got {sparsity}")
        return plan
    if sparsity is None:
        raise ValueError(f"Schedule: sparsity must be given for kind {kind!r}, got None")
    final = check_sparsity("Schedule", sparsity)
    if kind == "oneshot":
        return {max(begin, 1): final}
    if rounds is not None:
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"Schedule: rounds must be an int >= 1, got {rounds!r}")
        due = {max(begin, 1) + (r - 1) * every: 1 - (1 - final) ** (r / rounds) for r in range(1, rounds)}
        return due | {max(begin, 1) + (rounds - 1) * every: final}
    if end is None or end <= begin:
        raise ValueError(f'Schedule: end must be a step after begin={begin} for kind "cubic", got {end}')
    times = sorted({*range(begin, end, every), end} - {0})
    return {t: final if t == end else final * (1 - (1 - (t - begin) / (end - begin)) ** 3) for t in times}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model)}

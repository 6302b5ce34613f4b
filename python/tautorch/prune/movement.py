"""Importance by movement: whether training takes a weight away from zero or towards it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tautorch._layers import check_still_plain, select_layers


class Movement:
    """Accumulates S = -sum over optimizer steps of G * W, and is an importance for `prune` and `Schedule`.

    Weights that training moves away from zero score high, those that it shrinks score low, whatever their
    size (Sanh et al. 2020, "Movement Pruning", arXiv:2005.07683). Scores are gathered just before each step
    of `optimizer`, from the gradients it is about to use (so after unscaling and clipping, and averaged over
    ranks under DDP), until `remove()`.

        movement = Movement(model, optimizer)
        schedule = Schedule(model, 0.9, importance=movement, end=1000, every=50)

    A pruned weight stands at zero and keeps its score, so it comes back, from zero, where others fall below
    it (the paper brings back its old value). Give it to the `Distiller`'s callbacks too, so that checkpoints
    hold its scores.

    Args:
        layers: names or shell patterns, None for every layer that owns its weight alone.

    Raises ValueError for a layer whose weight `optimizer` does not hold.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, layers: Iterable[str] | None = None) -> None:
        chosen = select_layers("Movement", model, layers)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if layers is None:
            chosen = {name: layer for name, layer in chosen.items() if id(layer.weight) in trained}
        for name, layer in chosen.items():
            if id(layer.weight) not in trained:
                raise ValueError(
                    f"Movement: optimizer must hold the weight of layer {name!r}, got it without"
                )
        if not chosen:
            raise ValueError("Movement: optimizer must hold the weight of a layer of the model, got none")
        self._layers = chosen
        self.scores: dict[str, Tensor] = {
            name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in chosen.items()
        }
        self.steps_done = 0
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._gather())

    def _gather(self) -> None:
        check_still_plain("Movement", self._layers)
        with torch.no_grad():
            for name, layer in self._layers.items():
                gradient = layer.weight.grad
                if gradient is not None:
                    score = self.scores[name] = self.scores[name].to(gradient.device)
                    score.addcmul_(gradient.float(), layer.weight.detach().float(), value=-1.0)
        self.steps_done += 1

    def __call__(self, name: str, layer: nn.Module) -> Tensor:
        """The score of a layer's weights; ValueError before the first step and for other layers."""
        if name not in self.scores:
            raise ValueError(f"Movement: layers must be those it watches, got {name!r}; pass the same layers")
        if self.steps_done == 0:
            raise ValueError("Movement: scores need at least one optimizer step, got none; train first")
        return self.scores[name]

    def on_step(self, distiller: Any) -> None:
        """The Distiller's callback; the scores were gathered before the step."""

    def remove(self) -> None:
        """Stop gathering; the scores stay."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Scores and steps, for a checkpoint."""
        scores = {name: score.clone() for name, score in self.scores.items()}
        return {"steps_done": self.steps_done, "scores": scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; ValueError, and no change, if its scores are of other layers."""
        scores: Mapping[str, Tensor] = state["scores"]
        shapes = {name: tuple(score.shape) for name, score in scores.items()}
        own = {name: tuple(score.shape) for name, score in self.scores.items()}
        if shapes != own:
            raise ValueError(f"Movement: the checkpoint must hold scores of {own}, got {shapes}")
        self.scores = {name: score.clone().to(self.scores[name].device) for name, score in scores.items()}
        self.steps_done = int(state["steps_done"])

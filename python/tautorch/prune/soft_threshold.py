"""Soft thresholding: weights shrink towards zero by a fixed step, and the small ones arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tautorch._layers import Layer, check_still_plain, layer_groups, pruned_share, select_layers
from tautorch.prune.patterns import Blocks, check_sparsity, parse_pattern

#: One threshold for all layers, or one by layer name.
Theta = float | Mapping[str, float]


def soft_threshold(weight: Tensor, theta: float | Tensor) -> Tensor:
    """sign(w) max(|w| - theta, 0): the proximal step of theta ||w||_1 (Donoho 1995; Daubechies et al. 2004).

    Args:
        weight: any shape, floating point.
        theta: >= 0, a number or a tensor that broadcasts to the weight.

    Returns a new tensor of the weight's dtype. Raises ValueError for a negative or NaN theta.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"soft_threshold: weight must be a floating point tensor, got {kind}")
    step = torch.as_tensor(theta, dtype=weight.dtype, device=weight.device)
    if not bool((step >= 0).all()):
        raise ValueError(f"soft_threshold: theta must be >= 0, got {theta}")
    return weight.sign() * (weight.abs() - step).clamp_min(0)


def threshold_for(weight: Tensor, sparsity: float) -> float:
    """The least theta at which soft thresholding leaves floor(sparsity * n) weights at zero."""
    share = check_sparsity("threshold_for", sparsity)
    return _quantile(weight.detach().abs(), share)


def _quantile(sizes: Tensor, share: float) -> float:
    count = math.floor(share * sizes.numel() + 1e-9)
    return float(sizes.flatten().kthvalue(count).values) if count else 0.0


class SoftThreshold:
    """Iterative soft thresholding (ISTA): after each optimizer step, the proximal step of an L1 penalty.

    With step size lr the penalty lam sum |w| moves each weight by lr lam towards zero and stops there, so
    that weights become exactly zero while training, which a penalty in the loss never makes them (Daubechies
    et al. 2004, "An iterative thresholding algorithm"; Beck & Teboulle 2009, FISTA). Under a block pattern
    the penalty is lam sum sqrt(size) ||block||_2, and blocks shrink and vanish whole (group lasso, Yuan & Lin
    2006; Wen et al. 2016, arXiv:1608.03665).

    Args:
        optimizer: its learning rate of each parameter is the step size, and its steps are hooked, until
            `remove()`. With Adam the shrinkage is lr lam all the same (decoupled, as decay is in AdamW).
        lam: the penalty's weight for all layers or by layer name; > 0. Or
        sparsity: each layer takes, at each step, the least threshold that leaves so much of it at zero, in
            [0, 1). It rises to that over `ramp` steps as s (1 - (1 - t / ramp)^3); what is at zero can come
            back, where its gradients outgrow others.
        layers: names or shell patterns, None for every layer that owns its weight alone and is trained.
        pattern: "unstructured", "4x1" or "BxB".

    Fine-tune with `hold_masks` afterwards: what survived was shrunk too. It makes zeros and holds none: of a
    model that is pruned already give `Distiller(keep_zeros=True)`, or False to let them come back.

    Raises ValueError/TypeError for arguments out of range, before anything changes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lam: Theta | None = None,
        *,
        sparsity: float | None = None,
        ramp: int = 1,
        layers: Iterable[str] | None = None,
        pattern: str = "unstructured",
    ) -> None:
        op = "SoftThreshold"
        self._form = parse_pattern(op, pattern)
        if self._form.of:
            raise ValueError(f'{op}: pattern must be "unstructured" or blocks, got {pattern!r}')
        if (lam is None) == (sparsity is None):
            raise ValueError(f"{op}: one of lam and sparsity must be given, got {lam} and {sparsity}")
        self._sparsity = None if sparsity is None else check_sparsity(op, sparsity)
        if isinstance(ramp, bool) or not isinstance(ramp, int) or ramp < 1:
            raise ValueError(f"{op}: ramp must be a number of steps >= 1, got {ramp!r}")
        self._ramp = ramp
        groups = _groups(optimizer)
        chosen = select_layers(op, model, layers)
        if layers is None:
            chosen = {name: layer for name, layer in chosen.items() if id(layer.weight) in groups}
        for name, layer in chosen.items():
            if id(layer.weight) not in groups:
                raise ValueError(f"{op}: optimizer must hold the weight of layer {name!r}, got it without")
        if not chosen:
            raise ValueError(f"{op}: optimizer must hold the weight of a layer of the model, got none")
        self._layers, self._optimizer = chosen, optimizer
        self._own = [layer.weight for layer in chosen.values() if not pruned_share(layer.weight)]
        self._lam = {name: _lam_of(op, name, lam) for name in chosen} if lam is not None else {}
        self.steps_done = 0
        self._hook = optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """One proximal step, now."""
        check_still_plain("SoftThreshold", self._layers)
        self.steps_done += 1
        groups = _groups(self._optimizer)
        with torch.no_grad():
            for name, layer in self._layers.items():
                sizes, spread = self._blocks(layer)
                if self._sparsity is None:
                    theta = float(groups[id(layer.weight)]["lr"]) * self._lam[name]
                else:
                    left = 1 - min(self.steps_done, self._ramp) / self._ramp
                    theta = _quantile(sizes, self._sparsity * (1 - left**3))
                if theta > 0:
                    # Not 1 - theta / sizes: torch takes a number over a tensor by way of the reciprocal, and
                    # what is theta itself may then keep 1e-16 of its size.
                    factor = ((sizes - theta) / sizes.clamp_min(1e-30)).clamp_min(0)
                    layer.weight.mul_(spread(factor).to(layer.weight.dtype))

    def _blocks(self, layer: Layer) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Root mean square of each block, which is |w| for single weights, and what spreads factors."""
        weight = layer.weight.detach()
        if self._form.rows == self._form.cols == 1:
            return weight.double().abs(), lambda factor: factor
        blocks = Blocks.of("SoftThreshold", weight.double().square(), self._form, layer_groups(layer))
        return blocks.scores.sqrt(), blocks.expand

    def held_weights(self) -> list[Tensor]:
        """The weights whose zeros are its own doing: those that were not pruned when it began."""
        return list(self._own)

    def on_step(self, distiller: Any) -> None:
        """The Distiller's callback; the optimizer's hook has done the step."""

    def remove(self) -> None:
        """Stop; the weights stay as they are."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Steps done, for a checkpoint."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.steps_done = int(state["steps_done"])


def _groups(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The group of each parameter, by identity; `load_state_dict` makes new groups."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _lam_of(op: str, name: str, lam: Theta) -> float:
    value = lam.get(name) if isinstance(lam, Mapping) else lam
    if value is None:
        raise ValueError(f"{op}: lam must name each layer, got none for {name!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{op}: lam must be a positive number, got {value!r} for {name!r}")
    return float(value)

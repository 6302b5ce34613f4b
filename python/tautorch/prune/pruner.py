"""Pruning a model: masks from scores, applied to the weights, held there, and reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tautorch import distributed
from tautorch._batches import Batches
from tautorch._layers import Layer, select_layers
from tautorch.nn.tail import grid_of, kept_of, leave_grid
from tautorch.prune.choice import Choice, Rule, choose
from tautorch.prune.importance import Importance, LossOf
from tautorch.prune.patterns import Normalize, Ranking


def compute_masks(
    model: nn.Module,
    importance: Importance = "magnitude",
    pattern: str = "unstructured",
    sparsity: float | Mapping[str, float] = 0.5,
    layers: Iterable[str] | None = None,
    calibration: Batches | None = None,
    ranking: Ranking | None = None,
    dampening: float = 0.01,
    loss: LossOf | None = None,
    normalize: Normalize = "none",
    refit: int = 0,
) -> dict[str, Tensor]:
    """The masks that `prune` would apply, by layer name; the model is left as it is. Arguments as there."""
    rule = Rule(
        "compute_masks",
        importance,
        pattern,
        sparsity,
        layers,
        calibration,
        ranking,
        dampening,
        loss,
        normalize,
    )
    return choose(rule, model).masks


def prune(
    model: nn.Module,
    importance: Importance = "magnitude",
    pattern: str = "unstructured",
    sparsity: float | Mapping[str, float] = 0.5,
    layers: Iterable[str] | None = None,
    calibration: Batches | None = None,
    ranking: Ranking | None = None,
    dampening: float = 0.01,
    loss: LossOf | None = None,
    normalize: Normalize = "none",
    refit: int = 0,
) -> nn.Module:
    """Set the least important weights of a model's Linear and Conv2d layers to zero, in place.

    Args:
        model: changed in place and returned; unchanged if anything fails.
        importance: "magnitude", "activation" (Wanda), "mean_activation", "gradient", "gradient_squared",
            "sparsegpt" (all but the first need `calibration`) or a callable (name, layer) -> score, such as
            a `Movement`; see `tautorch.prune.importance`. "sparsegpt" also changes the weights it keeps, so
            that the layers' outputs stay; see `tautorch.prune.sparsegpt`.
        pattern: "unstructured", "n:m", "4x1", "16x16", "32x32" or "64x64"; see `tautorch.prune.patterns`.
        sparsity: share to remove, in [0, 1). n:m patterns take exactly 1 - n / m. Or {layer name: share}, as
            `sensitivity(...).suggest(...)` gives it: layers with 0, and those not named, stay as they are.
        layers: names or shell patterns ("encoder.*"); None takes every layer that owns its weight alone,
            with "activation" every such layer that calibration runs.
        calibration: batches of what the model takes, run in eval mode.
        ranking: "local" ranks within a layer, "row" within a row of blocks, "global" over all the layers.
            None is "row" for unstructured "activation", as its paper has it, and "local" otherwise.
        loss: (model, batch) -> scalar, for the gradients; a batch is as `calibration` gives it.
        normalize: how scores are made comparable for ranking="global": "none", "mean" or "lamp"; see
            `make_global_masks`. For magnitudes "lamp" or "mean"; gradients and "sparsegpt" are in units of a
            loss already.
        refit: steps of fitting the kept weights again to the dense layer's outputs on `calibration`, with any
            importance, 0 for none; see `tautorch.prune.refit`. 20 is a good number; each costs a product of
            the weight with X X^T.
        dampening: of "sparsegpt" and `refit`: added to the diagonal of X X^T, as a share of its mean.

    Zeros alone do not last through training: see `hold_masks` and `Schedule`.
    """
    rule = Rule(
        "prune",
        importance,
        pattern,
        sparsity,
        layers,
        calibration,
        ranking,
        dampening,
        loss,
        normalize,
        refit,
    )
    apply_choice(model, choose(rule, model))
    return model


def apply_choice(model: nn.Module, choice: Choice) -> None:
    """Put the choice's weights in place and zero what its masks remove."""
    with torch.no_grad():
        for name, new in choice.weights.items():
            weight = _weight(model, name)
            distributed.local_tensor(weight).copy_(distributed.local_part(new, weight))
    apply_masks(model, choice.masks)


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the weights of the named layers where their mask is False; checks every mask before the first."""
    _apply("apply_masks", model, masks)


def _apply(op: str, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    layers = {name: _checked(op, model, name, mask) for name, mask in masks.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            mask = masks[name].to(layer.weight.device)
            steps = None if distributed.is_sharded(layer.weight) else grid_of(layer)
            before = None if steps is None else kept_of(layer)
            # Of a sharded weight each rank zeroes its own part.
            kept = distributed.local_part(mask, layer.weight)
            distributed.local_tensor(layer.weight).masked_fill_(~kept, 0.0)
            if steps is not None:
                leave_grid(layer, steps, mask if before is None else mask & before)


def masks_from_zeros(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Masks of the weights that are not zero, for the layers that have zeros.

    With `layers` None, a layer of nothing but zeros is left out: that is how some layers are initialised,
    and no pruning here leaves one.
    """
    masks: dict[str, Tensor] = {}
    for name, layer in select_layers("masks_from_zeros", model, layers).items():
        mask = distributed.full_tensor(layer.weight).detach() != 0
        if layers is not None or (bool(mask.any()) and not bool(mask.all())):
            masks[name] = mask
    return masks


def hold_masks(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None, optimizer: Optimizer | None = None
) -> MaskHandle:
    """Keep pruned weights at zero through fine-tuning.

    Args:
        masks: by layer name; None takes the zeros that are in the weights now.
        optimizer: the masks are applied after each of its steps, by a hook, until `remove()`. Without it,
            call `apply()` after each step, or give the handle to `Distiller(callbacks=[handle])`.

    Raises ValueError when the model has no zeros to hold, or a mask does not fit its layer.
    """
    found = dict(masks) if masks is not None else masks_from_zeros(model)
    if not found:
        raise ValueError("hold_masks: the model must have pruned weights, got none; call prune first")
    return MaskHandle(model, found, optimizer)


class MaskHandle:
    """Masks held on a model; see `hold_masks`. A context manager that removes itself, and a callback."""

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None
    ) -> None:
        self._model = model
        self._masks: dict[str, Tensor] = {}
        # On the weights' devices; of a sharded weight this rank's part.
        self._parts: dict[str, Tensor] = {}
        self.update(masks)
        self._hook: RemovableHandle | None = None
        if optimizer is not None:
            self._hook = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self.apply()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name (empty once removed)."""
        return dict(self._masks)

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Hold these masks from now on, and apply them at once; ValueError/TypeError if one does not fit."""
        _apply("hold_masks", self._model, masks)
        self._masks = {name: mask.clone() for name, mask in masks.items()}
        self._parts = {}

    def apply(self) -> None:
        """Set the masked weights to zero, now."""
        with torch.no_grad():
            for name, weight in self._held():
                distributed.local_tensor(weight).masked_fill_(~self._part(name, weight), 0.0)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by layer name, without those parametrised since: QAT, clusters and gates hold zeros."""
        for name in self._masks:
            if not parametrize.is_parametrized(self._model.get_submodule(name), "weight"):
                yield name, _weight(self._model, name)

    def _part(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._parts or self._parts[name].device != weight.device:
            self._parts[name] = distributed.local_part(self._masks[name].to(weight.device), weight)
        return self._parts[name]

    def mask_gradients(self) -> None:
        """Set the masked weights' gradients to zero, now: before their norm is taken, to clip by it."""
        for name, weight in self._held():
            if weight.grad is not None:
                distributed.local_tensor(weight.grad).masked_fill_(~self._part(name, weight), 0.0)

    def held_weights(self) -> list[Tensor]:
        """The weights whose zeros it holds: what a `Distiller` asks before it trains a pruned student."""
        return [weight for _, weight in self._held()]

    def on_step(self, distiller: Any) -> None:
        """The Distiller's callback after each optimizer step."""
        self.apply()

    def remove(self) -> None:
        """Let the weights go; they stay zero until trained."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._masks, self._parts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The masks, for a checkpoint."""
        return {"masks": {name: mask.clone() for name, mask in self._masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold the masks of a checkpoint."""
        self.update(state["masks"])

    def __enter__(self) -> MaskHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _weight(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"prune: layer {name!r} must have a weight tensor, got {type(layer).__name__}; remove() the "
            "masks before the layer is replaced"
        )
    return weight


def _checked(op: str, model: nn.Module, name: str, mask: Tensor) -> Layer:
    """The layer of that name, whose weight the mask fits."""
    layer = select_layers(op, model, [name])[name]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: the mask of layer {name!r} must be bool (True = kept), got {kind}")
    if mask.shape != layer.weight.shape:
        raise ValueError(
            f"{op}: the mask of layer {name!r} must be {list(layer.weight.shape)} like its weight, "
            f"got {list(mask.shape)}"
        )
    return layer

"""Choosing what to remove: one rule for `prune`, `compute_masks` and `Schedule`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tautorch import distributed
from tautorch._batches import Batches
from tautorch._gram import input_grams, inverse_factor
from tautorch._layers import Layer, layer_groups, select_layers
from tautorch.nn.tail import grid_of
from tautorch.prune.importance import Importance, LossOf, check_importance, importance_scores
from tautorch.prune.patterns import (
    Normalize,
    Pattern,
    Ranking,
    check_normalize,
    check_ranking,
    check_share,
    check_sparsity,
    make_global_masks,
    make_mask,
    parse_pattern,
)
from tautorch.prune.sparsegpt import first_costs, sparsegpt


@dataclass(frozen=True)
class Rule:
    """What `prune` was asked for; the fields are its arguments."""

    op: str
    importance: Importance = "magnitude"
    pattern: str = "unstructured"
    sparsity: float = 0.5
    layers: Iterable[str] | None = None
    calibration: Batches | None = None
    ranking: Ranking | None = None
    dampening: float = 0.01
    loss: LossOf | None = None
    normalize: Normalize = "none"

    def form(self) -> Pattern:
        """The parsed pattern."""
        return parse_pattern(self.op, self.pattern)

    def chosen_ranking(self) -> Ranking:
        """The ranking in force: the one asked for, or that of the importance's paper."""
        as_paper: Ranking = (
            "row" if self.importance == "activation" and self.pattern == "unstructured" else "local"
        )
        return self.ranking if self.ranking is not None else as_paper


@dataclass(frozen=True)
class Choice:
    """Masks by layer name (True = kept), and the weights that take the place of the old where they change."""

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]


def choose(rule: Rule, model: nn.Module) -> Choice:
    """Decide what `rule` removes from `model`, which is left as it is."""
    op, form = rule.op, rule.form()
    share = check_sparsity(op, rule.sparsity)
    ranking = rule.chosen_ranking()
    check_ranking(op, ranking, form)
    check_share(op, form, share)
    check_normalize(op, rule.normalize, ranking)
    check_importance(op, rule.importance, rule.calibration, rule.loss)
    targets = select_layers(op, model, rule.layers)
    for name, layer in targets.items():
        if not bool(torch.isfinite(distributed.full_tensor(layer.weight)).all()):
            raise ValueError(f"{op}: the weight of layer {name!r} must be finite, got NaN or Inf")
    if rule.importance == "sparsegpt":
        return _compensated(rule, model, targets, share, ranking)
    scores = importance_scores(
        op, model, targets, rule.importance, rule.calibration, rule.layers is not None, rule.loss
    )
    groups = {name: layer_groups(targets[name]) for name in scores}
    if ranking == "global":
        return Choice(make_global_masks(scores, rule.pattern, share, groups, rule.normalize), {})
    masks = {
        name: make_mask(score, rule.pattern, share, groups[name], ranking) for name, score in scores.items()
    }
    return Choice(masks, {})


def _compensated(
    rule: Rule, model: nn.Module, targets: Mapping[str, Layer], share: float, ranking: Ranking
) -> Choice:
    op, form = rule.op, rule.form()
    if rule.calibration is None:
        raise ValueError(f'{op}: calibration must hold batches for importance "sparsegpt", got None')
    for name, layer in targets.items():
        if grid_of(layer) is not None:
            raise ValueError(
                f"{op}: layer {name!r} must not be quantised yet, sparsegpt moves weights off their grid; "
                "prune first (quantize.gptq and prepare_qat keep the zeros)"
            )
    grams = input_grams(op, model, targets, rule.calibration, named=rule.layers is not None)
    factors = {
        name: inverse_factor(op, name, gram.to(targets[name].weight.device), rule.dampening)
        for name, gram in grams.items()
    }
    matrices = {name: _matrix(targets[name]) for name in factors}
    fixed: Mapping[str, Tensor] = {}
    if ranking == "global":
        costs = {name: first_costs(matrices[name], *factors[name], form) for name in factors}
        shaped = {name: cost.reshape(targets[name].weight.shape) for name, cost in costs.items()}
        groups = {name: layer_groups(targets[name]) for name in shaped}
        fixed = make_global_masks(shaped, rule.pattern, share, groups, rule.normalize)
    masks, weights = {}, {}
    for name, matrix in matrices.items():
        given = fixed[name].reshape(matrix.shape) if name in fixed else None
        new, mask = sparsegpt(op, matrix, *factors[name], form, share, ranking == "row", given)
        like = targets[name].weight
        weights[name] = new.reshape(like.shape).to(like.dtype)
        masks[name] = mask.reshape(like.shape)
        if not bool(torch.isfinite(weights[name]).all()):
            raise ValueError(
                f"{op}: the compensated weight of layer {name!r} must be finite, got NaN or Inf in "
                f"{like.dtype}; raise dampening"
            )
    return Choice(masks, weights)


def _matrix(layer: Layer) -> Tensor:
    groups = layer_groups(layer)
    weight = distributed.full_tensor(layer.weight).detach().double()
    return weight.reshape(groups, weight.shape[0] // groups, -1)

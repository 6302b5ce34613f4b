"""Choosing what to remove: one rule for `prune`, `compute_masks` and `Schedule`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tautorch import distributed
from tautorch._batches import Batches, check_batches
from tautorch._gram import check_dampening, input_grams, inverse_factor
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
from tautorch.prune.refit import refit
from tautorch.prune.sparsegpt import first_costs, sparsegpt


@dataclass(frozen=True)
class Rule:
    """What `prune` was asked for; the fields are its arguments."""

    op: str
    importance: Importance = "magnitude"
    pattern: str = "unstructured"
    sparsity: float | Mapping[str, float] = 0.5
    layers: Iterable[str] | None = None
    calibration: Batches | None = None
    ranking: Ranking | None = None
    dampening: float = 0.01
    loss: LossOf | None = None
    normalize: Normalize = "none"
    refit: int = 0

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
    ranking = rule.chosen_ranking()
    check_ranking(op, ranking, form)
    if isinstance(rule.sparsity, Mapping):
        _check_by_layer(op, rule.sparsity, rule.layers, ranking)
        rule = replace(rule, layers=list(rule.sparsity))
    else:
        check_share(op, form, check_sparsity(op, rule.sparsity))
    check_normalize(op, rule.normalize, ranking)
    check_importance(op, rule.importance, rule.calibration, rule.loss)
    if isinstance(rule.refit, bool) or not isinstance(rule.refit, int) or rule.refit < 0:
        raise ValueError(f"{op}: refit must be a number of steps >= 0 (20 as a rule), got {rule.refit!r}")
    if rule.refit and rule.calibration is None:
        raise ValueError(f"{op}: calibration must hold batches for refit={rule.refit}, got None")
    targets = select_layers(op, model, rule.layers)
    shares = _shares(rule, form, targets)
    targets = {name: layer for name, layer in targets.items() if name in shares}
    if not targets:
        return Choice({}, {})
    for name, layer in targets.items():
        if not bool(torch.isfinite(distributed.full_tensor(layer.weight)).all()):
            raise ValueError(f"{op}: the weight of layer {name!r} must be finite, got NaN or Inf")
    if rule.refit or rule.importance == "sparsegpt":
        _check_off_grid(op, targets, "refit" if rule.refit else "sparsegpt")
    if rule.importance == "sparsegpt":
        return _compensated(rule, model, targets, shares, ranking)
    if rule.refit and rule.calibration is not None:
        # Run twice: for the scores and for the fit.
        check_batches(op, rule.calibration)
        rule = replace(rule, calibration=list(rule.calibration))
    scores = importance_scores(
        op, model, targets, rule.importance, rule.calibration, rule.layers is not None, rule.loss
    )
    groups = {name: layer_groups(targets[name]) for name in scores}
    if ranking == "global":
        masks = make_global_masks(scores, rule.pattern, next(iter(shares.values())), groups, rule.normalize)
    else:
        masks = {
            name: make_mask(score, rule.pattern, shares[name], groups[name], ranking)
            for name, score in scores.items()
        }
    return (
        _refitted(rule, model, {name: targets[name] for name in masks}, masks)
        if rule.refit
        else Choice(masks, {})
    )


def _check_by_layer(
    op: str, sparsity: Mapping[str, float], layers: Iterable[str] | None, ranking: Ranking
) -> None:
    if layers is not None:
        raise ValueError(f"{op}: layers must be None where sparsity names them, got both")
    if ranking == "global":
        raise ValueError(
            f'{op}: ranking must be "local" or "row" where each layer has a sparsity, got "global"'
        )
    for value in sparsity.values():
        check_sparsity(op, value)


def _shares(rule: Rule, form: Pattern, targets: Mapping[str, Layer]) -> dict[str, float]:
    """What to remove of each layer; of those with a sparsity of their own, the ones that lose anything."""
    if not isinstance(rule.sparsity, Mapping):
        return dict.fromkeys(targets, float(rule.sparsity))
    for name, share in rule.sparsity.items():
        if name not in targets:
            raise ValueError(f"{rule.op}: sparsity must name layers, got the pattern {name!r}")
        if share > 0:
            check_share(rule.op, form, share)
    return {name: float(share) for name, share in rule.sparsity.items() if share > 0}


def _check_off_grid(op: str, targets: Mapping[str, Layer], what: str) -> None:
    for name, layer in targets.items():
        if grid_of(layer) is not None:
            raise ValueError(
                f"{op}: layer {name!r} must not be quantised yet, {what} moves weights off their grid; "
                "prune first (quantize.gptq and prepare_qat keep the zeros)"
            )


def _refitted(rule: Rule, model: nn.Module, targets: Mapping[str, Layer], masks: dict[str, Tensor]) -> Choice:
    """The masks with weights fitted to them; a layer that calibration does not run keeps its own."""
    if rule.calibration is None:
        raise ValueError(f"{rule.op}: calibration must hold batches for refit={rule.refit}, got None")
    check_dampening(rule.op, rule.dampening)
    grams = input_grams(rule.op, model, targets, rule.calibration, named=rule.layers is not None)
    weights: dict[str, Tensor] = {}
    for name, gram in grams.items():
        matrix = _matrix(targets[name])
        mask = masks[name].to(matrix.device).reshape(matrix.shape)
        start = matrix.masked_fill(~mask, 0.0)
        fitted = refit(start, matrix, gram.to(matrix.device), mask, rule.dampening, rule.refit)
        weights[name] = _in_place_of(rule.op, name, targets[name], fitted)
    return Choice(masks, weights)


def _in_place_of(op: str, name: str, layer: Layer, matrix: Tensor) -> Tensor:
    """In the weight's shape and dtype; ValueError where it does not fit that."""
    weight = matrix.reshape(layer.weight.shape).to(layer.weight.dtype)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{op}: the compensated weight of layer {name!r} must be finite, got NaN or Inf in "
            f"{weight.dtype}; raise dampening"
        )
    return weight


def _compensated(
    rule: Rule, model: nn.Module, targets: Mapping[str, Layer], shares: Mapping[str, float], ranking: Ranking
) -> Choice:
    op, form = rule.op, rule.form()
    if rule.calibration is None:
        raise ValueError(f'{op}: calibration must hold batches for importance "sparsegpt", got None')
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
        fixed = make_global_masks(shaped, rule.pattern, next(iter(shares.values())), groups, rule.normalize)
    masks, weights = {}, {}
    for name, matrix in matrices.items():
        given = fixed[name].reshape(matrix.shape) if name in fixed else None
        new, mask = sparsegpt(op, matrix, *factors[name], form, shares[name], ranking == "row", given)
        if rule.refit:
            new = refit(new, matrix, grams[name].to(matrix.device), mask, rule.dampening, rule.refit)
        weights[name] = _in_place_of(op, name, targets[name], new)
        masks[name] = mask.reshape(targets[name].weight.shape)
    return Choice(masks, weights)


def _matrix(layer: Layer) -> Tensor:
    groups = layer_groups(layer)
    weight = distributed.full_tensor(layer.weight).detach().double()
    return weight.reshape(groups, weight.shape[0] // groups, -1)

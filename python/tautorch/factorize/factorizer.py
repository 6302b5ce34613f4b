"""Replacing layers by the product of two smaller ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tautorch._batches import Batches, check_batches, left_as_it_is, model_device, to_device
from tautorch._gram import input_grams
from tautorch._layers import Layer, pruned_share, replace_layers, select_layers
from tautorch.capture import capture
from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear, TuckerConv2d
from tautorch.factorize.ranks import Allocation, Compiler, Size, allocate, fast_rank
from tautorch.factorize.targets import PairTarget, Rank, Target, TuckerTarget
from tautorch.nn.tail import grid_of
from tautorch.ownership import refusal

Method = Literal["svd", "whitened", "tucker"]


def factorize(
    model: nn.Module,
    method: Method = "svd",
    *,
    rank: Rank | Mapping[str, Rank] | Literal["vbmf"] | None = None,
    energy: float | None = None,
    budget: float | None = None,
    speedup: float | None = None,
    allocation: Allocation | None = None,
    multiple: int = 1,
    layers: Iterable[str] | None = None,
    calibration: Batches | None = None,
    ignore_zeros: bool = False,
    compiled: Compiler | None = None,
    baseline: Compiler | None = None,
) -> nn.Module:
    """Replace Linear and Conv2d layers by low-rank pairs, in place.

    Args:
        model: changed in place and returned; unchanged if anything fails.
        method: "svd": the weight's own best approximation (Eckart & Young 1936; for networks Denton et al.
            2014, arXiv:1404.0736). "whitened": the best on the calibration's inputs, convolutions' unfolded
            ones too (Wang et al. 2024, SVD-LLM, arXiv:2403.07378). "tucker": Tucker-2 of kh x kw
            convolutions without groups (Kim et al. 2016, arXiv:1511.06530).
        rank: inner channels (of each group), one for all layers or by layer name; or "vbmf": as many as stand
            out of noise by variational Bayes (Nakajima et al. 2013), as the paper of "tucker" has it.
        energy: share of the squared singular values to keep, in (0, 1]; of the outputs' energy if whitened.
        budget: share of the weights to keep, in (0, 1), of all the layers' together unless `allocation` says
            otherwise.
        speedup: the largest rank whose compiled layer was measured this many times as fast as the dense
            layer (95 % confidence) on every shape that calibration gives it; a layer with none stays dense.
            Takes seconds a layer. Exactly one of rank, energy, budget and speedup must be given.
        allocation: of a budget. "model", the default, shares it out where it keeps most (Kim et al. 2019,
            arXiv:1811.12781), and a layer may stay dense; "layer" gives every layer the same.
        multiple: ranks that are chosen are multiples of it; `rank=` is taken as it is.
        layers: names or shell patterns; None takes every layer that may be replaced and gets smaller (and,
            if whitened or timed, that calibration runs). Pruned and quantised layers may not: their factors
            would have neither the zeros nor the grid.
        calibration: batches of what the model takes, for "whitened" and `speedup`.
        ignore_zeros: factorise pruned layers all the same.
        compiled, baseline: for `speedup`, what is timed: functions of the pair and of the dense layer. By
            default the float32 `LowRankLinear` or `LowRankConv2d`, and the layer itself.

    A linear layer becomes `FactorizedLinear(down, up)`, a convolution `FactorizedConv2d(down, up)` with the
    kh x kw part in `down`, or `TuckerConv2d(down, core, up)`. Raises ValueError for a named layer that
    cannot be replaced (tied, read by its parent, hooked, pruned, quantised) or would not get smaller.
    """
    if method not in get_args(Method):
        raise ValueError(f"factorize: method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if allocation is None:
        allocation = "layer" if budget is None else "model"
    size = Size(rank, energy, budget, speedup, allocation, multiple)
    size.check(method)
    if calibration is None:
        for what, needs in (('method "whitened"', method == "whitened"), ("speedup", speedup is not None)):
            if needs:
                raise ValueError(f"factorize: calibration must hold batches for {what}, got None")
    else:
        check_batches("factorize", calibration)
        calibration = list(calibration)
    if layers is None and isinstance(rank, Mapping):
        layers = list(rank)
    chosen = _replaceable(model, method, layers, ignore_zeros)
    for name, layer in chosen.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"factorize: the weight of layer {name!r} must be finite, got NaN or Inf")
    grams: Mapping[str, Tensor] = {}
    if method == "whitened" and calibration is not None:
        grams = input_grams("factorize", model, chosen, calibration, named=layers is not None)
        chosen = {name: chosen[name] for name in grams}
    targets: list[Target] = [
        TuckerTarget(name, layer) if method == "tucker" else PairTarget(name, layer, grams.get(name))
        for name, layer in chosen.items()
    ]
    if speedup is not None:
        ranks = _timed(model, targets, list(calibration or ()), size, compiled, baseline)
    else:
        ranks = _sized(targets, size, strict=layers is not None)
    new: dict[str, nn.Module] = {t.name: t.build(ranks[t.name]) for t in targets if t.name in ranks}
    if not new:
        wanted = (
            "faster, got none; ask for less"
            if speedup is not None
            else "smaller, got none; ask for a lower rank"
        )
        raise ValueError(f"factorize: at least one layer must get {wanted}")
    replace_layers(model, new)
    return model


def _sized(targets: Sequence[Target], size: Size, strict: bool) -> dict[str, Rank]:
    """Ranks by number, energy or budget; where one would not fit, an error if `strict`, or none."""
    if size.allocation == "model" and size.budget is not None:
        return allocate(targets, size.budget, size.multiple)
    ranks: dict[str, Rank] = {}
    for target in targets:
        rank = size.rank_of(target)
        problem = target.problem(0 if rank is None else rank)
        if rank is not None and problem is None:
            ranks[target.name] = rank
        elif strict:
            raise ValueError(f"factorize: {problem}")
    return ranks


def _timed(
    model: nn.Module,
    targets: Sequence[Target],
    batches: list[Any],
    size: Size,
    compiled: Compiler | None,
    baseline: Compiler | None,
) -> dict[str, Rank]:
    device = model_device(model)
    with left_as_it_is(model):
        layers = {t.name: t.layer for t in targets}
        calls = capture("factorize", model, layers, [to_device(batch, device) for batch in batches])
        ranks = {
            t.name: fast_rank(t, calls[t.name], size.speedup or 1.0, size.multiple, compiled, baseline)
            for t in targets
            if calls[t.name]
        }
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _replaceable(
    model: nn.Module, method: str, layers: Iterable[str] | None, ignore_zeros: bool
) -> dict[str, Layer]:
    targets = select_layers("factorize", model, layers)
    reasons = {
        name: _why_not(model, name, layer, method) or _undone(layer, ignore_zeros)
        for name, layer in targets.items()
    }
    if layers is not None:
        for name, reason in reasons.items():
            if reason is not None:
                raise ValueError(f"factorize: layer {name!r} must be replaceable, got one where {reason}")
    elif all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise ValueError(
            f"factorize: at least one layer must get smaller, got none that may be replaced "
            f"({name!r}: {reason})"
        )
    return {name: layer for name, layer in targets.items() if reasons[name] is None}


def _why_not(model: nn.Module, name: str, layer: Layer, method: str) -> str | None:
    if not name:
        return "it is the whole model; wrap it in nn.Sequential"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, (FactorizedLinear, FactorizedConv2d, TuckerConv2d)):
        return "it is a factor already"
    if method == "tucker" and not (
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and max(layer.kernel_size) > 1
    ):
        return 'tucker does not apply (it takes convolutions larger than 1x1, without groups); use "svd"'
    return refusal(model, name)


def _undone(layer: Layer, ignore_zeros: bool) -> str | None:
    """What factors would undo."""
    if grid_of(layer) is not None:
        return "its weight is quantised, and factors would leave its grid; factorise first, then quantise"
    if not ignore_zeros and (share := pruned_share(layer.weight)):
        return (
            f"{share:.0%} of its weights are pruned, and factors would fill them; factorise first and prune "
            "the factors, or give ignore_zeros=True"
        )
    return None

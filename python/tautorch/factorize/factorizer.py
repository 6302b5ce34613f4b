"""Replacing layers by the product of two smaller ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from tautorch._batches import Batches
from tautorch._gram import input_grams
from tautorch._layers import Layer, layer_groups, replace_layers, select_layers
from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear, TuckerConv2d
from tautorch.factorize.svd import Svd, largest, mode_ranks, tucker2
from tautorch.ownership import refusal

Method = Literal["svd", "whitened", "tucker"]
#: Inner channels, for "tucker" also (r_in, r_out).
Rank = int | tuple[int, int]
_L = TypeVar("_L", nn.Linear, nn.Conv2d)
# Tucker ranks of a budget grow together in these steps of the layer's own channels.
_STEPS = 64


@dataclass(frozen=True)
class _Size:
    """How the rank is asked for: exactly one of the three."""

    rank: Rank | Mapping[str, Rank] | None
    energy: float | None
    budget: float | None


def factorize(
    model: nn.Module,
    method: Method = "svd",
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    energy: float | None = None,
    budget: float | None = None,
    layers: Iterable[str] | None = None,
    calibration: Batches | None = None,
) -> nn.Module:
    """Replace Linear and Conv2d layers by low-rank pairs, in place.

    Args:
        model: changed in place and returned; unchanged if anything fails.
        method: "svd": the weight's own best approximation (Eckart & Young 1936; for networks Denton et al.
            2014, arXiv:1404.0736). "whitened": the best on the calibration's inputs (Wang et al. 2024,
            SVD-LLM, arXiv:2403.07378). "tucker": Tucker-2 of kh x kw convolutions without groups (Kim et al.
            2016, arXiv:1511.06530).
        rank: inner channels (of each group), one for all layers or by layer name.
        energy: share of the squared singular values to keep, in (0, 1]; of the outputs' energy if whitened.
        budget: share of each layer's weights to keep, in (0, 1). Exactly one of the three must be given.
        layers: names or shell patterns; None takes every layer that may be replaced and gets smaller (and,
            if whitened, that calibration runs).
        calibration: batches of what the model takes, for "whitened".

    A linear layer becomes `FactorizedLinear(down, up)`, a convolution `FactorizedConv2d(down, up)` with the
    kh x kw part in `down`, or `TuckerConv2d(down, core, up)`. Raises ValueError for a named layer that cannot
    be replaced (tied, read by its parent, hooked) or that the rank would not make smaller.
    """
    if method not in get_args(Method):
        raise ValueError(f"factorize: method must be one of {', '.join(get_args(Method))}, got {method!r}")
    size = _check_size(method, rank, energy, budget)
    if method == "whitened" and calibration is None:
        raise ValueError('factorize: calibration must hold batches for method "whitened", got None')
    if layers is None and isinstance(rank, Mapping):
        layers = list(rank)
    targets = _replaceable(model, method, layers)
    for name, layer in targets.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"factorize: the weight of layer {name!r} must be finite, got NaN or Inf")
    grams: Mapping[str, Tensor] = {}
    if method == "whitened" and calibration is not None:
        grams = input_grams("factorize", model, targets, calibration, named=layers is not None)
        targets = {name: targets[name] for name in grams}
    new: dict[str, nn.Module] = {}
    for name, layer in targets.items():
        strict = layers is not None
        pair: nn.Module | None
        if method == "tucker":
            pair = _tucker(name, layer, size, strict)
        else:
            pair = _pair(name, layer, size, grams.get(name), strict)
        if pair is not None:
            new[name] = pair
    if not new:
        raise ValueError("factorize: at least one layer must get smaller, got none; ask for a lower rank")
    replace_layers(model, new)
    return model


def _check_size(
    method: str, rank: Rank | Mapping[str, Rank] | None, energy: float | None, budget: float | None
) -> _Size:
    if sum(value is not None for value in (rank, energy, budget)) != 1:
        raise ValueError(
            f"factorize: one of rank, energy and budget must be given, got {rank}, {energy} and {budget}"
        )
    ranks = rank.values() if isinstance(rank, Mapping) else () if rank is None else (rank,)
    for value in ranks:
        parts = value if isinstance(value, tuple) and len(value) == 2 and method == "tucker" else (value,)
        if any(isinstance(part, bool) or not isinstance(part, int) or part < 1 for part in parts):
            raise ValueError(f"factorize: rank must be an int >= 1 (or two for tucker), got {value!r}")
    for name, share, top in (("energy", energy, "1]"), ("budget", budget, "1)")):
        if share is None:
            continue
        valid = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 1
        if not valid or (share == 1 and top == "1)"):
            raise ValueError(f"factorize: {name} must be a number in (0, {top}, got {share!r}")
    return _Size(rank, energy, budget)


def _replaceable(model: nn.Module, method: str, layers: Iterable[str] | None) -> dict[str, Layer]:
    targets = select_layers("factorize", model, layers)
    reasons = {name: _why_not(model, name, layer, method) for name, layer in targets.items()}
    if layers is not None:
        for name, reason in reasons.items():
            if reason is not None:
                raise ValueError(f"factorize: layer {name!r} must be replaceable, got one where {reason}")
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


def _given(size: _Size, name: str) -> Rank | None:
    if not isinstance(size.rank, Mapping):
        return size.rank
    if name not in size.rank:
        raise ValueError(f"factorize: rank must name each layer, got none for {name!r}")
    return size.rank[name]


def _pair(
    name: str, layer: Layer, size: _Size, gram: Tensor | None, strict: bool
) -> FactorizedLinear | FactorizedConv2d | None:
    """The low-rank pair, None where it would not be smaller (an error if `strict`)."""
    groups = layer_groups(layer)
    matrix = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)
    per_rank, dense = groups * (matrix.shape[1] + matrix.shape[2]), matrix.numel()
    smaller = (dense - 1) // per_rank
    if size.budget is not None:
        rank: Rank | None = int(size.budget * dense / per_rank)
    else:
        rank = _given(size, name)
    svd = None
    if size.energy is not None:
        svd = Svd(matrix, gram)
        rank = svd.rank_of_energy(size.energy)
    if not isinstance(rank, int):
        raise ValueError(f"factorize: rank of layer {name!r} must be one int, got {rank}")
    if not 1 <= rank <= smaller:
        if strict:
            raise ValueError(
                f"factorize: rank of layer {name!r} must be in [1, {smaller}] to make it smaller, got {rank}"
            )
        return None
    down, up = (svd or Svd(matrix, gram)).factors(rank)
    if isinstance(layer, nn.Conv2d):
        shape = (groups * rank, *layer.weight.shape[1:])
        return FactorizedConv2d(
            _conv(layer, down.reshape(shape), None, spatial=True),
            _conv(layer, up.reshape(layer.out_channels, rank, 1, 1), layer.bias),
        )
    return FactorizedLinear(_linear(layer, down[0], None), _linear(layer, up[0], layer.bias))


def _tucker(name: str, layer: Layer, size: _Size, strict: bool) -> TuckerConv2d | None:
    outputs, inputs, kh, kw = layer.weight.shape
    dense = layer.weight.numel()

    def cost(r_in: int, r_out: int) -> int:
        return inputs * r_in + r_in * r_out * kh * kw + outputs * r_out

    def step(k: int) -> tuple[int, int]:
        return max(1, inputs * k // _STEPS), max(1, outputs * k // _STEPS)

    rank = _given(size, name)
    ranks = rank if isinstance(rank, tuple) else (rank, rank) if rank is not None else (0, 0)
    if size.energy is not None:
        ranks = mode_ranks(layer.weight, size.energy)
    if size.budget is not None:
        share = size.budget
        k = largest(_STEPS, lambda k: cost(*step(k)) <= share * dense)
        ranks = step(k) if k else (0, 0)
    fits = 1 <= ranks[0] <= inputs and 1 <= ranks[1] <= outputs
    if not fits or cost(*ranks) >= dense:
        if strict:
            raise ValueError(
                f"factorize: ranks of layer {name!r} must be in [1, {inputs}] and [1, {outputs}] and give "
                f"fewer than {dense} weights, got {ranks}"
            )
        return None
    u_in, core, u_out = tucker2(layer.weight, *ranks)
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"factorize: layer {name!r} must be nn.Conv2d for tucker, got {type(layer).__name__}")
    return TuckerConv2d(
        _conv(layer, u_in.T.reshape(ranks[0], inputs, 1, 1), None),
        _conv(layer, core, None, spatial=True),
        _conv(layer, u_out.reshape(outputs, ranks[1], 1, 1), layer.bias),
    )


def _linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    # skip_init draws no random numbers, so that factorising does not change a seeded run.
    new: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, **like
    )
    return _filled(new, layer, weight, bias)


def _conv(layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, spatial: bool = False) -> nn.Conv2d:
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if spatial:
        like |= {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        like |= {"padding_mode": layer.padding_mode}
    outputs, inputs, *kernel = weight.shape
    new: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d,
        inputs * layer.groups,
        outputs,
        tuple(kernel),
        groups=layer.groups,
        bias=bias is not None,
        **like,
    )
    return _filled(new, layer, weight, bias)


def _filled(new: _L, layer: Layer, weight: Tensor, bias: Tensor | None) -> _L:
    with torch.no_grad():
        new.weight.copy_(weight)
        new.weight.requires_grad_(layer.weight.requires_grad)
        if bias is not None and new.bias is not None:
            new.bias.copy_(bias)
            new.bias.requires_grad_(bias.requires_grad)
    return new

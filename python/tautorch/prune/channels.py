"""Removing whole channels: the layers get smaller, and every kernel gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tautorch._batches import Batch, Batches, model_device, to_device
from tautorch._layers import Layer, select_layers
from tautorch.prune.channel_report import ChannelReport, measure
from tautorch.prune.coupling import Coupled, coupled_groups, dependency_graph, require_torch_pruning
from tautorch.prune.importance import DIFFERENTIATED, Importance, LossOf, check_importance, importance_scores
from tautorch.prune.patterns import check_sparsity
from tautorch.prune.surgery import Snapshot, cut

ChannelRanking = Literal["local", "global"]
Verify = Literal["exact", "shape"]
_NOT_ASKED = "not among layers"
#: Attributes of a parent that hold how many heads its projections have.
_HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "heads", "nhead", "num_attention_heads")


@dataclass
class _Candidate:
    group: Coupled
    scores: Tensor
    drop: int = 0


def prune_channels(
    model: nn.Module,
    example_input: Batch,
    sparsity: float = 0.5,
    *,
    importance: Importance = "magnitude",
    ranking: ChannelRanking = "local",
    layers: Iterable[str] | None = None,
    protect: Iterable[str] = (),
    round_to: int = 16,
    heads: Mapping[str, int] | None = None,
    adjust: Callable[[nn.Module], object] | None = None,
    verify: Verify = "exact",
    calibration: Batches | None = None,
    loss: LossOf | None = None,
    report: ChannelReport | None = None,
) -> nn.Module:
    """Remove the least important output channels of Linear and Conv2d layers, and all that reads them.

    Which channels hang together (residuals, norms, depthwise convolutions, concatenations, what reads a
    layer) is found by Torch-Pruning's dependency graph (Fang et al. 2023, "DepGraph", arXiv:2301.12900;
    `pip install 'tautorch[channels]'`). The model's outputs keep their shape. Layers become smaller ordinary
    layers with new parameters: make the optimizer afterwards.

    Args:
        model: changed in place and returned; left bit for bit as it was if anything fails.
        example_input: one batch of what the model takes, to trace and to verify with.
        sparsity: share of the channels (of the heads) to remove, in [0, 1).
        importance: as in `prune`, but for "sparsegpt". A channel scores the mean over the layers it touches
            of the summed scores of its weights there, each layer's divided by its mean (not gradients, which
            are in units of the loss); with "magnitude" batch norm's |gamma| counts too.
        ranking: "local" ranks within coupled channels, "global" over all of them.
        layers: names or shell patterns of the layers whose outputs may go, None for all. ValueError if a
            named one cannot be cut; unnamed ones are left with the reason in `report`.
        protect: layers whose outputs stay, names or shell patterns.
        round_to: channels kept are a multiple of it, rounded up. The int8 kernels hold 16 outputs in a
            512-bit register and read inputs by fours, so that 16 leaves no lane and no quad part-empty.
        heads: {name of a query, key, value or fused projection: its heads}: whole heads go. A parent's
            `num_heads` (or `n_head`, `heads`, ...) is set to match.
        adjust: called with the model after each cut, to set other numbers that its forward relies on; it
            must be repeatable.
        verify: after each cut the model runs on `example_input`. "exact" keeps a cut only if the output is
            that of the uncut model with the removed channels set to zero, within rounding, which refuses
            reshapes that would mix up heads, and channels under a layer or group norm. "shape" asks for
            the outputs' shapes alone; the rest is for fine-tuning to mend.
        calibration, loss: as in `prune`.
        report: filled with what was done to each layer, and why others were left.

    `tautorch.save` holds the result; `tautorch.load` cuts a skeleton of the old shapes to fit, but for
    numbers in the code (`num_heads`), which the skeleton must be built with.

    Raises ImportError without Torch-Pruning, ValueError/TypeError for arguments out of range, a model that
    cannot be traced, and when no channel could be removed.
    """
    op = "prune_channels"
    share = check_sparsity(op, sparsity)
    _check_options(op, importance, ranking, round_to, verify, calibration, loss)
    require_torch_pruning(op)
    chosen = select_layers(op, model, layers)
    kept = select_layers(op, model, protect) if list(protect) else {}
    for name in heads or {}:
        select_layers(op, model, [name])
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module._buffers.get("weight_scale") is not None:
            raise ValueError(f"{op}: layer {name!r} must not be quantised yet; remove channels first")
    example = to_device(example_input, model_device(model))
    before = Snapshot(model)
    try:
        start = measure(op, model, example)
        graph = dependency_graph(op, model, example)
        groups = [
            _allowed(group, chosen, kept, layers is not None)
            for group in coupled_groups(op, model, graph, heads or {})
        ]
        scores = _scores(op, model, groups, importance, calibration, loss)
        candidates = [
            _Candidate(group, _channel_scores(group, scores, importance))
            for group in groups
            if group.refused is None
        ]
        _choose(candidates, share, ranking, round_to)
        left = {g.name: g.refused for g in groups if g.refused is not None}
        for candidate in candidates:
            group = candidate.group
            reason: str | None = f"none to spare of {group.channels} channels in steps of {round_to}"
            if candidate.drop:
                units = candidate.scores.argsort(stable=True)[: candidate.drop]
                after = _adjuster(candidate, heads or {}, adjust)
                reason, graph = cut(op, model, graph, example, group, units, verify, after)
            if reason is not None:
                left[group.name] = reason
        if share > 0:
            _check_done(op, candidates, left, layers is not None)
        done = measure(op, model, example)
    except BaseException:
        before.restore()
        raise
    if report is not None:
        report.fill(start, done, left)
    return model


def _check_options(
    op: str,
    importance: Importance,
    ranking: str,
    round_to: int,
    verify: str,
    calibration: Batches | None,
    loss: LossOf | None,
) -> None:
    check_importance(op, importance, calibration, loss)
    if importance == "sparsegpt":
        raise ValueError(
            f'{op}: importance must score weights as they are, got "sparsegpt"; use "activation"'
        )
    for name, value, known in (("ranking", ranking, ChannelRanking), ("verify", verify, Verify)):
        if value not in get_args(known):
            raise ValueError(f"{op}: {name} must be one of {', '.join(get_args(known))}, got {value!r}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"{op}: round_to must be an int >= 1, got {round_to!r}")


def _allowed(group: Coupled, chosen: Mapping[str, Layer], kept: Mapping[str, Layer], named: bool) -> Coupled:
    """The group, refused where it is protected or not asked for."""
    ours = {member.name for member in group.members if member.outgoing}
    if named and not ours & chosen.keys():
        return replace(group, refused=_NOT_ASKED)
    if group.refused is None and ours & kept.keys():
        return replace(group, refused=f"protected with {', '.join(sorted(ours & kept.keys()))}")
    return group


def _scores(
    op: str,
    model: nn.Module,
    groups: list[Coupled],
    importance: Importance,
    calibration: Batches | None,
    loss: LossOf | None,
) -> dict[str, Tensor]:
    """The score of each weight of each layer in a group that may be cut."""
    modules = {
        member.name: member.module
        for group in groups
        if group.refused is None
        for member in group.members
        if isinstance(member.module, (nn.Linear, nn.Conv2d))
    }
    layers = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))}
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"{op}: the weight of layer {name!r} must be finite, got NaN or Inf")
    if not layers:
        return {}
    return importance_scores(op, model, layers, importance, calibration, named=False, loss=loss)


def _channel_scores(group: Coupled, scores: Mapping[str, Tensor], importance: Importance) -> Tensor:
    """One score for each unit of the group, empty where none of its layers has any."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    count = 0
    for member in group.members:
        per_channel = _of_member(member.module, member.outgoing, scores.get(member.name), importance)
        if per_channel is None:
            continue
        here = torch.zeros_like(total).index_add_(0, member.roots, per_channel.cpu()[member.indices])
        if not (isinstance(importance, str) and importance in DIFFERENTIATED):
            here /= here.abs().mean().clamp_min(torch.finfo(torch.float64).tiny)
        total += here
        count += 1
    if count == 0:
        return torch.empty(0, dtype=torch.float64)
    return (total / count).reshape(group.folds, group.units, group.head).mean((0, 2))


def _of_member(
    module: nn.Module, outgoing: bool, score: Tensor | None, importance: Importance
) -> Tensor | None:
    """The summed scores of each channel's weights in one layer."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and importance == "magnitude" and module.affine:
        return module.weight.detach().double().abs()
    if score is None:
        return None
    wide = score.detach().double()
    if outgoing:
        return wide.flatten(1).sum(1)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    by_group = wide.reshape(groups, wide.shape[0] // groups, wide.shape[1], -1)
    return by_group.sum((1, 3)).flatten()


def _choose(candidates: list[_Candidate], share: float, ranking: str, round_to: int) -> None:
    """Set how many units each candidate drops."""
    if ranking == "global" and candidates:
        every = torch.cat([c.scores for c in candidates])
        weights = torch.cat([torch.full((c.group.units,), c.group.folds * c.group.head) for c in candidates])
        order = every.argsort(stable=True)
        gone = torch.zeros(len(every), dtype=torch.bool)
        gone[order[weights[order].cumsum(0) <= math.floor(share * int(weights.sum()) + 1e-9)]] = True
        wanted = [int(part.sum()) for part in torch.split(gone, [c.group.units for c in candidates])]
    else:
        wanted = [math.floor(share * c.group.units + 1e-9) for c in candidates]
    for candidate, drop in zip(candidates, wanted, strict=True):
        group = candidate.group
        step = group.folds * group.head
        grain = math.lcm(step, round_to)
        keep = math.ceil(max(group.units - drop, 1) * step / grain) * grain
        candidate.drop = max(0, (group.channels - keep) // step)


def _adjuster(
    candidate: _Candidate, heads: Mapping[str, int], adjust: Callable[[nn.Module], object] | None
) -> Callable[[nn.Module], object]:
    """What sets the numbers of heads in the code after the cut."""
    left = candidate.group.units - candidate.drop

    def run(model: nn.Module) -> None:
        for member in candidate.group.members:
            if member.outgoing and member.name in heads:
                parent = model.get_submodule(member.name.rpartition(".")[0])
                for key in _HEAD_COUNTS:
                    if parent.__dict__.get(key) == heads[member.name]:
                        setattr(parent, key, left)
        if adjust is not None:
            adjust(model)

    return run


def _check_done(op: str, candidates: list[_Candidate], left: Mapping[str, str], named: bool) -> None:
    """ValueError when nothing was removed, or something named was not."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items() if reason != _NOT_ASKED)
    if named and reasons:
        raise ValueError(f"{op}: layers must be cuttable, got {reasons}")
    if all(candidate.group.name in left for candidate in candidates):
        raise ValueError(f"{op}: at least one channel must be removable, got none ({reasons})")

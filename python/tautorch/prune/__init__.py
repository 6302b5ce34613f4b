"""Pruning: masks under the kernels' patterns, schedules, and masks that survive fine-tuning."""

from tautorch.prune.channel_report import ChannelRecord, ChannelReport
from tautorch.prune.channels import prune_channels
from tautorch.prune.importance import Importance, importance_scores, input_means, input_norms
from tautorch.prune.l0 import HardConcrete, L0Gates
from tautorch.prune.movement import Movement
from tautorch.prune.patterns import Normalize, Pattern, Ranking, make_global_masks, make_mask, parse_pattern
from tautorch.prune.pruner import MaskHandle, apply_masks, compute_masks, hold_masks, masks_from_zeros, prune
from tautorch.prune.report import LayerSparsity, SparsityReport, sparsity_report
from tautorch.prune.schedule import Schedule
from tautorch.prune.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from tautorch.prune.soft_threshold import SoftThreshold, soft_threshold, threshold_for

__all__ = [
    "ChannelRecord",
    "ChannelReport",
    "HardConcrete",
    "Importance",
    "L0Gates",
    "LayerSensitivity",
    "LayerSparsity",
    "MaskHandle",
    "Movement",
    "Normalize",
    "Pattern",
    "Ranking",
    "Schedule",
    "Sensitivity",
    "SoftThreshold",
    "SparsityReport",
    "apply_masks",
    "compute_masks",
    "hold_masks",
    "importance_scores",
    "input_means",
    "input_norms",
    "make_global_masks",
    "make_mask",
    "masks_from_zeros",
    "parse_pattern",
    "prune",
    "prune_channels",
    "sensitivity",
    "soft_threshold",
    "sparsity_report",
    "threshold_for",
]

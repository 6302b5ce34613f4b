"""Distillation: losses on outputs and features, and a trainer with exact resume."""

from tautorch.distill.callbacks import OnEpoch, OnFit, OnStep, Stateful
from tautorch.distill.checks import split_pair
from tautorch.distill.distiller import Attachable, Callback, Distiller
from tautorch.distill.hints import ChannelAdapter, FeatureHint
from tautorch.distill.losses import DirectLogits, HardLabel, Loss, SoftTarget

__all__ = [
    "Attachable",
    "Callback",
    "ChannelAdapter",
    "DirectLogits",
    "Distiller",
    "FeatureHint",
    "HardLabel",
    "Loss",
    "OnEpoch",
    "OnFit",
    "OnStep",
    "SoftTarget",
    "Stateful",
    "split_pair",
]

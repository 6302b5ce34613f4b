"""Distillation: losses on outputs and features, and a trainer with exact resume."""

from tautorch.distill.callbacks import OnEnd, OnEpoch, OnFit, OnStep, Stateful
from tautorch.distill.checks import split_pair
from tautorch.distill.distiller import Attachable, Callback, Distiller
from tautorch.distill.hints import ChannelAdapter, FeatureHint
from tautorch.distill.logs import JsonLog, TensorBoardLog
from tautorch.distill.losses import DirectLogits, HardLabel, Loss, SoftTarget

__all__ = [
    "Attachable",
    "Callback",
    "ChannelAdapter",
    "DirectLogits",
    "Distiller",
    "FeatureHint",
    "HardLabel",
    "JsonLog",
    "Loss",
    "OnEnd",
    "OnEpoch",
    "OnFit",
    "OnStep",
    "SoftTarget",
    "Stateful",
    "TensorBoardLog",
    "split_pair",
]

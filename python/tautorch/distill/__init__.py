"""Distillation: losses on outputs and features, and a trainer with exact resume."""

from tautorch.distill.adaptive import Adaptive, LogVariances, Uncertainty
from tautorch.distill.attention import AttentionTransfer, SpatialAttention
from tautorch.distill.cache import CachedDataset, TeacherCache, cache_teacher
from tautorch.distill.cached import CachedTarget
from tautorch.distill.callbacks import OnEnd, OnEpoch, OnFit, OnStep, Stateful
from tautorch.distill.checks import split_pair
from tautorch.distill.dagger import dagger
from tautorch.distill.distiller import Attachable, Callback, Distiller
from tautorch.distill.heads import MeanPool, light_head
from tautorch.distill.hints import ChannelAdapter, FeatureHint
from tautorch.distill.logs import JsonLog, TensorBoardLog
from tautorch.distill.losses import DirectLogits, HardLabel, Loss, SoftTarget
from tautorch.distill.multitask import Ensemble, MultiTask, Teachers
from tautorch.distill.mutual import Mutual, Peers
from tautorch.distill.policy import GaussianKL, PolicyKL
from tautorch.distill.regression import Regression
from tautorch.distill.relation import Relation
from tautorch.distill.rollout import evaluate_policy
from tautorch.distill.search import SearchResult, Trial, search
from tautorch.distill.temperature import TemperatureSchedule
from tautorch.distill.tokens import TokenLevel

__all__ = [
    "Adaptive",
    "Attachable",
    "AttentionTransfer",
    "CachedDataset",
    "CachedTarget",
    "Callback",
    "ChannelAdapter",
    "DirectLogits",
    "Distiller",
    "Ensemble",
    "FeatureHint",
    "GaussianKL",
    "HardLabel",
    "JsonLog",
    "LogVariances",
    "Loss",
    "MeanPool",
    "MultiTask",
    "Mutual",
    "OnEnd",
    "OnEpoch",
    "OnFit",
    "OnStep",
    "Peers",
    "PolicyKL",
    "Regression",
    "Relation",
    "SearchResult",
    "SoftTarget",
    "SpatialAttention",
    "Stateful",
    "TeacherCache",
    "Teachers",
    "TemperatureSchedule",
    "TensorBoardLog",
    "TokenLevel",
    "Trial",
    "Uncertainty",
    "cache_teacher",
    "dagger",
    "evaluate_policy",
    "light_head",
    "search",
    "split_pair",
]

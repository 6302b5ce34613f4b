"""tautorch: compiled int8, sparse and low-rank layers for PyTorch, and the methods that make them."""

from __future__ import annotations

from . import coding, dispatch, distill, distributed, factorize, nn, ops, prune, quantize, students
from ._version import __version__
from .convert import convert
from .convert_report import ConvertReport
from .dispatch import kernels
from .explain import explain, warmup
from .fuse import fuse
from .layerwise import layerwise
from .storage import CheckpointError, SizeReport, describe, load, save, size_report

__all__ = [
    "CheckpointError",
    "ConvertReport",
    "SizeReport",
    "__version__",
    "coding",
    "convert",
    "describe",
    "dispatch",
    "distill",
    "distributed",
    "explain",
    "factorize",
    "fuse",
    "kernels",
    "layerwise",
    "load",
    "nn",
    "ops",
    "prune",
    "quantize",
    "save",
    "size_report",
    "students",
    "warmup",
]

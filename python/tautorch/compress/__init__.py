"""Compression as a whole: layers compiled where that pays, what it brought, and how to say so."""

from tautorch.compress.plan import compile_layers, describe_layer
from tautorch.compress.report import (
    Check,
    Layer,
    Proportion,
    Report,
    Speedup,
    Stage,
    describe_environment,
)

__all__ = [
    "Check",
    "Layer",
    "Proportion",
    "Report",
    "Speedup",
    "Stage",
    "compile_layers",
    "describe_environment",
    "describe_layer",
]

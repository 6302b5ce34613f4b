"""Compression as a whole: what was done to a model, what it brought, and how to say so."""

from tautorch.compress.report import (
    Check,
    Layer,
    Proportion,
    Report,
    Speedup,
    Stage,
    describe_environment,
)

__all__ = ["Check", "Layer", "Proportion", "Report", "Speedup", "Stage", "describe_environment"]

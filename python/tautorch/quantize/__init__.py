"""Quantisation: static ranges from calibration, and int8 weights."""

from tautorch.quantize.calibration import OBSERVERS, calibrate
from tautorch.quantize.observers import Histogram, MinMax, Mse, Observer, Percentile
from tautorch.quantize.qparams import QParams, qparams_of_range, quantize_weight

__all__ = [
    "OBSERVERS",
    "Histogram",
    "MinMax",
    "Mse",
    "Observer",
    "Percentile",
    "QParams",
    "calibrate",
    "qparams_of_range",
    "quantize_weight",
]

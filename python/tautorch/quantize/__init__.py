"""Quantisation: static ranges from calibration, int8 and fewer bits of weight, clustered weights."""

from tautorch.quantize.bias import correct_bias
from tautorch.quantize.calibration import OBSERVERS, calibrate
from tautorch.quantize.clustering import Clustered, cluster, codebooks
from tautorch.quantize.fake import FakeQuantInput, FakeQuantWeight
from tautorch.quantize.finalize import finalize
from tautorch.quantize.gptq import Rounded, gptq
from tautorch.quantize.observers import Histogram, Kl, MinMax, Mse, Observer, Percentile
from tautorch.quantize.qat import prepare_qat, step_parameters
from tautorch.quantize.qparams import QParams, qparams_of_range, quantize_weight
from tautorch.quantize.sensitivity import LayerCost, Sensitivity, sensitivity
from tautorch.quantize.smoothquant import InputScale, Smoothed, smooth

__all__ = [
    "OBSERVERS",
    "Clustered",
    "FakeQuantInput",
    "FakeQuantWeight",
    "Histogram",
    "InputScale",
    "Kl",
    "LayerCost",
    "MinMax",
    "Mse",
    "Observer",
    "Percentile",
    "QParams",
    "Rounded",
    "Sensitivity",
    "Smoothed",
    "calibrate",
    "cluster",
    "codebooks",
    "correct_bias",
    "finalize",
    "gptq",
    "prepare_qat",
    "qparams_of_range",
    "quantize_weight",
    "sensitivity",
    "smooth",
    "step_parameters",
]

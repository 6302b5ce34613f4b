"""Low-rank factorisation: SVD, activation-aware SVD and Tucker-2."""

from tautorch._gram import input_grams
from tautorch.factorize.factorizer import factorize
from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear, TuckerConv2d
from tautorch.factorize.svd import Svd, tucker2

__all__ = [
    "FactorizedConv2d",
    "FactorizedLinear",
    "Svd",
    "TuckerConv2d",
    "factorize",
    "input_grams",
    "tucker2",
]

"""Low-rank factorisation: SVD, activation-aware SVD and Tucker-2."""

from tautorch._gram import input_grams
from tautorch.factorize.factorizer import factorize
from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear, TuckerConv2d
from tautorch.factorize.ranks import allocate
from tautorch.factorize.svd import Svd, tucker2
from tautorch.factorize.targets import PairTarget, TuckerTarget

__all__ = [
    "FactorizedConv2d",
    "FactorizedLinear",
    "PairTarget",
    "Svd",
    "TuckerConv2d",
    "TuckerTarget",
    "allocate",
    "factorize",
    "input_grams",
    "tucker2",
]

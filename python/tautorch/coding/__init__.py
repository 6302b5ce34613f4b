"""Lossless coding of weights: the last step of Deep Compression (Han et al. 2016, arXiv:1510.00149).

Pruned positions, cluster indices and leftovers go through a range coder, each tensor by whichever of the
methods here is smallest for it. `tautorch.save(model, path, encode="entropy")` makes whole files of it.
"""

from tautorch.coding.channel import CodingError, require_constriction
from tautorch.coding.tensors import decode, encode, methods_of

__all__ = ["CodingError", "decode", "encode", "methods_of", "require_constriction"]

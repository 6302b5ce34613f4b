"""Second moments of what layers are given: the Hessian of a layer's squared output error, and its inverse.

Factorisation whitens with it, pruning (SparseGPT) and rounding (GPTQ) compensate by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch import distributed
from tautorch._batches import Batches, observe_inputs, require_seen
from tautorch._layers import Layer

# Unfolded rows held at once: 64 MiB of float64.
_UNFOLD_ELEMENTS = 8 << 20


def input_grams(
    op: str, model: nn.Module, layers: Mapping[str, Layer], batches: Batches, named: bool = True
) -> dict[str, Tensor]:
    """X X^T of each layer's inputs over all ranks' `batches`, float64.

    [1, K, K] for Linear, [groups, K, K] for Conv2d. A convolution's X is its unfolded input, with
    K = I / groups * kh * kw. A layer that never ran is a ValueError, or left out unless `named`; NaN or Inf
    in an input is one too.
    """
    grams: dict[str, Tensor] = {}

    def see(name: str, layer: Layer, x: Tensor) -> None:
        wide = x.double()
        total = _linear_gram(wide) if isinstance(layer, nn.Linear) else _conv_gram(wide, layer)
        grams[name] = grams[name] + total if name in grams else total

    require_seen(op, layers, observe_inputs(op, model, layers, batches, see), named)
    return distributed.sum_over_ranks(grams)


def _linear_gram(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return (rows.T @ rows).unsqueeze(0)


def _conv_gram(x: Tensor, conv: nn.Conv2d) -> Tensor:
    if x.dim() == 3:
        x = x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    per_sample = padded[0].numel() * conv.kernel_size[0] * conv.kernel_size[1]
    total = x.new_zeros(())
    for part in torch.split(padded, max(1, _UNFOLD_ELEMENTS // max(per_sample, 1))):
        columns = F.unfold(part, conv.kernel_size, conv.dilation, 0, conv.stride)
        rows = (
            columns.reshape(part.shape[0], conv.groups, -1, columns.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        )
        total = total + rows @ rows.transpose(1, 2)
    return total


def check_dampening(op: str, dampening: object) -> None:
    """ValueError unless it is a positive number."""
    if isinstance(dampening, bool) or not isinstance(dampening, (int, float)) or not 0 < dampening < 1e6:
        raise ValueError(f"{op}: dampening must be a positive number (0.01 as a rule), got {dampening!r}")


def inverse_factor(op: str, name: str, gram: Tensor, dampening: float = 0.01) -> tuple[Tensor, Tensor]:
    """(U, dead): upper triangular U with (X X^T + d I)^-1 = U^T U, and the inputs that never moved.

    Row i of U is the update of the inputs after i when input i is fixed (Frantar & Alistarh 2023, SparseGPT,
    arXiv:2301.00774; GPTQ, arXiv:2210.17323): for an error e in w_i, w_j -= e U_ij / U_ii, and the loss grows
    by e^2 / U_ii^2.

    Args:
        op, name: the caller and its layer, for messages.
        gram: X X^T, [G, K, K] float64, symmetric and positive semidefinite.
        dampening: d as a share of the mean of the diagonal, > 0.

    Returns U [G, K, K] and dead [G, K] bool: inputs whose diagonal is zero. Their row and column of U are
    those of the identity: they move nothing and nothing moves them, and their weights may be set to zero.
    Raises ValueError for a dampening out of range and where the Gram is not positive definite with it.
    """
    check_dampening(op, dampening)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    damped = gram.clone()
    target = damped.diagonal(dim1=-2, dim2=-1)
    target += dampening * diagonal.mean(-1, keepdim=True)
    target.masked_fill_(dead, 1.0)
    # With J the exchange of rows, J H J = L L^T makes H = R R^T for the upper triangular R = J L J, and
    # U = R^-1: one factorisation and one triangular inverse, H^-1 is never formed.
    lower, info = torch.linalg.cholesky_ex(damped.flip(-1, -2))
    if bool(info.any()):
        raise ValueError(
            f"{op}: the inputs of layer {name!r} must have a positive definite Gram matrix with "
            f"dampening={dampening:g}, got one that is not; raise dampening"
        )
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(-1, -2), dead

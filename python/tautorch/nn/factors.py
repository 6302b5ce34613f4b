"""Two factors of a weight, for the low-rank layers."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "float32": torch.float32}


def weight_dtype_of(op: str, dtype: torch.dtype | str) -> torch.dtype:
    """``torch.int8`` or ``torch.float32``, also by name (as in ``get_config``).

    Raises:
        ValueError: another dtype.
    """
    found = WEIGHT_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in WEIGHT_DTYPES.values():
        raise ValueError(f"{op}: weight_dtype must be torch.int8 or torch.float32, got {dtype}")
    assert found is not None
    return found


def svd_factors(op: str, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of rank r: ``down`` fp32 ``[..., r, K]`` and ``up`` fp32 ``[..., N, r]``.

    The singular values are shared evenly between the two, so that both quantise alike.
    Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika, 1936.

    Args:
        op: the name that errors begin with.
        matrix: floating ``[..., N, K]``.

    Raises:
        ValueError: a rank outside 1..min(N, K), or NaN or Inf in the matrix.
    """
    n, k = matrix.shape[-2:]
    if not 1 <= rank <= min(n, k):
        raise ValueError(f"{op}: rank must be in 1..{min(n, k)} for a weight of {n} x {k}, got {rank}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{op}: weight must be finite, got NaN or Inf; mend the float layer first")
    u, s, v = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    root = s[..., :rank].sqrt()
    down = root[..., :, None] * v[..., :rank, :]
    up = u[..., :, :rank] * root[..., None, :]
    return down.to(torch.float32).contiguous(), up.to(torch.float32).contiguous()

"""Reference of ``lowrank_linear``: ``y = act(up @ (down @ x) + bias)``, the weight factored at rank r.

Low-rank layers: Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient
Evaluation", NeurIPS 2014, arXiv:1404.0736.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import Epilogue, centred_input, check_float, check_k, over
from .int8_linear import int8_linear
from .quantizer import quantize_rows
from .sparse_linear import sparse_linear

_OP = "lowrank_linear"


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_crow_indices: Tensor | None = None,
    residual_col_indices: Tensor | None = None,
    residual_pattern: str | None = None,
) -> Tensor:
    """Linear layer whose weight is ``up @ down``, plus a residual.

    Args:
        x: ``[..., K]`` float32, bfloat16, float16; with int8 factors int8 with its scale too.
        down: ``[r, K]``, float, or int8 with ``down_scale``.
        up: ``[N, r]``, float, or int8 with ``up_scale``.
        bias: float ``[N]``.
        down_scale: fp32 ``[r]``.
        up_scale: fp32 ``[N]``.
        out_dtype: as for ``int8_linear``; int32 gives the accumulators of the second product (int8 factors
        only; not with a residual).
        residual: int8 ``[N, K]`` with ``residual_scale`` fp32 ``[N]``; or, with ``residual_pattern``, the
            values of ``sparse_linear`` with their indices. Its product with x, as fp32, is added before the
            bias; x is quantised for int8 ones as for int8 factors (dynamically with float factors).

    The intermediate ``[..., r]`` is fp32; with int8 factors it is quantised dynamically per row, so a row
    with NaN or Inf gives a NaN row. The other arguments and the result are those of ``int8_linear``.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    quantised = check_factors(_OP, down, up, down_scale, up_scale)
    epilogue = Epilogue(bias, activation, out_scale, out_zero_point, out_dtype)
    epilogue.check(_OP, raw=quantised and residual is None)
    rank, k = down.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{_OP}: x must be [..., {k}] as down is [{rank}, {k}], got {list(x.shape)}")
    rows = x.reshape(x.shape[:-1].numel(), k)
    if down_scale is None or up_scale is None:
        check_float(_OP, x, "float factors")
        inner = (rows.double() @ down.double().T).to(torch.float32)
        y = (inner.double() @ up.double().T).to(torch.float32)
    else:
        check_k(_OP, down=down, up=up)
        centred, scale = centred_input(_OP, rows, x_scale, x_zero_point)
        acc = (centred @ down.double().T).to(torch.int32)
        q, inner_scale = quantize_rows(acc.to(torch.float32) * over(scale, acc, 0) * over(down_scale, acc, 1))
        acc = (q.double() @ up.double().T).to(torch.int32)
        if out_dtype == torch.int32:
            return acc.reshape(*x.shape[:-1], up.shape[0])
        y = acc.to(torch.float32) * over(inner_scale, acc, 0) * over(up_scale, acc, 1)
    if residual is not None:
        y = y + _residual(
            rows, residual, residual_scale, residual_crow_indices, residual_col_indices, residual_pattern,
            up.shape[0], x_scale, x_zero_point,
        )  # fmt: skip
    return epilogue.finish(y, x.dtype, channel=1).reshape(*x.shape[:-1], up.shape[0])


def _residual(
    rows: Tensor,
    values: Tensor,
    scale: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    pattern: str | None,
    n: int,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
) -> Tensor:
    tail: dict[str, Any] = {"x_scale": x_scale, "x_zero_point": x_zero_point, "out_dtype": torch.float32}
    if pattern is None:
        if scale is None:
            raise ValueError(f"{_OP}: residual_scale must be given for an int8 residual, got None")
        return int8_linear(rows, values, scale, **tail)
    if col is None:
        raise ValueError(f"{_OP}: residual_col_indices must be given with residual_pattern, got None")
    return sparse_linear(rows, values, crow, col, scale, pattern=pattern, out_features=n, **tail)


def check_factors(
    op: str, down: Tensor, up: Tensor, down_scale: Tensor | None, up_scale: Tensor | None
) -> bool:
    """Whether the factors are int8; ValueError where a factor and its scale, or the ranks, do not fit."""
    quantised = down.dtype == torch.int8
    for name, factor, scale in (("down", down, down_scale), ("up", up, up_scale)):
        if (factor.dtype == torch.int8) != quantised or (scale is not None) != quantised:
            raise ValueError(
                f"{op}: {name}_scale must be given where both factors are int8 and only there, got {name} "
                f"{factor.dtype} and {name}_scale {'None' if scale is None else 'a tensor'}"
            )
    return quantised

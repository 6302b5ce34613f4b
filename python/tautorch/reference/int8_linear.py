"""Reference of ``int8_linear``: ``y = act((q - zp) @ weight.T * x_scale * weight_scale + bias)``."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Epilogue, centred_input, check_float, check_k, over

_OP = "int8_linear"


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_only: bool = False,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Linear layer with int8 weights.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16 (quantised here: per row, or statically where ``x_scale``
            is given), or int8 with its scale.
        weight: int8 ``[N, K]``.
        weight_scale: fp32 ``[N]``.
        bias: float ``[N]``.
        x_scale: fp32, one element; for int8 x one element or one a row.
        x_zero_point: int32, one element.
        weight_only: multiply float x with the int8 weight without quantising it.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        out_scale: fp32, one element: int8 output.
        out_zero_point: int32, one element.
        out_dtype: float dtype, int8 (with ``out_scale``), or int32: the raw accumulators, without bias.

    Returns:
        ``[..., N]``; dtype that of float x, float32 for int8 x, unless ``out_dtype`` or ``out_scale`` say
        otherwise.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    epilogue = Epilogue(bias, activation, out_scale, out_zero_point, out_dtype)
    epilogue.check(_OP, raw=not weight_only)
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{_OP}: x must be [..., {k}] as the weight is [{n}, {k}], got {list(x.shape)}")
    rows = x.reshape(x.shape[:-1].numel(), k)
    if weight_only:
        check_float(_OP, x, "weight_only")
        y = (rows.double() @ weight.double().T).to(torch.float32)
    else:
        check_k(_OP, weight=weight)
        centred, scale = centred_input(_OP, rows, x_scale, x_zero_point)
        acc = (centred @ weight.double().T).to(torch.int32)
        if out_dtype == torch.int32:
            return acc.reshape(*x.shape[:-1], n)
        y = acc.to(torch.float32) * over(scale, acc, 0)
    y = y * over(weight_scale, y, 1)
    return epilogue.finish(y, x.dtype, channel=1).reshape(*x.shape[:-1], n)

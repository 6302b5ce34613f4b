"""Row quantisation behind a norm, a gate or an activation, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .quantizer import quantize_rows as plain
from .quantizer import quantize_static

#: What may come before rounding; the numbers are csrc/kernels/common/quantize_rows_cuda.h's.
STAGES = {"none": 0, "rms_norm": 1, "layer_norm": 2, "silu_gate": 3, "gelu": 4, "gelu_tanh": 5}


def stage(
    x: Tensor, after: str, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, eps: float
) -> Tensor:
    """fp32 ``[..., K]``: what is quantised."""
    x = x.to(torch.float32)
    if after == "rms_norm":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        x = x if weight is None else x * weight.to(torch.float32)
        return x if bias is None else x + bias.to(torch.float32)
    if after == "layer_norm":
        w, b = (None if t is None else t.to(torch.float32) for t in (weight, bias))
        return F.layer_norm(x, x.shape[-1:], w, b, eps)
    if after == "silu_gate":
        assert gate is not None
        return F.silu(gate.to(torch.float32)) * x
    if after in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if after == "gelu_tanh" else "none")
    return x


def quantize_rows(
    x: Tensor,
    after: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``tautorch.ops.quantize_rows``."""
    y = stage(x, after, weight, bias, gate, eps)
    return plain(y) if x_scale is None else quantize_static(y, x_scale, x_zero_point)

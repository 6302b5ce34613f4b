"""The gradient that every operator promises, from float64 autograd.

Straight through the quantisers, with the dequantised weights: the product is taken as linear in x, the
activation's derivative at the reference's own pre-activation, and x gets nothing where a static range clips.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tautorch.reference.layouts import decode
from tautorch.testing.cases import Case

Reference = Callable[..., Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    weight = weight.double()
    return weight if scale is None else weight * scale.double().reshape(-1, *[1] * (weight.dim() - 1))


def weights(case: Case) -> list[Tensor]:
    """The dequantised float64 weights of a case, in the order in which x meets them."""
    if case.op.startswith("lowrank"):
        down, up = case.args[1:3]
        return [_scaled(down, case.kwargs.get("down_scale")), _scaled(up, case.kwargs.get("up_scale"))]
    if case.op.startswith("int8"):
        return [_scaled(case.args[1], case.args[2])]
    values, crow, col, scale = case.args[1:5]
    shape = case.kwargs.get("weight_shape") or (case.kwargs["out_features"], case.x.shape[-1])
    dense = decode(values, crow, col, case.kwargs["pattern"], shape, case.kwargs.get("groups", 1))
    return [_scaled(dense, scale)]


def added(case: Case) -> Tensor | None:
    """The dequantised float64 residual of a low-rank case."""
    values, pattern = case.kwargs.get("residual"), case.kwargs.get("residual_pattern")
    if values is not None and pattern is not None:
        indices = case.kwargs["residual_crow_indices"], case.kwargs["residual_col_indices"]
        values = decode(values, *indices, pattern, (case.args[2].shape[0], case.x.shape[-1]))
    return None if values is None else _scaled(values, case.kwargs.get("residual_scale"))


def product(case: Case, x: Tensor) -> Tensor:
    """What the weights do to float64 ``x``, without bias and activation."""
    first, *rest = weights(case)
    if case.op.endswith("linear"):
        y = torch.nn.functional.linear(x, first)
        y = torch.nn.functional.linear(y, rest[0]) if rest else y
        residual = added(case)
        return y if residual is None else y + torch.nn.functional.linear(x, residual)
    geometry = {k: v for k, v in case.kwargs.items() if k in ("stride", "padding", "dilation", "groups")}
    y = torch.nn.functional.conv2d(x, first, **geometry)
    return torch.nn.functional.conv2d(y, rest[0], groups=geometry.get("groups", 1)) if rest else y


def gradients(case: Case, reference: Reference, grad: Tensor) -> tuple[Tensor, Tensor]:
    """float64 gradients of ``(case's output * grad).sum()`` with respect to x and bias."""
    plain = case.but(activation="none", out_dtype=torch.float32)
    z = plain(reference).double().requires_grad_()
    (g,) = torch.autograd.grad(ACTIVATIONS[case.kwargs.get("activation", "none")](z), z, grad.double())
    x = case.x.detach().double().requires_grad_()
    (grad_x,) = torch.autograd.grad(product(case, x), x, g)
    if case.mode == "static":
        scale, point = case.kwargs["x_scale"], case.kwargs["x_zero_point"]
        q = torch.round(case.x.float() * (1 / scale)) + point
        grad_x = grad_x * ((q >= -128) & (q <= 127))
    channel = 1 if case.op.endswith("conv2d") and g.dim() == 4 else 0 if case.op.endswith("conv2d") else -1
    others = [d for d in range(g.dim()) if d != channel % g.dim()]
    return grad_x, g.sum(others) if others else g

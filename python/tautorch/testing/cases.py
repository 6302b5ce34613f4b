"""Whole calls of each operator: arguments of the functional form, built from sizes, values and a mode.

The same case goes to the operator, to each of its kernels, and to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.layouts import encode
from ..reference.quantizer import quantize_weight
from .values import float_values, int8_values, sparse_mask

OPS: tuple[str, ...] = (
    "int8_linear",
    "sparse_linear",
    "lowrank_linear",
    "int8_conv2d",
    "sparse_conv2d",
    "lowrank_conv2d",
)

MODES: dict[str, tuple[str, ...]] = {
    "int8_linear": ("dynamic", "static", "int8", "weight_only"),
    "sparse_linear": ("dynamic", "static", "int8", "weight_only", "float"),
    "lowrank_linear": ("dynamic", "static", "int8", "float"),
    "int8_conv2d": ("dynamic", "static", "int8", "weight_only"),
    "sparse_conv2d": ("dynamic", "static", "int8", "weight_only", "float"),
    "lowrank_conv2d": ("dynamic", "static", "int8", "float"),
}
"""How x meets the weight: quantised inside, with a given scale, given as int8, or multiplied in float."""

FLOAT_MODES: tuple[str, ...] = ("weight_only", "float")


@dataclass(frozen=True)
class Case:
    """One call ``fn(*args, **kwargs)`` of ``op``; ``k`` is its inner dimension, ``label`` names it."""

    op: str
    mode: str
    label: str
    k: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, fn: Callable[..., Tensor]) -> Tensor:
        return fn(*self.args, **self.kwargs)

    @property
    def x(self) -> Tensor:
        """The input, the first argument."""
        x = self.args[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"Case: x must be a tensor, got {type(x).__name__}")
        return x

    @property
    def exact(self) -> bool:
        """Whether the product is one of integers, so that ``out_dtype=torch.int32`` exists."""
        return self.mode not in FLOAT_MODES

    def with_x(self, x: Tensor) -> Case:
        """The same call with another input."""
        return replace(self, args=(x, *self.args[1:]))

    def but(self, **kwargs: Any) -> Case:
        """The same call with other keyword arguments."""
        return replace(self, kwargs={**self.kwargs, **kwargs})

    def raw(self) -> Case:
        """The same call for the raw int32 accumulators: no epilogue."""
        return self.but(activation="none", out_scale=None, out_zero_point=None, out_dtype=torch.int32)

    def magnitude(self, reference: Callable[..., Tensor]) -> Tensor:
        """Size of the terms that each output adds up, for the tolerance: float64 of the output's shape."""
        plain = self.but(activation="none", out_scale=None, out_zero_point=None, out_dtype=torch.float32)
        if self.exact:
            bias = torch.zeros(()) if plain.bias is None else plain.bias.abs().max()
            return plain(reference).double().abs() + 2 * bias
        args = [plain.args[0].abs(), *plain.args[1:]]
        for i, arg in enumerate(args[1:], 1):
            if isinstance(arg, Tensor) and (arg.is_floating_point() or i == 1):
                args[i] = arg.abs()
        return replace(plain, args=tuple(args))(reference).double()

    @property
    def bias(self) -> Tensor | None:
        """The bias, the last positional argument."""
        bias = self.args[-1]
        return bias if isinstance(bias, Tensor) else None


def _input(
    shape: tuple[int, ...], mode: str, pattern: str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """x, and the keyword arguments that its mode needs."""
    if mode == "int8":
        x = int8_values(
            shape, pattern if pattern in ("lowest", "highest", "extremes") else "random", seed=seed
        )
        return x, {"x_scale": torch.tensor([0.03]), "x_zero_point": torch.tensor([-5], dtype=torch.int32)}
    x = float_values(shape, pattern, seed=seed)
    if pattern == "mixed":
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)  # fp16 would make Inf of the largest
    x = x.to(dtype)
    if mode == "static":
        return x, {"x_scale": torch.tensor([0.021]), "x_zero_point": torch.tensor([3], dtype=torch.int32)}
    return x, {"weight_only": True} if mode == "weight_only" else {}


def linear_case(
    op: str,
    m: int,
    n: int,
    k: int,
    *,
    mode: str = "dynamic",
    x: str = "normal",
    w: str = "random",
    x_dtype: torch.dtype = torch.float32,
    bias: bool = True,
    pattern: str = "4x1",
    keep: float = 0.4,
    rank: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Case:
    """A case of a linear operator: ``x`` [m, k] of value pattern ``x``, weights of pattern ``w``."""
    tensor, extra = _input((m, k), mode, x, x_dtype, seed)
    b = float_values((n,), seed=seed + 2) if bias else None
    weights = _weights(op, (n, k), mode, w, pattern, keep, max(1, k // 2) if rank is None else rank, 1, seed)
    if op == "sparse_linear":
        extra.update(pattern=pattern, out_features=n)
    extra.update(weights[1])
    extra.update(kwargs)
    label = f"{op}-{m}x{n}x{k}-{mode}-{x}-{w}" + (f"-{pattern}" if op == "sparse_linear" else "")
    return Case(op, mode, label, k, (tensor, *weights[0], b), extra)


def conv_case(
    op: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, int, int, int],
    *,
    mode: str = "dynamic",
    x: str = "normal",
    w: str = "random",
    x_dtype: torch.dtype = torch.float32,
    bias: bool = True,
    pattern: str = "4x1",
    keep: float = 0.4,
    rank: int = 3,
    groups: int = 1,
    seed: int = 0,
    **kwargs: Any,
) -> Case:
    """A case of a convolution: ``x`` [B, I, H, W] (or [I, H, W]), weight [O, I/groups, kh, kw]."""
    tensor, extra = _input(x_shape, mode, x, x_dtype, seed)
    b = float_values((w_shape[0],), seed=seed + 2) if bias else None
    weights = _weights(op, w_shape, mode, w, pattern, keep, rank, groups, seed)
    if op == "sparse_conv2d":
        extra.update(pattern=pattern, weight_shape=w_shape)
    extra.update(weights[1])
    extra.update(kwargs, groups=groups)
    k = w_shape[1] * w_shape[2] * w_shape[3]
    label = f"{op}-{list(x_shape)}-{list(w_shape)}-g{groups}-{mode}-{x}-{w}"
    return Case(op, mode, label, k, (tensor, *weights[0], b), extra)


def _weights(
    op: str,
    shape: tuple[int, ...],
    mode: str,
    values: str,
    pattern: str,
    keep: float,
    rank: int,
    groups: int,
    seed: int,
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """The operator's weight arguments between x and bias, and its weight keywords."""
    scale = 0.001 + float_values((shape[0],), seed=seed + 3).abs() * 0.01
    if op.startswith("lowrank"):
        first: tuple[int, ...] = (groups * rank, *shape[1:])
        second: tuple[int, ...] = (shape[0], rank, *[1] * (len(shape) - 2))
        down, up = float_values(first, seed=seed + 4) * 0.1, float_values(second, seed=seed + 5) * 0.1
        if mode == "float":
            return (down, up), {}
        (down_q, down_scale), (up_q, up_scale) = quantize_weight(down), quantize_weight(up)
        return (down_q, up_q), {"down_scale": down_scale, "up_scale": up_scale}
    weight = int8_values(shape, values, seed=seed + 4, low=-127)
    if op.startswith("int8"):
        return (weight, scale), {}
    mask = sparse_mask(shape, pattern, keep, groups=groups, seed=seed + 5)
    dense = float_values(shape, seed=seed + 4) * 0.1 if mode == "float" else weight
    layout = encode(dense, mask, pattern, groups)
    return (*layout, None if mode == "float" else scale), {}

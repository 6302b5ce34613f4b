"""``tautorch::int8_conv2d``: schema, kernels, gradient and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.dispatch import Problem
from tautorch.reference import int8_conv2d as reference

from . import _int8_conv2d_gpu as gpu
from . import caches, gradients, packing
from . import geometry as conv
from . import library as lib
from .caches import Prepared
from .geometry import Geometry, Pair
from .tails import Tail

OP = "int8_conv2d"
_cache = caches.PackCache()


def problem(geometry: Geometry, weight_only: bool, device: str = "cpu") -> Problem:
    """What a layer of this geometry asks of a kernel."""
    details: dict[str, object] = {"groups": geometry.groups, "weight_only": weight_only}
    return Problem(OP, device, geometry.weight_shape[0], geometry.k, details)


def pack(weight: Tensor, geometry: Geometry, weight_only: bool, kernel: str) -> Tensor:
    """Pack a canonical int8 ``[O, I/groups, kh, kw]`` weight for a CPU kernel: uint8 ``[bytes]``."""
    kind = packing.DENSE_W8 if weight_only else packing.DENSE_I8
    groups = geometry.groups
    if not weight_only and weight.shape[1] == 1 and weight.shape[0] == groups:
        return conv.pack(weight, groups, packing.DEPTHWISE_I8, kernel)
    return conv.pack_forms(weight, groups, geometry.dilation[1], kind, kernel)


def plan(packed: Tensor, geometry: Geometry, tail: dict[str, int]) -> bytes:
    """A plan for ``_C.int8_conv2d_run``; holds addresses, so the tensors must outlive it."""
    return _C.int8_conv2d_plan(packed.data_ptr(), packed.numel(), geometry.plan_arguments(), tail)


def _check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    weight_shape: Sequence[int] | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *rest: Any,
) -> tuple[Geometry, Tail]:
    tail = Tail(*rest)
    if weight.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{OP}: weight must be int8 [O, I/groups, kh, kw], got {weight.dtype}; quantise it")
    shape = weight.shape if weight_shape is None or weight.dtype == torch.int8 else weight_shape
    geometry = conv.geometry_of(OP, shape, stride, padding, dilation, groups)
    conv.check_call(OP, x, geometry, {"weight": weight}, weight_scale, bias, tail)
    return geometry, tail


def _prepare(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *rest: Any
) -> Prepared | Tensor:
    geometry, tail = _check(x, weight, weight_scale, bias, *rest)
    kernel = dispatch.choose(problem(geometry, tail.weight_only))
    if kernel == "reference":
        canonical = conv.canonical(weight, geometry.weight_shape)
        y = reference.int8_conv2d(x, canonical, weight_scale, bias, **geometry.keywords(), **tail._asdict())
        return conv.laid_out(y, x, geometry)

    def fresh() -> Tensor:
        canonical = conv.canonical(weight, geometry.weight_shape)
        return pack(canonical, geometry, tail.weight_only, kernel)

    packed = weight
    if not conv.packed_for(weight, kernel):
        packed = _cache.get(weight, (kernel, tail.weight_only, geometry.groups, geometry.dilation), fresh)
    codes, keep = tail.codes(x, weight_scale, bias, tail.weight_only)
    call = conv.conv_call(plan(packed, geometry, codes), geometry, x.dtype, tail.dtype(x))
    return tail.prepared(call, codes, [packed, *keep])


def _run(call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    return conv.run_conv(_C.int8_conv2d_run, call, x)


def _cuda(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    geometry, tail = _check(x, weight, weight_scale, bias, *rest)
    return gpu.run(x, weight, weight_scale, bias, geometry, tail)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    geometry, tail = _check(x, *arguments)
    return conv.fake_output(x, geometry, tail.dtype(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, bias, weight_shape, stride, padding, dilation, groups, *rest = inputs
    tail = Tail(*rest)
    ctx.save_for_backward(x, weight, weight_scale, bias, tail.x_scale, tail.x_zero_point)
    shape = weight.shape if weight_shape is None else weight_shape
    ctx.geometry = conv.geometry_of(OP, shape, stride, padding, dilation, groups)
    ctx.weight_only, ctx.activation = tail.weight_only, tail.activation


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, weight_scale, bias, x_scale, x_zero_point = ctx.saved_tensors
    geometry: Geometry = ctx.geometry
    g = grad.to(torch.float32)
    if ctx.activation != "none":
        pre = torch.ops.tautorch.int8_conv2d(
            x, weight, weight_scale, bias, *geometry.operands(), x_scale, x_zero_point, ctx.weight_only,
            out_dtype=torch.float32,
        )  # fmt: skip
        g = gradients.activation_grad(grad, pre, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.tautorch.float_conv2d_weight(weight, weight_scale, geometry.weight_shape)
        grad_x = conv.input_gradient(g, x, dense, geometry, x_scale, x_zero_point)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = conv.bias_gradient(g, bias)
    return (grad_x, None, None, grad_bias, *[None] * 12)


lib.define(
    OP,
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, " + conv.CONV_SCHEMA + ") -> Tensor",
    _prepare,
    _run,
    _fake,
    _setup,
    _backward,
    _cuda,
)


def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_only: bool = False,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """2-D convolution with int8 weights.

    Float x is quantised inside: per sample to [-127, 127] (dynamic), or with ``x_scale`` and
    ``x_zero_point`` for the whole tensor (static). Products accumulate in int32, exactly.

    Args:
        x: ``[B, I, H, W]`` or ``[I, H, W]`` float32, bfloat16, float16, or int8 (then ``x_scale`` is its
            scale). NCHW and channels-last memory are read as they are, other strides are copied.
        weight: int8 ``[O, I/groups, kh, kw]``.
        weight_scale: float32 ``[O]``.
        bias: floating ``[O]``.
        stride, padding, dilation: one int or (height, width). Padding is the real value 0.
        groups: divides I and O; ``groups == I == O`` is a depthwise convolution.
        x_scale: float32, one value (int8 x: one value, or one a sample).
        x_zero_point, weight_only, activation, out_scale, out_zero_point, out_dtype: as ``int8_linear``.

    Returns:
        ``[B, O, OH, OW]`` or ``[O, OH, OW]``, channels-last where x is, in x's dtype (float32 for int8 x)
        unless ``out_scale`` or ``out_dtype`` say otherwise. A sample with NaN or Inf gives NaN throughout.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what was expected and what came.
    """
    y: Tensor = torch.ops.tautorch.int8_conv2d(
        x, weight, weight_scale, bias, None, stride, padding, dilation, groups, x_scale, x_zero_point,
        weight_only, activation, out_scale, out_zero_point, out_dtype,
    )  # fmt: skip
    return y

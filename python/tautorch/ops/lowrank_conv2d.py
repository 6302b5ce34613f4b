"""``tautorch::lowrank_conv2d``: schema, kernels, gradient and the public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.dispatch import Problem
from tautorch.reference import lowrank_conv2d as reference
from tautorch.reference.lowrank_linear import check_factors

from . import _lowrank_conv2d_gpu as gpu
from . import caches, gradients, packing
from . import geometry as conv
from . import library as lib
from .caches import Prepared
from .geometry import Geometry, Pair
from .tails import Tail

OP = "lowrank_conv2d"
_cache = caches.PackCache()


def problem(geometry: Geometry, rank: int, int8: bool, device: str = "cpu") -> Problem:
    """What a layer of this geometry (``weight_shape`` is the product's) asks of a kernel."""
    details: dict[str, object] = {"groups": geometry.groups, "rank": rank, "int8": int8}
    return Problem(OP, device, geometry.weight_shape[0], geometry.k, details)


def pack(factor: Tensor, groups: int, kernel: str) -> Tensor:
    """Pack a canonical factor, ``[g*r, I/g, kh, kw]`` or ``[O, r, 1, 1]``: uint8 ``[bytes]``."""
    return conv.pack(
        factor, groups, packing.DENSE_I8 if factor.dtype == torch.int8 else packing.DENSE_F32, kernel
    )


def plan(
    down: Tensor, up: Tensor, down_scale: Tensor | None, geometry: Geometry, tail: dict[str, int]
) -> bytes:
    """A plan for ``_C.lowrank_conv2d_run``; holds addresses, so the tensors must outlive it."""
    return _C.lowrank_conv2d_plan(
        down.data_ptr(), down.numel(), up.data_ptr(), up.numel(),
        0 if down_scale is None else down_scale.data_ptr(), geometry.plan_arguments(), tail,
    )  # fmt: skip


def _check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_shape: Sequence[int] | None = None,
    up_shape: Sequence[int] | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *rest: Any,
) -> tuple[Geometry, int, Tail]:
    """The geometry of the product, the rank and the tail, checked."""
    tail = _tail(rest)
    packed = down_shape is not None and up_shape is not None
    if not packed:
        check_factors(OP, down, up, down_scale, up_scale)
    inner = conv.geometry_of(OP, down_shape or down.shape, stride, padding, dilation, groups)
    second = tuple(up_shape or up.shape)
    rank = inner.weight_shape[0] // groups
    if len(second) != 4 or second[1:] != (rank, 1, 1) or second[0] % groups:
        raise ValueError(
            f"{OP}: up must be [O, {rank}, 1, 1] as down has {inner.weight_shape[0]} channels in {groups} "
            f"groups, O a multiple of the groups, got {list(second)}"
        )
    geometry = inner._replace(weight_shape=(int(second[0]), *inner.weight_shape[1:]))
    float_weight = up_scale is None
    if down_scale is not None and (
        down_scale.dtype != torch.float32 or down_scale.shape != (inner.weight_shape[0],)
    ):
        raise ValueError(
            f"{OP}: down_scale must be float32 [{inner.weight_shape[0]}], got {down_scale.dtype} "
            f"{list(down_scale.shape)}"
        )
    if packed and (down_scale is None) != float_weight:
        raise ValueError(f"{OP}: down_scale and up_scale must be given together, got one of them")
    weights = {"down": down, "up": up, "down_scale": down_scale}
    conv.check_call(OP, x, geometry, weights, up_scale, bias, tail, float_weight=float_weight, k=rank)
    return geometry, rank, tail


def _shapes(geometry: Geometry, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Canonical shapes of down and up."""
    return (geometry.groups * rank, *geometry.weight_shape[1:]), (geometry.weight_shape[0], rank, 1, 1)


def _prepare(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    *rest: Any,
) -> Prepared | Tensor:
    geometry, rank, tail = _check(x, down, up, bias, down_scale, up_scale, *rest)
    int8 = up_scale is not None
    kernel = dispatch.choose(problem(geometry, rank, int8))
    shapes = _shapes(geometry, rank)
    if kernel == "reference":
        arguments = tail._asdict()
        del arguments["weight_only"]
        first, second = (conv.canonical(f, s) for f, s in zip((down, up), shapes, strict=True))
        y = reference.lowrank_conv2d(
            x, first, second, bias, down_scale=down_scale, up_scale=up_scale, **geometry.keywords(),
            **arguments,
        )  # fmt: skip
        return conv.laid_out(y, x, geometry)
    packs = []
    for factor, shape in zip((down, up), shapes, strict=True):
        if conv.packed_for(factor, kernel):
            packs.append(factor)
        else:
            packs.append(_cached(factor, shape, geometry.groups, kernel))
    for name, packed, shape in zip(("down", "up"), packs, shapes, strict=True):
        packing.check_pack(OP, name, packed, shape[0], math.prod(shape))
    codes, keep = tail.codes(x, up_scale, bias, not int8)
    if down_scale is not None:
        down_scale = down_scale.detach().contiguous()
        keep.append(down_scale)
    made = plan(packs[0], packs[1], down_scale, geometry, codes)
    call = conv.conv_call(made, geometry, x.dtype, tail.dtype(x))
    return tail.prepared(call, codes, [*packs, *keep], down_scale)


def _run(call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    return conv.run_conv(_C.lowrank_conv2d_run, call, x)


def _cached(factor: Tensor, shape: Sequence[int], groups: int, kernel: str) -> Tensor:
    def fresh() -> Tensor:
        return pack(conv.canonical(factor, shape), groups, kernel)

    return _cache.get(factor, (kernel, groups), fresh)


def _tail(rest: tuple[Any, ...]) -> Tail:
    """The tail of a call; this operator has no ``weight_only``."""
    x_scale, x_zero_point, *others = (*rest, None, None)[: max(2, len(rest))]
    return Tail(x_scale, x_zero_point, False, *others)


def _cuda(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    *rest: Any,
) -> Tensor:
    geometry, _, tail = _check(x, down, up, bias, down_scale, up_scale, *rest)
    return gpu.run(x, down, up, bias, (down_scale, up_scale), geometry, tail)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    geometry, _, tail = _check(x, *arguments)
    return conv.fake_output(x, geometry, tail.dtype(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, down, up, bias, down_scale, up_scale, down_shape, up_shape, *rest = inputs
    stride, padding, dilation, groups, *others = rest
    tail = _tail(tuple(others))
    ctx.save_for_backward(x, down, up, bias, down_scale, up_scale, tail.x_scale, tail.x_zero_point)
    ctx.inner = conv.geometry_of(OP, down_shape or down.shape, stride, padding, dilation, groups)
    ctx.up_shape = tuple(up_shape or up.shape)
    ctx.activation = tail.activation


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, bias, down_scale, up_scale, x_scale, x_zero_point = ctx.saved_tensors
    inner: Geometry = ctx.inner
    g = grad.to(torch.float32)
    if ctx.activation != "none":
        _, *geometry = inner.operands()
        pre = torch.ops.tautorch.lowrank_conv2d(
            x, down, up, bias, down_scale, up_scale, inner.weight_shape, ctx.up_shape, *geometry, x_scale,
            x_zero_point, out_dtype=torch.float32,
        )  # fmt: skip
        g = gradients.activation_grad(grad, pre, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        first = torch.ops.tautorch.float_conv2d_weight(down, down_scale, inner.weight_shape)
        second = torch.ops.tautorch.float_conv2d_weight(up, up_scale, ctx.up_shape)
        # through the 1x1 convolution: transposed, it is one of the same groups
        through = torch.nn.functional.conv_transpose2d(g, second, groups=inner.groups)
        grad_x = conv.input_gradient(through, x, first, inner, x_scale, x_zero_point)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = conv.bias_gradient(g, bias)
    return (grad_x, None, None, grad_bias, *[None] * 14)


lib.define(
    OP,
    "(Tensor x, Tensor down, Tensor up, Tensor? bias=None, Tensor? down_scale=None, Tensor? up_scale=None, "
    "int[]? down_shape=None, int[]? up_shape=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
    "int groups=1, Tensor? x_scale=None, Tensor? x_zero_point=None, str activation='none', "
    "Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None) -> Tensor",
    _prepare,
    _run,
    _fake,
    _setup,
    _backward,
    _cuda,
)


def lowrank_conv2d(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> Tensor:
    """``conv2d(conv2d(x, down, stride, padding, dilation, groups), up, bias, groups=groups)`` in one call.

    Denton et al., arXiv:1404.0736; Kim et al., arXiv:1511.06530.

    Args:
        x: ``[B, I, H, W]`` or ``[I, H, W]`` as for ``int8_conv2d``; floating for float factors.
        down: ``[groups*r, I/groups, kh, kw]``, floating (multiplied in fp32), or int8 with ``down_scale``.
        up: ``[O, r, 1, 1]``, floating, or int8 with ``up_scale``.
        bias: floating ``[O]``.
        down_scale: float32 ``[groups*r]``.
        up_scale: float32 ``[O]``.
        stride, padding, dilation, groups: of the first convolution, as ``int8_conv2d``.
        x_scale, x_zero_point: with int8 factors, as ``int8_conv2d``.
        activation, out_scale, out_zero_point, out_dtype: as ``int8_linear``; int32 gives the accumulators
            of the second product (int8 factors only).

    The intermediate is fp32; with int8 factors it is quantised dynamically per pixel and group. On CUDA,
    bfloat16 and float16 x multiply float factors rounded to x's dtype, which the intermediate has too; sums
    are fp32.

    Returns:
        ``[B, O, OH, OW]`` or ``[O, OH, OW]``, as ``int8_conv2d``.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what was expected and what came.
    """
    y: Tensor = torch.ops.tautorch.lowrank_conv2d(
        x, down, up, bias, down_scale, up_scale, None, None, stride, padding, dilation, groups, x_scale,
        x_zero_point, activation, out_scale, out_zero_point, out_dtype,
    )  # fmt: skip
    return y

"""``tautorch::sparse_conv2d``: schema, kernels, gradient and the public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.dispatch import Problem
from tautorch.reference import sparse_conv2d as reference

from . import _sparse_conv2d_gpu as gpu
from . import caches, gradients, packing, tails
from . import geometry as conv
from . import library as lib
from . import sparse_entries as sparse
from .caches import Prepared
from .geometry import Geometry, Pair
from .tails import Tail

OP = "sparse_conv2d"
_cache = caches.PackCache()


def problem(
    geometry: Geometry, pattern: str, int8: bool, weight_only: bool = False, device: str = "cpu"
) -> Problem:
    """What a layer of this geometry asks of a kernel."""
    details: dict[str, object] = {
        "groups": geometry.groups,
        "pattern": pattern,
        "int8": int8,
        "weight_only": weight_only,
    }
    return Problem(OP, device, geometry.weight_shape[0], geometry.k, details)


def plan(packed: Tensor, geometry: Geometry, tail: dict[str, int]) -> bytes:
    """A plan for ``_C.sparse_conv2d_run``; holds addresses, so the tensors must outlive it."""
    return _C.sparse_conv2d_plan(packed.data_ptr(), packed.numel(), geometry.plan_arguments(), tail)


def _check(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *rest: Any,
) -> tuple[Geometry, Tail]:
    tail = Tail(*rest)
    geometry = conv.geometry_of(OP, weight_shape, stride, padding, dilation, groups)
    if values.dtype != torch.uint8:
        if values.dtype != torch.int8 and not values.dtype.is_floating_point:
            raise TypeError(f"{OP}: values must be int8 or floating, got {values.dtype}")
        if (values.dtype == torch.int8) != (weight_scale is not None):
            raise ValueError(
                f"{OP}: weight_scale must be given for int8 values and only there, got {values.dtype} values "
                f"and {'no weight_scale' if weight_scale is None else 'a weight_scale'}"
            )
        if col_indices is None:
            raise TypeError(f"{OP}: col_indices must be a tensor, got None")
    if weight_scale is None and tail.weight_only:
        raise ValueError(f"{OP}: weight_only must be False for float values, which are never quantised")
    weights = {"values": values, "crow_indices": crow_indices, "col_indices": col_indices}
    float_weight = weight_scale is None
    conv.check_call(OP, x, geometry, weights, weight_scale, bias, tail, float_weight=float_weight)
    return geometry, tail


def _prepare(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    *rest: Any,
) -> Prepared | Tensor:
    geometry, tail = _check(x, values, crow_indices, col_indices, weight_scale, bias, *rest)
    shape, groups = geometry.weight_shape, geometry.groups
    kernel = dispatch.choose(problem(geometry, pattern, weight_scale is not None, tail.weight_only))

    def layout() -> tuple[Tensor, Tensor | None, Tensor]:
        if values.dtype == torch.uint8 or col_indices is None:
            return sparse.unpack(values, pattern, shape, groups)
        return values, crow_indices, col_indices

    if kernel == "reference":
        stored, crow, col = layout()
        y = reference.sparse_conv2d(
            x, stored, crow, col, weight_scale, bias, pattern=pattern, weight_shape=shape,
            **geometry.keywords(), **tail._asdict(),
        )  # fmt: skip
        return conv.laid_out(y, x, geometry)

    def fresh() -> Tensor:
        return sparse.pack(*layout(), pattern, shape, groups, kernel=kernel, op=OP, as_float=tail.weight_only)

    packed = values
    if values.dtype == torch.uint8:
        packing.check_pack(OP, "values", values, shape[0], math.prod(shape), groups)
    if tail.weight_only or not conv.packed_for(values, kernel):
        key = (kernel, tail.weight_only, pattern, shape, groups)
        packed = _cache.get(values, key, fresh, (crow_indices, col_indices))
    codes, keep = tail.codes(x, weight_scale, bias, tail.weight_only or weight_scale is None)
    call = conv.conv_call(plan(packed, geometry, codes), geometry, x.dtype, tail.dtype(x))
    return tail.prepared(call, codes, [packed, *keep])


def _run(call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    return conv.run_conv(_C.sparse_conv2d_run, call, x)


def _cuda(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    *rest: Any,
) -> Tensor:
    geometry, tail = _check(x, values, crow_indices, col_indices, weight_scale, bias, *rest)
    return gpu.run(x, (values, crow_indices, col_indices), weight_scale, bias, pattern, geometry, tail)


def _fake(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    *rest: Any,
) -> Tensor:
    geometry, tail = _check(x, values, crow_indices, col_indices, weight_scale, bias, *rest)
    return conv.fake_output(x, geometry, tail.dtype(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow_indices, col_indices, weight_scale, bias, pattern, *geometry = inputs[:12]
    tail = Tail(*inputs[12:])
    ctx.save_for_backward(
        x, values, crow_indices, col_indices, weight_scale, bias, tail.x_scale, tail.x_zero_point
    )
    ctx.geometry = conv.geometry_of(OP, *geometry)
    ctx.pattern, ctx.weight_only, ctx.activation = pattern, tail.weight_only, tail.activation


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, crow_indices, col_indices, weight_scale, bias, x_scale, x_zero_point = ctx.saved_tensors
    geometry: Geometry = ctx.geometry
    g = grad.to(torch.float32)
    if ctx.activation != "none":
        pre = torch.ops.tautorch.sparse_conv2d(
            x, values, crow_indices, col_indices, weight_scale, bias, ctx.pattern, *geometry.operands(),
            x_scale, x_zero_point, ctx.weight_only, out_dtype=torch.float32,
        )  # fmt: skip
        g = gradients.activation_grad(grad, pre, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.tautorch.sparse_to_dense(
            values, crow_indices, col_indices, ctx.pattern, geometry.weight_shape, geometry.groups
        )
        if weight_scale is not None:
            dense = dense * weight_scale.reshape(-1, 1, 1, 1)
        grad_x = conv.input_gradient(g, x, dense, geometry, x_scale, x_zero_point)
    if bias is not None and ctx.needs_input_grad[5]:
        grad_bias = conv.bias_gradient(g, bias)
    return (grad_x, None, None, None, None, grad_bias, *[None] * 13)


lib.define(
    OP,
    "(Tensor x, Tensor values, Tensor? crow_indices, Tensor? col_indices, Tensor? weight_scale, "
    "Tensor? bias, str pattern, int[] weight_shape, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
    "int groups=1, " + tails.TAIL_SCHEMA + ") -> Tensor",
    _prepare,
    _run,
    _fake,
    _setup,
    _backward,
    _cuda,
)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None = None,
    *,
    pattern: str,
    weight_shape: tuple[int, int, int, int],
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
    """2-D convolution with a sparse weight, the matrix ``[O, (I/groups)*kh*kw]`` in CSR or BSR terms.

    Args:
        x: as ``int8_conv2d``; floating for float values, which it meets in fp32.
        values: int8 or floating: ``[nnz]``, ``[blocks, 4, 1]``, ``[blocks, B, B]``, or ``[O, Kp/2]`` (2:4).
        crow_indices: int16 or int32 ``[rows + 1]``; None for 2:4.
        col_indices: int16 or int32; uint8 positions ``[O, Kp/8]`` for 2:4.
        weight_scale: float32 ``[O]`` for int8 values, None for float ones.
        bias: floating ``[O]``.
        pattern: "unstructured", "2:4", "4x1", "16x16", "32x32" or "64x64". Blocks do not cross groups. 2:4
            runs as a dense weight on CPUs, which have no unit for it. CUDA has int8 2:4 of 1x1 windows alone.
        weight_shape: ``(O, I/groups, kh, kw)``.
        stride, padding, dilation, groups, x_scale, x_zero_point: as ``int8_conv2d``.
        weight_only, activation, out_scale, out_zero_point, out_dtype: as ``int8_linear``.

    Returns:
        ``[B, O, OH, OW]`` or ``[O, OH, OW]``, as ``int8_conv2d``.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what was expected and what came.
    """
    y: Tensor = torch.ops.tautorch.sparse_conv2d(
        x, values, crow_indices, col_indices, weight_scale, bias, pattern, weight_shape, stride, padding,
        dilation, groups, x_scale, x_zero_point, weight_only, activation, out_scale, out_zero_point,
        out_dtype,
    )  # fmt: skip
    return y

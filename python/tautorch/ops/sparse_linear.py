"""``tautorch::sparse_linear``: schema, kernels, gradient and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.dispatch import Problem
from tautorch.reference import sparse_linear as reference
from tautorch.reference.layouts import block_shape

from . import _sparse_linear_gpu as gpu
from . import caches, gradients, packing, tails
from . import library as lib
from . import sparse_entries as entries
from .caches import Prepared
from .tails import Tail

OP = "sparse_linear"
_cache = caches.PackCache()


def problem(n: int, k: int, pattern: str, weight_dtype: str, device: str = "cpu") -> Problem:
    """What a weight asks of a kernel; ``weight_dtype`` is "int8" or "float32"."""
    return Problem(OP, device, n, k, {"pattern": pattern, "weight_dtype": weight_dtype})


def plan(packed: Tensor, k: int, tail: dict[str, int]) -> bytes:
    """A plan for ``_C.sparse_linear_run``; holds addresses, so the tensors must outlive it."""
    return _C.sparse_linear_plan(packed.data_ptr(), packed.numel(), k, tail)


def _check(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    tail: Tail,
) -> None:
    """Check all but the indices, which are checked when they are packed."""
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must be [..., K], got a scalar")
    block_shape(pattern, op=OP)
    if values.dtype == torch.uint8:
        if values.dim() != 1 or crow_indices is not None or col_indices is not None:
            raise ValueError(f"{OP}: packed values must be uint8 [bytes] without indices, got indices too")
    else:
        if values.dtype != torch.int8 and not values.dtype.is_floating_point:
            raise TypeError(f"{OP}: values must be int8 or floating, got {values.dtype}")
        if (values.dtype == torch.int8) != (weight_scale is not None):
            got = f"{values.dtype} and {'no' if weight_scale is None else 'a'} weight_scale"
            raise ValueError(f"{OP}: weight_scale must be given for int8 values and only there, got {got}")
        if col_indices is None:
            raise TypeError(f"{OP}: col_indices must be a tensor, got None")
    for name, t in (("values", values), ("crow_indices", crow_indices), ("col_indices", col_indices)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{OP}: {name} must be on {x.device} like x, got {t.device}; move it there")
    if weight_scale is not None and not tail.weight_only:
        tails.check_k(OP, x.shape[-1])
    tails.check_tail(
        OP,
        x,
        n=out_features,
        weight_scale=weight_scale,
        bias=bias,
        rows=lib.row_count(x),
        float_weight=weight_scale is None,
        **tail._asdict(),
    )


def _prepare(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    *rest: Any,
) -> Prepared | Tensor:
    tail = Tail(*rest)
    _check(x, values, crow_indices, col_indices, weight_scale, bias, pattern, out_features, tail)
    shape = (out_features, x.shape[-1])
    float_input = tail.weight_only or weight_scale is None
    if values.dtype == torch.uint8:
        info = packing.pack_info(values)
        if (info["n"], info["k"]) != shape:
            raise ValueError(
                f"{OP}: x must be [..., {info['k']}] for these packed values, got {list(x.shape)}"
            )
    kernel = dispatch.choose(problem(*shape, pattern, "float32" if weight_scale is None else "int8"))
    is_packed = col_indices is None
    if kernel == "reference":
        if is_packed:
            values, crow_indices, col_indices = entries.unpack(values, pattern, shape)
        assert col_indices is not None
        return reference.sparse_linear(
            x, values, crow_indices, col_indices, weight_scale, bias, pattern=pattern,
            out_features=out_features, **tail._asdict(),
        )  # fmt: skip

    def fresh() -> Tensor:
        if col_indices is None:
            return entries.repack(values, kernel, pattern, shape, 1, op=OP)
        return entries.pack(
            values, crow_indices, col_indices, pattern, shape, kernel=kernel, op=OP, as_float=float_input
        )

    if is_packed and packing.pack_info(values)["kernel"] == kernel:
        packed = values
    else:
        key = (kernel, float_input, pattern, shape)
        packed = _cache.get(values, key, fresh, (crow_indices, col_indices))
    codes, keep = tail.codes(x, weight_scale, bias, float_input)
    call = lib.linear_call(plan(packed, shape[1], codes), shape[1], out_features, x.dtype, tail.dtype(x))
    return tail.prepared(call, codes, [packed, *keep])


def _run(call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    return lib.run_linear(_C.sparse_linear_run, call, x)


def _cuda(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    *rest: Any,
) -> Tensor:
    tail = Tail(*rest)
    _check(x, values, crow_indices, col_indices, weight_scale, bias, pattern, out_features, tail)
    layout = values, crow_indices, col_indices
    return gpu.run(x, layout, weight_scale, bias, pattern, out_features, tail)


def _fake(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    out_features: int,
    *rest: Any,
) -> Tensor:
    tail = Tail(*rest)
    _check(x, values, crow_indices, col_indices, weight_scale, bias, pattern, out_features, tail)
    return x.new_empty((*x.shape[:-1], out_features), dtype=tail.dtype(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow, col, weight_scale, bias, ctx.pattern, ctx.n, *rest = inputs
    tail = Tail(*rest)
    ctx.weight_only, ctx.activation = tail.weight_only, tail.activation
    ctx.save_for_backward(x, values, crow, col, weight_scale, bias, tail.x_scale, tail.x_zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, crow, col, weight_scale, bias, x_scale, x_zero_point = ctx.saved_tensors
    g = grad.to(torch.float32)
    if ctx.activation != "none":
        pre = torch.ops.tautorch.sparse_linear(
            x, values, crow, col, weight_scale, bias, ctx.pattern, ctx.n, x_scale, x_zero_point,
            ctx.weight_only, out_dtype=torch.float32,
        )  # fmt: skip
        g = gradients.activation_grad(grad, pre, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape = (ctx.n, x.shape[-1])
        dense = torch.ops.tautorch.sparse_to_dense(values, crow, col, ctx.pattern, shape, 1)
        scaled = g if weight_scale is None else g * weight_scale
        grad_x = gradients.input_gradient(scaled @ dense, x, x_scale, x_zero_point)
    if bias is not None and ctx.needs_input_grad[5]:
        grad_bias = g.reshape(-1, g.shape[-1]).sum(0).to(bias.dtype)
    return (grad_x, None, None, None, None, grad_bias, *[None] * 9)


lib.define(
    OP,
    "(Tensor x, Tensor values, Tensor? crow_indices, Tensor? col_indices, Tensor? weight_scale, "
    "Tensor? bias, str pattern, SymInt out_features, " + tails.TAIL_SCHEMA + ") -> Tensor",
    _prepare,
    _run,
    _fake,
    _setup,
    _backward,
    _cuda,
)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None = None,
    *,
    pattern: str,
    out_features: int,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_only: bool = False,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Linear layer with a sparse weight ``[out_features, K]``, K from x.

    The weight is given as torch's CSR or BSR, see ``reference/layouts``: blocks of 4 outputs by 1 input
    ("4x1"), of BxB, single values ("unstructured"), or 2 of each 4 adjacent inputs ("2:4"). Its indices are
    checked when it is packed, which the first call with these tensors does.

    Args:
        x: ``[..., K]`` float32, bfloat16, float16; with int8 values int8 too (then ``x_scale`` is its scale).
        values: int8 or floating ``[nnz]``, ``[blocks, 4, 1]``, ``[blocks, B, B]``; 2:4 ``[N, Kp/2]`` with K
            padded to a multiple of 8. Or uint8 ``[bytes]``, a pack, with both indices None.
        crow_indices: int16 or int32 ``[block rows + 1]``; None for 2:4.
        col_indices: int16 or int32 ``[blocks]``; 2:4: uint8 positions ``[N, Kp/8]``.
        weight_scale: float32 ``[N]`` for int8 values; None for floating ones, which leave x float.
        bias: floating ``[N]``.
        pattern: "unstructured", "2:4", "4x1", "16x16", "32x32" or "64x64".
        out_features: N.

    The other arguments, the result and its dtype are those of ``int8_linear``.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what was expected and what came.
    """
    y: Tensor = torch.ops.tautorch.sparse_linear(
        x, values, crow_indices, col_indices, weight_scale, bias, pattern, out_features, x_scale,
        x_zero_point, weight_only, activation, out_scale, out_zero_point, out_dtype,
    )  # fmt: skip
    return y

"""``tautorch::lowrank_linear``: schema, kernels, gradient and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.dispatch import Problem
from tautorch.reference import lowrank_linear as reference

from . import library as lib
from .int8_linear import pack, unpack
from .library import Prepared, Tail

OP = "lowrank_linear"
_cache = lib.PackCache()


def problem(n: int, k: int, rank: int, weight_dtype: str, device: str = "cpu") -> Problem:
    """What a pair of factors asks of a kernel; ``weight_dtype`` is "int8" or "float32"."""
    return Problem(OP, device, n, k, {"rank": rank, "weight_dtype": weight_dtype})


def plan(down: Tensor, up: Tensor, k: int, down_scale: Tensor | None, tail: dict[str, int]) -> bytes:
    """A plan for ``_C.lowrank_linear_run``; holds addresses, so the tensors must outlive it."""
    scale = 0 if down_scale is None else down_scale.data_ptr()
    return _C.lowrank_linear_plan(down.data_ptr(), down.numel(), up.data_ptr(), up.numel(), k, scale, tail)


def _check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    down_scale: Tensor | None,
    up_scale: Tensor | None,
    sizes: tuple[int, int],
    tail: Tail,
) -> None:
    n, rank = sizes
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must be [..., K], got a scalar")
    if tail.weight_only:
        raise ValueError(f"{OP}: weight_only must be False: int8 factors quantise x, float ones do not")
    k = x.shape[-1]
    shapes = {"down": (rank, k), "up": (n, rank)}
    for name, factor, scale in (("down", down, down_scale), ("up", up, up_scale)):
        if factor.dtype == torch.uint8:
            if factor.dim() != 1 or down.dtype != up.dtype:
                raise ValueError(f"{OP}: {name} must be packed as the other factor is, got {factor.dtype}")
        elif factor.dtype != torch.int8 and not factor.dtype.is_floating_point:
            raise TypeError(f"{OP}: {name} must be int8 or floating, got {factor.dtype}")
        elif (factor.dtype == torch.int8) != (scale is not None) or (down.dtype == torch.int8) != (
            up.dtype == torch.int8
        ):
            raise ValueError(
                f"{OP}: {name}_scale must be given where both factors are int8 and only there, got {name} "
                f"{factor.dtype} and {name}_scale {'None' if scale is None else 'a tensor'}"
            )
        elif factor.shape != shapes[name]:
            what = "[r, K] with K from x" if name == "down" else "[N, r] with r from down"
            raise ValueError(f"{OP}: {name} must be {what}, {list(shapes[name])}, got {list(factor.shape)}")
        if factor.device != x.device:
            raise ValueError(f"{OP}: {name} must be on {x.device} like x, got {factor.device}; move it there")
    if down_scale is not None:
        if down_scale.dtype != torch.float32 or down_scale.shape != (rank,):
            raise ValueError(
                f"{OP}: down_scale must be float32 [{rank}] as the rank is {rank}, got {down_scale.dtype} "
                f"{list(down_scale.shape)}"
            )
        if down_scale.device != x.device:
            raise ValueError(f"{OP}: down_scale must be on {x.device} like x, got {down_scale.device}")
        lib.check_k(OP, k)
        lib.check_k(OP, rank)
    lib.check_tail(
        OP,
        x,
        n=n,
        weight_scale=up_scale,
        bias=bias,
        rows=lib.row_count(x),
        float_weight=up_scale is None,
        **tail._asdict(),
    )


def _sizes(down: Tensor, up: Tensor, out_features: int | None, rank: int | None) -> tuple[int, int]:
    """``(N, r)``: of canonical factors, or as told for packed ones."""
    for name, factor in (("down", down), ("up", up)):
        if factor.dtype != torch.uint8 and factor.dim() != 2:
            raise ValueError(f"{OP}: {name} must have 2 dimensions, got {list(factor.shape)}")
    if up.dtype != torch.uint8 and down.dtype != torch.uint8:
        return up.shape[0], down.shape[0]
    if out_features is None or rank is None:
        raise ValueError(f"{OP}: out_features and rank must be given for packed factors, got None")
    return out_features, rank


def _prepare(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    out_features: int | None = None,
    rank: int | None = None,
    *rest: Any,
) -> Prepared | Tensor:
    tail = Tail(*rest)
    n, r = sizes = _sizes(down, up, out_features, rank)
    _check(x, down, up, bias, down_scale, up_scale, sizes, tail)
    k = x.shape[-1]
    floats = up_scale is None
    kernel = dispatch.choose(problem(n, k, r, "float32" if floats else "int8"))
    if kernel == "reference":
        down, up = (unpack(w) if w.dtype == torch.uint8 else w for w in (down, up))
        arguments = tail._asdict()
        del arguments["weight_only"]
        return reference.lowrank_linear(
            x, down, up, bias, down_scale=down_scale, up_scale=up_scale, **arguments
        )
    packs = [_packed(w, kernel) for w in (down, up)]
    lib.check_pack(OP, "down", packs[0], r, r * k)
    lib.check_pack(OP, "up", packs[1], n, n * r)
    codes, keep = tail.codes(x, up_scale, bias, floats)
    if down_scale is not None:
        down_scale = down_scale.detach().contiguous()
        keep.append(down_scale)
    made = plan(packs[0], packs[1], k, down_scale, codes)
    call = lib.linear_call(made, k, n, x.dtype, tail.dtype(x))
    return tail.prepared(call, codes, [*packs, *keep], down_scale)


def _run(call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    return lib.run_linear(_C.lowrank_linear_run, call, x)


def _packed(factor: Tensor, kernel: str) -> Tensor:
    if factor.dtype != torch.uint8:
        return _cache.get(factor, kernel, lambda: pack(factor, kernel=kernel))
    if lib.pack_info(factor)["kernel"] == kernel:
        return factor
    return _cache.get(factor, kernel, lambda: pack(unpack(factor), kernel=kernel))


def _fake(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    out_features: int | None = None,
    rank: int | None = None,
    *rest: Any,
) -> Tensor:
    tail = Tail(*rest)
    sizes = _sizes(down, up, out_features, rank)
    _check(x, down, up, bias, down_scale, up_scale, sizes, tail)
    return x.new_empty((*x.shape[:-1], sizes[0]), dtype=tail.dtype(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, down, up, bias, down_scale, up_scale, ctx.n, ctx.rank, *rest = inputs
    tail = Tail(*rest)
    ctx.activation = tail.activation
    ctx.save_for_backward(x, down, up, bias, down_scale, up_scale, tail.x_scale, tail.x_zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, bias, down_scale, up_scale, x_scale, x_zero_point = ctx.saved_tensors
    g = grad.to(torch.float32)
    if ctx.activation != "none":
        pre = torch.ops.tautorch.lowrank_linear(
            x, down, up, bias, down_scale, up_scale, ctx.n, ctx.rank, x_scale, x_zero_point,
            out_dtype=torch.float32,
        )  # fmt: skip
        g = lib.activation_grad(grad, pre, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        n, rank = _sizes(down, up, ctx.n, ctx.rank)
        unpacked = torch.ops.tautorch.unpack_linear
        inner = (g if up_scale is None else g * up_scale) @ unpacked(up, n, rank)
        inner = inner if down_scale is None else inner * down_scale
        grad_x = lib.input_gradient(inner @ unpacked(down, rank, x.shape[-1]), x, x_scale, x_zero_point)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = g.reshape(-1, g.shape[-1]).sum(0).to(bias.dtype)
    return (grad_x, None, None, grad_bias, *[None] * 11)


# Packed factors do not know their sizes in a graph: out_features and rank say them.
lib.define(
    OP,
    "(Tensor x, Tensor down, Tensor up, Tensor? bias=None, Tensor? down_scale=None, Tensor? up_scale=None, "
    "SymInt? out_features=None, SymInt? rank=None, " + lib.TAIL_SCHEMA + ") -> Tensor",
    _prepare,
    _run,
    _fake,
    _setup,
    _backward,
)


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
) -> Tensor:
    """Linear layer whose weight is ``up @ down``: ``y = act(up @ (down @ x) + bias)`` in one call.

    The intermediate ``[..., r]`` stays in the kernel, in fp32; with int8 factors it is quantised per row, as
    x is (dynamically, or by ``x_scale`` and ``x_zero_point``).

    Args:
        x: ``[..., K]`` float32, bfloat16, float16; with int8 factors also int8 (of scale ``x_scale``).
        down: ``[r, K]`` floating, or int8 with ``down_scale``.
        up: ``[N, r]`` floating, or int8 with ``up_scale``.
        bias: floating ``[N]``.
        down_scale: float32 ``[r]``.
        up_scale: float32 ``[N]``.

    The other arguments, the result and its dtype are those of ``int8_linear``; ``out_dtype=torch.int32``
    gives the accumulators of the second product.

    Low-rank layers: Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient
    Evaluation", NeurIPS 2014, arXiv:1404.0736.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what was expected and what came.
    """
    y: Tensor = torch.ops.tautorch.lowrank_linear(
        x, down, up, bias, down_scale, up_scale, None, None, x_scale, x_zero_point, False, activation,
        out_scale, out_zero_point, out_dtype,
    )  # fmt: skip
    return y

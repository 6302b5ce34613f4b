"""``tautorch::int8_linear``: schema, kernels, gradient and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.dispatch import Problem
from tautorch.reference import int8_linear as reference

from . import _int8_linear_gpu as gpu
from . import caches, gradients, packing, tails
from . import library as lib
from .caches import Prepared
from .tails import Tail

OP = "int8_linear"
_cache = caches.PackCache()


def choose(n: int, k: int, weight_only: bool) -> str:
    """The kernel that will run a weight of this shape on the CPU."""
    return dispatch.choose(Problem(OP, "cpu", n, k, {"weight_only": weight_only}))


def pack(weight: Tensor, weight_only: bool = False, kernel: str | None = None) -> Tensor:
    """Pack a canonical weight for a CPU kernel.

    Args:
        weight: int8 ``[N, K]``, or floating (packed as fp32, for float factors).
        weight_only: pack for float activations.
        kernel: name of the kernel; None: the one ``dispatch`` chooses.

    Returns:
        uint8 ``[bytes]``, self-describing.
    """
    n, k = weight.shape
    if kernel is None:
        kernel = choose(n, k, weight_only)
    if weight.dtype == torch.int8:
        kind = packing.DENSE_W8 if weight_only else packing.DENSE_I8
    else:
        kind, weight = packing.DENSE_F32, weight.to(torch.float32)
    weight = weight.detach().contiguous()
    return packing.dense_pack(kernel, kind, weight, 1, n, k, 1, (k, 1, 0))


def unpack(packed: Tensor) -> Tensor:
    """The canonical weight of a pack, int8 or fp32 ``[N, K]``."""
    info = packing.pack_info(packed)
    n, k = int(info["n"]), int(info["k"])
    dtype = torch.float32 if info["kind"] == packing.DENSE_F32 else torch.int8
    weight = packing.with_memory(torch.empty(n, k, dtype=dtype, device="cpu"))
    _C.dense_unpack(packed.data_ptr(), packed.numel(), weight.data_ptr(), k, 1, 0)
    return weight


def plan(packed: Tensor, k: int, tail: dict[str, int]) -> bytes:
    """A plan for ``_C.int8_linear_run``; holds addresses, so the tensors must outlive it."""
    return _C.int8_linear_plan(packed.data_ptr(), packed.numel(), k, tail)


def _prepare(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *rest: Any
) -> Prepared | Tensor:
    tail = Tail(*rest)
    _check(x, weight, weight_scale, bias, tail)
    n, k = weight_scale.numel(), x.shape[-1]
    is_packed = weight.dtype == torch.uint8
    if is_packed:
        info = packing.pack_info(weight)
        if info["k"] != k:
            raise ValueError(
                f"{OP}: x must be [..., {info['k']}] as the packed weight takes, got {list(x.shape)}"
            )
        if info["n"] != n:
            raise ValueError(
                f"{OP}: weight_scale must be [{info['n']}] as the packed weight gives, got [{n}]"
            )
    kernel = choose(n, k, tail.weight_only)
    if kernel == "reference":
        canonical = unpack(weight) if is_packed else weight
        return reference.int8_linear(x, canonical, weight_scale, bias, **tail._asdict())
    packed = weight
    if not is_packed or packing.pack_info(weight)["kernel"] != kernel:

        def fresh() -> Tensor:
            return pack(unpack(weight) if is_packed else weight, tail.weight_only, kernel)

        packed = _cache.get(weight, (kernel, tail.weight_only), fresh)
    codes, keep = tail.codes(x, weight_scale, bias, tail.weight_only)
    call = lib.linear_call(plan(packed, k, codes), k, n, x.dtype, tail.dtype(x))
    return tail.prepared(call, codes, [packed, *keep])


def _run(call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    return lib.run_linear(_C.int8_linear_run, call, x)


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, tail: Tail) -> None:
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must be [..., K], got a 0-dimensional tensor")
    k, n = x.shape[-1], weight_scale.numel()
    if weight.dtype == torch.uint8:
        if weight.dim() != 1:
            raise ValueError(f"{OP}: packed weight must be uint8 [bytes], got {list(weight.shape)}")
    elif weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != k:
        got = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise ValueError(f"{OP}: weight must be int8 [N, K] with K={k} (from x), got {got}")
    else:
        n = weight.shape[0]
    if weight.device != x.device:
        raise ValueError(f"{OP}: weight must be on {x.device} like x, got {weight.device}; move it there")
    if not tail.weight_only:
        tails.check_k(OP, k)
    rows = lib.row_count(x)
    tails.check_tail(OP, x, n=n, weight_scale=weight_scale, bias=bias, rows=rows, **tail._asdict())


def _cuda(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    tail = Tail(*rest)
    _check(x, weight, weight_scale, bias, tail)
    return gpu.run(x, weight, weight_scale, bias, tail)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    tail = Tail(*rest)
    _check(x, weight, weight_scale, bias, tail)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=tail.dtype(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, bias, x_scale, x_zero_point, weight_only, activation = inputs[:8]
    ctx.save_for_backward(x, weight, weight_scale, bias, x_scale, x_zero_point)
    ctx.weight_only, ctx.activation = weight_only, activation


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, weight_scale, bias, x_scale, x_zero_point = ctx.saved_tensors
    g = grad.to(torch.float32)
    if ctx.activation != "none":
        pre = torch.ops.tautorch.int8_linear(
            x, weight, weight_scale, bias, x_scale, x_zero_point, ctx.weight_only, out_dtype=torch.float32
        )
        g = gradients.activation_grad(grad, pre, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        canonical = torch.ops.tautorch.unpack_linear(weight, weight_scale.shape[0], x.shape[-1])
        grad_x = gradients.input_gradient((g * weight_scale) @ canonical, x, x_scale, x_zero_point)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = g.reshape(-1, g.shape[-1]).sum(0).to(bias.dtype)
    return (grad_x, None, None, grad_bias, *[None] * 7)


lib.define(
    OP,
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, " + tails.TAIL_SCHEMA + ") -> Tensor",
    _prepare,
    _run,
    _fake,
    _setup,
    _backward,
    _cuda,
)

# A packed or canonical linear weight as canonical float32 tensor, for backward graphs.
lib.LIB.define(
    "unpack_linear(Tensor weight, SymInt n, SymInt k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
lib.LIB.impl(
    "unpack_linear",
    lambda w, n, k: (unpack(w) if w.dtype == torch.uint8 else w).to(torch.float32, copy=True),
    "CPU",
)
lib.LIB.impl("unpack_linear", lambda w, n, k: w.to(torch.float32, copy=True), "CUDA")
torch.library.register_fake(
    "tautorch::unpack_linear", lambda w, n, k: w.new_empty((n, k), dtype=torch.float32), lib=lib.LIB
)


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
    """Linear layer with int8 weights: ``y = act(q(x) @ weight.T * x_scale * weight_scale + bias)``.

    Float x is quantised inside: per row to [-127, 127] (dynamic), or with ``x_scale`` and ``x_zero_point``
    for the whole tensor (static). Products accumulate in int32, exactly.

    Args:
        x: ``[..., K]`` float32, bfloat16, float16, or int8 (then ``x_scale`` is its scale). Any strides;
            rows whose elements are not adjacent are copied.
        weight: int8 ``[N, K]``, or its ``pack``.
        weight_scale: float32 ``[N]``.
        bias: floating ``[N]``.
        x_scale: float32, one value (int8 x: one value, or one a row).
        x_zero_point: int32, one value.
        weight_only: multiply float x by the int8 weight without quantising it.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu", applied after the bias.
        out_scale: float32, one value; the output is then requantised to int8.
        out_zero_point: int32, one value.
        out_dtype: float32, bfloat16, float16; or int32 for the raw accumulators (no scale, no bias).

    Returns:
        ``[..., N]``, in x's dtype (float32 for int8 x) unless ``out_scale`` or ``out_dtype`` say otherwise.
        A row of x with NaN or Inf gives a row of NaN.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what was expected and what came.
    """
    y: Tensor = torch.ops.tautorch.int8_linear(
        x, weight, weight_scale, bias, x_scale, x_zero_point, weight_only, activation, out_scale,
        out_zero_point, out_dtype,
    )  # fmt: skip
    return y

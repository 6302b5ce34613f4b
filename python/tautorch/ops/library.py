"""How an operator is registered, and how the linear ones run a plan."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tautorch import _C, dispatch

from .caches import PlanCache, Prepared, stamp
from .tails import DTYPE_CODE

_recall, _run_rows = _C.recall, _C.run_rows

_are_transforms_active = torch._C._are_functorch_transforms_active


class _Library(torch.library.Library):
    """Operators whose autograd kernels refuse tangents, and to be differentiated by ``torch.func``.

    torch's own, of an operator without formula for forward mode, drops tangents: derivatives come out as
    zero. ``torch.func`` differentiates no library operator.
    """

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **kwargs: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _reverse_mode_alone(op_name.rpartition(":")[2], fn)
        super().impl(op_name, fn, dispatch_key, **kwargs)  # type: ignore[no-untyped-call]


def _reverse_mode_alone(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            for a in args:
                if not isinstance(a, Tensor):
                    continue
                if forward_ad.unpack_dual(a).tangent is not None:  # type: ignore[no-untyped-call]
                    raise NotImplementedError(
                        f"{name}: forward-mode differentiation (jvp, jacfwd) is not there; use reverse mode "
                        "(backward)"
                    )
        if _are_transforms_active() and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(
                f"{name}: torch.func's grad, vjp and jacrev are not there; use torch.autograd.grad"
            )
        return kernel(keyset, *args, **kwargs)

    return checked


LIB: Any = _Library("tautorch", "DEF")  # type: ignore[no-untyped-call]


_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_mark_forked)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """For checks and packing, which use torch's own functions.

    What they make while a transform of ``torch.func`` is active would be a tensor of that transform, without
    memory. In a forked child torch's pool hangs at the first of them that is worth two threads: there, one
    does it.
    """
    with torch._C._DisableFuncTorch():
        if not _forked:
            yield
            return
        with _one_thread():
            yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


#: by operator
plan_caches: dict[str, PlanCache] = {}


def define(
    name: str,
    schema: str,
    prepare: Callable[..., Prepared | Tensor],
    run: Callable[[tuple[Any, ...], Tensor], Tensor | None],
    fake: Callable[..., Tensor],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    cuda: Callable[..., Tensor] | None = None,
) -> None:
    """Register ``tautorch::name`` with its kernels, fake kernel and gradient.

    On the CPU, ``prepare`` checks a call, packs and plans (or computes it, by the reference), and ``run``
    runs what it prepared: None where x does not fit, which ``prepare`` then says.
    """
    plans = plan_caches[name] = PlanCache()
    linear = name.endswith("_linear")

    def cpu(x: Tensor, *arguments: Any) -> Tensor:
        dtype, shape = x.dtype, x.shape
        width = shape[-1] if linear and shape else -1
        call = _recall(plans.entries, dispatch.epoch, dtype, width, arguments)
        if call is not None:
            dispatch.clear_last_python(name)
            out = run(call, x)
            if out is not None:
                return out
        stamps = [(i, stamp(a)) for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        with plain_torch():
            prepared = prepare(x, *arguments)
        if isinstance(prepared, Tensor):
            dispatch.note_used(name, "reference")
            return prepared
        dispatch.clear_last_python(name)
        out = run(plans.keep((dtype, width), arguments, stamps, prepared), x)
        if out is None:
            raise RuntimeError(f"{name}: x of shape {list(shape)} passed the checks and does not fit")
        return out

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        dispatch.choose(dispatch.Problem(name, "cuda"))  # raises, with what the table says
        raise ValueError(f"{name}: no kernel for cuda; run this layer on the CPU or keep the float layer")

    LIB.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, cpu, "CPU")
    LIB.impl(name, refuse if cuda is None else cuda, "CUDA")
    torch.library.register_fake(f"tautorch::{name}", fake, lib=LIB)
    torch.library.register_autograd(f"tautorch::{name}", backward, setup_context=setup, lib=LIB)


# ---- linear operators -----------------------------------------------------------------------------------


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """x as rows without a copy where strides allow: (tensor, number of rows, row stride in elements)."""
    k, x = x.shape[-1], x.resolve_neg()
    if x.dim() == 2 and (x.stride(1) == 1 or k == 1):
        return x, x.shape[0], x.stride(0)
    x = x.reshape(x.shape[:-1].numel(), k)
    if k > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.shape[0], x.stride(0)


def linear_call(plan: bytes, k: int, n: int, x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
    """What ``run_linear`` takes: a plan with its sizes and dtypes."""
    return plan, k, n, DTYPE_CODE[x_dtype], dtype, DTYPE_CODE[dtype]


def run_linear(run: Callable[..., None], call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    """Run a linear operator's call on x ``[..., K]`` of its dtype: ``[..., n]``; None where K is another."""
    out: Tensor | None = _run_rows(run, call, x)
    if out is not None:
        return out
    plan, k, n, code, dtype, out_code = call[:6]
    shape = x.shape
    if not shape or shape[-1] != k:
        return None
    rows, m, stride = rows_of(x)
    out = x.new_empty((*shape[:-1], n), dtype=dtype)
    run(plan, rows.data_ptr(), code, m, stride, out.data_ptr(), out_code)
    return out


def row_count(x: Tensor) -> int:
    """How many rows x ``[..., K]`` has."""
    return math.prod(x.shape[:-1])  # Size.numel() would fix the batch of an exported graph

"""When two ways of computing a case agree, and the memory layouts they must agree on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tautorch import dispatch, ops
from tautorch.testing.cases import Case
from tautorch.testing.tolerances import assert_close

from ..straight_through import gradients


def reference_of(op: str) -> Callable[..., Tensor]:
    """The reference's function of the operator's name."""
    return getattr(importlib.import_module(f"tautorch.reference.{op}"), op)  # type: ignore[no-any-return]


def public_of(op: str) -> Callable[..., Tensor]:
    """The functional form."""
    return getattr(ops, op)  # type: ignore[no-any-return]


def gradients_agree(case: Case, op: str) -> None:
    """Gradients with respect to bias and, where it is float, x, against float64."""
    bias = case.args[-1].requires_grad_()
    wants = [bias] if case.mode == "int8" else [case.x.requires_grad_(), bias]
    y = case(public_of(op))
    grad = torch.randn(y.shape)
    actual = torch.autograd.grad(y, wants, grad)
    with torch.no_grad():
        plain = case.with_x(case.x.detach())
    expected = gradients(plain, reference_of(op), grad)[-len(wants) :]
    for got, truth in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32 and got.shape == truth.shape
        size = float(truth.abs().max()) + 1e-6
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=2e-5 * size)


class Recorder(TorchDispatchMode):
    """Remembers the calls of tautorch's torch ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tautorch":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def agree(case: Case, kernel: str) -> None:
    """Run ``case`` on ``kernel``: exact integers, floats within the table, and it did run."""
    fn, reference = public_of(case.op), reference_of(case.op)
    try:
        actual = case(fn)
        if actual.numel():
            assert dispatch.last_used(case.op) == kernel
        compare(case, actual, case(reference))
        if case.exact:
            raw = case.raw()
            accumulators, expected = raw(fn), raw(reference)
            assert accumulators.dtype == torch.int32
            assert torch.equal(accumulators, expected), "raw accumulators differ"
    except Exception as error:
        error.add_note(f"{kernel}: {case.label} {case.kwargs}")
        raise


def compare(case: Case, actual: Tensor, expected: Tensor) -> None:
    """Floats within the table; int8 exactly, or by one step where a float function lies between."""
    smooth = case.kwargs.get("activation", "none") not in ("none", "relu")
    if expected.dtype == torch.int8 and (smooth or not case.exact):
        assert actual.dtype == torch.int8 and actual.shape == expected.shape
        off = (actual.int() - expected.int()).abs()
        # a tie moves by one; a hundredth of all outputs being ties is already a lot
        assert off.numel() == 0 or (int(off.max()) <= 1 and int(off.sum()) <= 2 + off.numel() // 100)
        return
    kind = "float" if not case.exact else "activation" if smooth else "integer"
    magnitude = case.magnitude(reference_of(case.op)) if expected.dtype.is_floating_point else 0.0
    assert_close(actual, expected, magnitude=magnitude, kind=kind, k=case.k)


def layouts_of(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in memory layouts that kernels get wrong."""
    yield "contiguous", x.contiguous()
    doubled = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    doubled[..., ::2] = x
    yield "every second element", doubled[..., ::2]
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), 77, dtype=x.dtype)
    padded[..., 1:-2] = x
    yield "a window, misaligned by one", padded[..., 1:-2]
    flat = torch.cat([x.new_zeros(1), x.reshape(-1)])
    yield "storage offset one", flat[1:].view(x.shape)
    if x.dim() == 4:
        yield "channels last", x.contiguous(memory_format=torch.channels_last)

"""int8_linear on CUDA tensors: by the CUDA extension or by Triton, as the kernel table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tautorch import dispatch, tuning
from tautorch.dispatch import Problem
from tautorch.reference import int8_linear as reference

from . import caches, tails
from ._gpu import check_lowest, row_sums
from ._gpu import facts as _facts
from ._gpu import once as _once
from ._gpu_product import product
from .tails import Tail

OP = "int8_linear"
_packs = caches.PackCache()
_sums = caches.PackCache()


def problem(index: int, rows: int, n: int, k: int, weight_only: bool, dtype: torch.dtype) -> Problem:
    """What a call with x of ``dtype`` asks of the table, with the facts of its device."""
    capability, multiprocessors = _facts(index)
    details: dict[str, object] = {
        "weight_only": weight_only,
        "x_dtype": tails.DTYPE_CODE[dtype],
        "rows": rows,
        "capability": capability,
        "multiprocessors": multiprocessors,
    }
    return Problem(OP, "cuda", n, k, details)


def _check_devices(x: Tensor, weight: Tensor, **others: Tensor | None) -> None:
    """The kernels read scales and zero points on the device, where they cannot be checked."""
    if weight.dtype == torch.uint8:
        raise ValueError(f"{OP}: weight must be int8 [N, K] on CUDA, got a pack; CPU packs do not run there")
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{OP}: {name} must be on {x.device} like x, got {t.device}; move it there")


def run(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, tail: Tail) -> Tensor:
    """The operator for arguments that have passed its checks; x is on a CUDA device."""
    _check_devices(
        x,
        weight,
        x_scale=tail.x_scale,
        x_zero_point=tail.x_zero_point,
        out_scale=tail.out_scale,
        out_zero_point=tail.out_zero_point,
    )
    (n, k), m = weight.shape, x.shape[:-1].numel()
    if not tail.weight_only:
        check_lowest(OP, "weight", weight, k)
    kernel = dispatch.choose(problem(x.get_device(), m, n, k, tail.weight_only, x.dtype))
    if kernel not in ("reference", "triton"):
        return _extension(kernel, x, weight, weight_scale, bias, tail)
    dispatch.note_used(OP, kernel)
    with torch.cuda.device(x.device):
        bias, x_scale = (None if t is None else t.contiguous() for t in (bias, tail.x_scale))
        tail, scale = tail._replace(x_scale=x_scale), weight_scale.contiguous()
        if kernel == "reference":
            return reference.int8_linear(x, weight, scale, bias, **tail._asdict())
        from tautorch.triton_kernels import int8_linear as kernels  # imports Triton: optional, and slow

        sums = None if tail.x_zero_point is None else row_sums(weight)
        return kernels.int8_linear(x, weight, scale, bias, **tail._asdict(), column_sums=sums)


def _extension(
    kernel: str, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, tail: Tail
) -> Tensor:
    ext, (n, k), index = dispatch.cuda, weight.shape, x.get_device()
    codes, keep = tail.codes(x, weight_scale, bias, tail.weight_only)
    stream = torch.cuda.current_stream(index).cuda_stream
    weight_at, ldw, sums_at, held = _operand(weight, tail.x_zero_point is not None, index, stream)
    plan = ext.int8_linear_plan(weight_at, ldw, sums_at, n, k, codes)
    kernels, dtype = ext.int8_linear_kernels(), tail.dtype(x)

    def run(chosen: int) -> Tensor:
        return product(OP, kernels, chosen, plan, x, n, dtype, tail.weight_only, stream, [*keep, *held])

    if kernel != "cuda":
        chosen = kernels.index(kernel)
    elif tail.weight_only:
        chosen = -1
    else:
        problem = _facts(index)[0], x.shape[:-1].numel(), n, k, False, tails.DTYPE_CODE[x.dtype]
        chosen = _measured(kernels, problem, x, dtype, run)
    return run(chosen)


@dataclass(frozen=True)
class _Choice:
    """A kernel of the table, as ``tuning`` keeps it; None: the extension's own choice."""

    name: str | None


def _measured(
    kernels: list[str],
    problem: tuple[int, int, int, int, bool, int],
    x: Tensor,
    dtype: torch.dtype,
    run: Callable[[int], Tensor],
) -> int:
    """The index of the kernel that measured fastest for such calls, or -1 where nothing was measured."""
    _, m, n, k, _, _ = problem

    def parse(values: list[str | None]) -> _Choice:
        (name,) = values
        if name is not None and name not in kernels:  # of another version
            raise ValueError(name)
        return _Choice(name)

    def able() -> list[_Choice]:
        return [
            _Choice(name) for name in kernels if dispatch.cuda.int8_linear_supports(name, *problem) is None
        ]

    def index_of(choice: _Choice) -> int:
        return -1 if choice.name is None else kernels.index(choice.name)

    key = (OP, tuning.rows_of(m), n, k, x.dtype, dtype)
    best = tuning.choose(x, key, lambda: _Choice(None), able, parse, lambda c: run(index_of(c)))
    # Measured at another number of rows of the bucket, it may not be for this one.
    if best.name is not None and dispatch.cuda.int8_linear_supports(best.name, *problem) is not None:
        return -1
    return index_of(best)


def _operand(weight: Tensor, with_sums: bool, index: int, stream: int) -> tuple[int, int, int, list[Tensor]]:
    """Address and row stride of a weight the kernels can read, address of its sums, and what holds them."""
    n, k = weight.shape
    ext = dispatch.cuda
    # Rows are read in pieces of 16 bytes: in a view, what follows a row within its last piece is not zero.
    whole = k % 16 == 0 and weight.stride(1) == 1 and weight.stride(0) >= k
    if whole and weight.stride(0) % 16 == 0 and weight.data_ptr() % 16 == 0:
        if not with_sums:
            return weight.data_ptr(), weight.stride(0), 0, [weight]

        def make_sums() -> Tensor:
            sums = torch.empty(n, dtype=torch.int32, device=weight.device)
            ext.int8_linear_sums(weight.data_ptr(), weight.stride(0), n, k, sums.data_ptr(), index, stream)
            return sums

        sums = _once(_sums, weight, make_sums)
        return weight.data_ptr(), weight.stride(0), sums.data_ptr(), [weight, sums]

    layout = ext.int8_linear_layout(n, k)

    def make_pack() -> Tensor:
        source = weight if weight.stride(1) == 1 or k == 1 else weight.contiguous()
        packed = torch.empty(layout["total"], dtype=torch.uint8, device=weight.device)
        ext.int8_linear_pack(source.data_ptr(), source.stride(0), n, k, packed.data_ptr(), index, stream)
        return packed

    packed = _once(_packs, weight, make_pack)
    base = packed.data_ptr()
    return base + layout["weight_off"], layout["ldw"], base + layout["sums_off"], [weight, packed]

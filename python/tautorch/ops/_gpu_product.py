"""One call of a linear kernel of the CUDA extension, from tensors to addresses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tautorch import dispatch

from . import packing, tails

_local = threading.local()
# The device's current stream as an integer; a CPU build of torch has none.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Launch(NamedTuple):
    """A call that may be repeated on other x of as many contiguous rows; see ``_C.run_rows``."""

    op: str
    k: int
    n: int
    x_dtype: torch.dtype
    dtype: torch.dtype
    device: int
    stream: int
    run: Callable[..., int]
    rows: int
    #: plan, kernel, bytes of the workspace, what ``dispatch`` notes, the tensors that the plan points to
    known: tuple[bytes, int, int, tuple[str, int], list[Tensor]]

    def call(self) -> tuple[Any, ...]:
        """For ``_C.run_rows``, which repeats what its dict knows."""
        codes = tails.DTYPE_CODE
        return (
            self.op, self.k, self.n, codes[self.x_dtype], self.dtype, codes[self.dtype], self.device,
            self.stream, _raw_stream, self.run, {}, dispatch._last_python, torch.uint8,
        )  # fmt: skip


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Inside, what ``product`` launches on this thread and may be repeated is listed."""
    before, found = getattr(_local, "found", None), list[Launch]()
    _local.found = found
    try:
        yield found
    finally:
        _local.found = before


def product(
    op: str,
    kernels: list[str],
    kernel: int,
    plan: bytes,
    x: Tensor,
    n: int,
    dtype: torch.dtype,
    weight_only: bool,
    stream: int,
    held: Sequence[Tensor],
) -> Tensor:
    """``x`` [..., K] by the extension's kernels of ``op``: [..., n] of ``dtype``.

    ``kernel`` is an index into ``kernels``; -1 chooses by shape. ``held`` is what the plan points to, which
    lives until this returns: memory that is freed then goes back to the stream's pool, behind the kernel.
    """
    ext, k, m, index = dispatch.cuda, x.shape[-1], x.shape[:-1].numel(), x.get_device()
    rows = x.reshape(m, k)
    as_it_is = x.dtype == torch.int8 or weight_only
    if as_it_is and ((k > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < k)):
        rows = rows.contiguous()  # the extension copies rows that are apart, not columns or overlapping rows
    # stride_m, stride_k; a dimension of one element has any stride. The last 16 bytes of a
    # single int8 row could end past its memory, so it is not said to be padded.
    alone = k if m == 1 and x.dtype == torch.int8 else packing.round_up(k, 16)
    strides = (rows.stride(0) if m > 1 else alone, rows.stride(1) if k > 1 else 1)
    # Rows of the output start on 16 bytes; where n does not give that, the kernel writes wider ones.
    ldy = packing.round_up(n, 16 // dtype.itemsize)
    y = torch.empty((m, ldy), dtype=dtype, device=x.device)
    asked = (
        plan,
        kernel,
        rows.data_ptr(),
        tails.DTYPE_CODE[x.dtype],
        m,
        *strides,
        tails.DTYPE_CODE[dtype],
        index,
    )
    size = getattr(ext, f"{op}_workspace")(*asked)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    ran = getattr(ext, f"{op}_run")(*asked, y.data_ptr(), ldy, workspace.data_ptr(), stream)
    dispatch.note_used(op, kernels[ran])
    found = getattr(_local, "found", None)
    # x off 16 bytes is copied, maybe for another kernel than would be chosen without.
    whole = m and ldy == n and x.is_contiguous() and rows.data_ptr() % 16 == 0
    if found is not None and _raw_stream is not None and whole:
        known = plan, ran, size, (kernels[ran], 0), list(held)
        found.append(Launch(op, k, n, x.dtype, dtype, index, stream, getattr(ext, f"{op}_run"), m, known))
    return (y if ldy == n else y[:, :n].contiguous()).view(*x.shape[:-1], n)

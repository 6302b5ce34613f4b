"""Nothing is read or written past the end of a tensor: each one ends where a page of no access begins."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.ops import library as lib
from tautorch.ops import packing
from tautorch.ops import sparse_entries as entries
from tautorch.ops.int8_conv2d import int8_conv2d
from tautorch.ops.int8_linear import int8_linear
from tautorch.ops.sparse_conv2d import sparse_conv2d
from tautorch.ops.sparse_linear import sparse_linear
from tautorch.reference.int8_conv2d import int8_conv2d as reference
from tautorch.reference.layouts import encode
from tautorch.testing.values import sparse_mask

KERNEL = "avx512vnni"
KERNELS = [name for name in dispatch.AVX512 if _C.isas().get(name)]
pytestmark = pytest.mark.skipif(not _C.isas().get(KERNEL, False), reason=f"this CPU cannot run {KERNEL}")

# Around vectors of 16 and strips of 32 and 64 outputs, halves of them filled and not.
K, OUTPUTS = 96, (1, 7, 15, 16, 17, 24, 31, 33, 40, 48, 57, 63, 65, 72, 80, 100, 131)
FORMS = {
    "lists": ("4x1", entries.LISTS),
    "sell": ("4x1", entries.SELL),
    "single lists": ("unstructured", entries.LISTS),
    "single sell": ("unstructured", entries.SELL),
    "cells": ("16x16", entries.CELLS),
    "wide cells": ("32x32", entries.CELLS),
}


def at_page_end(values: Tensor) -> Tensor:
    """A copy whose last byte is the last one of a page, with a page behind it that cannot be read."""
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=size - values.nbytes)
    return flat.copy_(values.flatten()).view(values.shape)


def survives(check: Callable[[], None]) -> bool:
    """Whether a child process runs `check` to its end: reading too far kills it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_a_read_past_the_end_is_seen() -> None:
    x = at_page_end(torch.zeros(100, dtype=torch.int8))

    def read(size: int) -> None:
        faulthandler.disable()  # the fault is wanted
        ctypes.string_at(x.data_ptr(), size)

    assert survives(partial(read, 100))
    assert not survives(partial(read, 101))


def _weight(n: int, k: int, pattern: str) -> tuple[Tensor, Tensor]:
    mask = sparse_mask((n, k), pattern, 0.5 if pattern == "2:4" else 0.3, seed=n)
    return torch.randint(-127, 128, (n, k), dtype=torch.int8) * mask, mask


def _run_to_page_end(run: Callable[..., None], call: tuple[Any, ...], x: Tensor) -> Tensor:
    """``lib.run_linear`` with the output at the end of a page, too."""
    plan, _, n, code, dtype, out_code = call[:6]
    rows, m, stride = lib.rows_of(x)
    out = at_page_end(torch.zeros(m, n, dtype=dtype))
    run(plan, rows.data_ptr(), code, m, stride, out.data_ptr(), out_code)
    return out


def _check_linear(run: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor], n: int) -> None:
    scale, bias = torch.rand(n) + 0.5, torch.randn(n)
    ends = at_page_end(scale), at_page_end(bias)
    for m in (1, 5, 13, 40, 70):
        x = torch.randint(-128, 128, (m, K), dtype=torch.int8)
        x_end = at_page_end(x)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
            want = run(x, scale, bias, dtype)
            with patch.object(lib, "run_linear", _run_to_page_end):
                got = run(x_end, *ends, dtype)
            assert (got.data_ptr() + got.nbytes) % mmap.PAGESIZE == 0  # not another output
            assert torch.equal(got, want)


def _options(dtype: torch.dtype) -> dict[str, Tensor]:
    """Of int8 x; with int8 output what that takes."""
    options = {"x_scale": torch.tensor([0.01])}
    if dtype == torch.int8:
        options |= {"out_scale": torch.tensor([0.5]), "out_zero_point": torch.tensor([3], dtype=torch.int32)}
    return options


def _sparse(
    packed: Tensor, pattern: str, x: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    return sparse_linear(
        x, packed, None, None, scale, bias, pattern=pattern, out_features=len(scale), **_options(dtype)
    )


def _dense(weight: Tensor, x: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return int8_linear(x, weight, scale, bias, **_options(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_sparse_linear(form: str, one_thread: None) -> None:
    pattern, code = FORMS[form]

    def check() -> None:
        for n in OUTPUTS:
            w, mask = _weight(n, K, pattern)
            layout = encode(w, mask, pattern, 1)
            packed = entries.pack(*layout, pattern, (n, K), kernel=KERNEL, op="test", form=code)
            with dispatch.force("sparse_linear", KERNEL):
                _check_linear(partial(_sparse, packed, pattern), n)

    assert survives(check)


def test_pairs(one_thread: None) -> None:
    def check() -> None:
        for n in OUTPUTS:
            w, _ = _weight(n, K, "2:4")
            packed = packing.dense_pack(KERNEL, packing.PAIRS_I8, w, 1, n, K, 1, (K, 1, 1))
            with dispatch.force("sparse_linear", KERNEL):
                _check_linear(partial(_sparse, packed, "2:4"), n)

    assert survives(check)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense(kernel: str, one_thread: None) -> None:
    def check() -> None:
        for n in OUTPUTS:
            with dispatch.force("int8_linear", kernel):
                _check_linear(partial(_dense, torch.randint(-127, 128, (n, K), dtype=torch.int8)), n)

    assert survives(check)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense_images(kernel: str, one_thread: None) -> None:
    """Pixels under one tap are taken from x a block at a time where channels are multiples of 4."""

    def check() -> None:
        for channels in (3, 4, 20, 64, 100):
            for outputs, size in ((7, 1), (40, 5), (64, 14), (96, 29)):
                w = torch.randint(-127, 128, (outputs, channels, 1, 1), dtype=torch.int8)
                values = torch.randint(-128, 128, (1, size, size, channels), dtype=torch.int8)
                for dtype in (torch.float32, torch.int8):
                    how = w, torch.rand(outputs), torch.randn(outputs)
                    end, x = (v.permute(0, 3, 1, 2) for v in (at_page_end(values), values))
                    ends = w, at_page_end(how[1]), at_page_end(how[2])
                    with dispatch.force("int8_conv2d", kernel):
                        got = int8_conv2d(end, *ends, **_options(dtype))
                    want = reference(x, *how, **_options(dtype))
                    if dtype == torch.int8:
                        assert torch.equal(got, want)
                    else:
                        assert torch.allclose(got, want, atol=1e-4)

    assert survives(check)


def _check_image(
    pattern: str, channels: int, outputs: int, kernel: int, stride: int, groups: int, batch: int, size: int
) -> None:
    """int32 sums of an int8 image in channels last, which is read where it is, against float64."""
    shape = (outputs, channels // groups, kernel, kernel)
    mask = sparse_mask((outputs, channels // groups * kernel**2), pattern, 0.4, seed=channels)
    w = torch.randint(-127, 128, mask.shape, dtype=torch.int8) * mask
    image = at_page_end(torch.randint(-128, 128, (batch, size, size, channels), dtype=torch.int8))
    x, zero, padding = image.permute(0, 3, 1, 2), 7, kernel // 2
    got = sparse_conv2d(
        x, *encode(w, mask, pattern, groups), torch.ones(outputs), pattern=pattern, weight_shape=shape,
        stride=stride, padding=padding, groups=groups, x_scale=torch.tensor([0.1]),
        x_zero_point=torch.tensor([zero], dtype=torch.int32), out_dtype=torch.int32,
    )  # fmt: skip
    want = torch.nn.functional.conv2d(
        x.double() - zero, w.double().view(shape), stride=stride, padding=padding, groups=groups
    )
    assert torch.equal(got, want.to(torch.int32)), (pattern, channels, outputs, kernel, stride, batch, size)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x16"])
def test_images_read_in_place(pattern: str, one_thread: None) -> None:
    def check() -> None:
        with dispatch.force("sparse_conv2d", KERNEL):
            for channels in (1, 3, 16, 31, 64, 100):
                for batch, size in ((1, 1), (1, 5), (3, 2), (2, 13)):
                    _check_image(pattern, channels, 70, 1, 1, 1, batch, size)
                    _check_image(pattern, channels, 12, 1, 2, 1, batch, size)
                    _check_image(pattern, channels, 12, 3, 1, 1, batch, size)
                    _check_image(pattern, 4 * channels, 64, 1, 1, 4, batch, size)

    assert survives(check)


@pytest.mark.parametrize("kernel", [name for name, runs in _C.isas().items() if runs])
def test_images_in_place_on_every_kernel(kernel: str) -> None:
    """Lists, SELL and cells, with two threads and enough pixels for all kinds of tiles and panels."""
    with dispatch.force("sparse_conv2d", kernel):
        for pattern in ("unstructured", "4x1", "32x32"):
            for channels, outputs in ((64, 64), (96, 200), (512, 36)):
                _check_image(pattern, channels, outputs, 1, 1, 1, 2, 14)
                _check_image(pattern, channels, outputs, 1, 2, 1, 1, 15)
        _check_image("4x1", 128, 64, 3, 1, 2, 2, 9)


@pytest.mark.parametrize("kernel", [name for name, runs in _C.isas().items() if runs])
@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_an_image_of_padding_alone(size: tuple[int, int], kernel: str, one_thread: None) -> None:
    """One channel without a pixel counts as channels last."""
    w, mask = _weight(16, 9, "unstructured")
    x = torch.zeros((2, 1, *size), dtype=torch.int8)

    def check() -> None:
        with dispatch.force("sparse_conv2d", kernel):
            y = sparse_conv2d(
                x, *encode(w, mask, "unstructured", 1), torch.ones(16), pattern="unstructured",
                weight_shape=(16, 1, 3, 3), padding=2, x_scale=torch.tensor([0.1]), out_dtype=torch.int32,
            )  # fmt: skip
        assert torch.equal(y, torch.zeros(2, 16, size[0] + 2, size[1] + 2, dtype=torch.int32))

    assert survives(check)

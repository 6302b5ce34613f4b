"""``sparse_conv2d`` passes the operator suite on every kernel, and the sizes at which threads part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tautorch import dispatch, ops
from tautorch.reference.sparse_conv2d import sparse_conv2d as reference
from tautorch.testing.cases import Case, conv_case

from .agreement import agree
from .conftest import kernel_parameters
from .suite import ConvSuite

LAST = torch.channels_last
each_kernel = pytest.mark.parametrize("kernel", kernel_parameters("sparse_conv2d"))
each_pattern = pytest.mark.parametrize("pattern", ["4x1", "unstructured"])


class TestSparseConv2d(ConvSuite):
    op = "sparse_conv2d"


# x, w, arguments
SHAPES: list[tuple[tuple[int, ...], tuple[int, int, int, int], dict[str, Any]]] = [
    ((2, 256, 29, 31), (16, 256, 3, 3), {"padding": 1}),  # one, cut within samples on three
    ((2, 16, 90, 8), (24, 16, 3, 3), {"padding": (5, 1), "dilation": (3, 1)}),  # a halo of six rows
    ((7, 64, 9, 9), (40, 64, 3, 3), {"padding": 1}),  # several samples a thread
    ((3, 32, 25, 23), (24, 32, 3, 3), {"stride": 2}),  # rows that no filter sees
    ((3, 32, 25, 23), (640, 32, 1, 1), {"stride": 3}),
    ((2, 32, 20, 21), (24, 32, 3, 2), {"padding": (7, 1), "dilation": (6, 1)}),  # far below, past the image
    ((2, 30, 39, 17), (48, 15, 3, 3), {"padding": 1, "groups": 2}),  # holes between groups
    ((2, 300, 30, 30), (16, 300, 1, 1), {}),
    (
        (1, 30, 180, 20),
        (96, 30, 2, 1),
        {"padding": (9, 0), "stride": (4, 1)},
    ),  # filters that see padding alone
    ((1, 64, 19, 19), (16, 64, 3, 3), {"padding": 8, "dilation": 8}),  # one copy for all: halos too high
    ((1, 16, 3, 600), (24, 16, 3, 3), {"padding": 1}),  # and rows too wide
    ((1, 64, 8, 24), (120, 64, 3, 3), {"padding": 1}),  # three blocks on two threads: one is shared
]


def images(case: Case) -> Iterator[Case]:
    yield case
    yield case.with_x(case.x.contiguous(memory_format=LAST))


@each_kernel
@each_pattern
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_read_their_own_rows(kernel: str, pattern: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for x, w, arguments in SHAPES:
        for mode in ("dynamic", "static", "int8"):
            case = conv_case("sparse_conv2d", x, w, mode=mode, pattern=pattern, **arguments)
            for image in images(case):
                with dispatch.force("sparse_conv2d", kernel):
                    agree(image, kernel)


@each_kernel
def test_two_bands_each_on_two_threads(kernel: str) -> None:
    torch.set_num_threads(2)
    case = conv_case("sparse_conv2d", (4, 128, 48, 32), (4, 128, 3, 3), mode="static", padding=1)
    with dispatch.force("sparse_conv2d", kernel):
        agree(case, kernel)


@each_kernel
@each_pattern
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_its_sample_alone(
    kernel: str, pattern: str, threads: int, value: float
) -> None:
    """Static scales are used before the sample has been seen to its end."""
    torch.set_num_threads(threads)
    for x, w, arguments, places in (
        ((3, 32, 20, 21), (24, 32, 3, 3), {"padding": 1}, [(0, 0), (0, 1), (7, 20), (19, 20)]),
        # rows that no filter sees: behind what two threads read each, and at the end of what three do
        ((3, 32, 384, 1), (640, 32, 1, 1), {"stride": (3, 1)}, [(190, 0), (383, 0)]),
        ((3, 16, 61, 20), (400, 16, 1, 1), {"stride": (30, 1)}, [(7, 19), (59, 3)]),
    ):
        case = conv_case("sparse_conv2d", x, w, mode="static", pattern=pattern, **arguments)  # type: ignore[arg-type]
        with dispatch.force("sparse_conv2d", kernel):
            clean = case(ops.sparse_conv2d)
            for row, column in places:
                spoilt = case.x.clone()
                spoilt[1, 5, row, column] = value
                for image in images(case.with_x(spoilt)):
                    y, raw = image(ops.sparse_conv2d), image.raw()
                    assert bool(torch.isnan(y[1]).all())
                    assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
                    assert torch.equal(raw(ops.sparse_conv2d), raw(reference))

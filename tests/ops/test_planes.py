"""NCHW images: planes become pixels, or are multiplied as they are (1x1), as their reference does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tautorch import _C, dispatch, ops
from tautorch.ops import packing
from tautorch.ops import sparse_entries as entries
from tautorch.ops.int8_conv2d import int8_conv2d
from tautorch.ops.sparse_conv2d import sparse_conv2d
from tautorch.reference.int8_conv2d import int8_conv2d as dense_reference
from tautorch.reference.layouts import encode
from tautorch.reference.sparse_conv2d import sparse_conv2d as sparse_reference
from tautorch.testing.cases import Case, conv_case
from tautorch.testing.values import sparse_mask

from .agreement import agree
from .conftest import kernel_parameters
from .test_page_end import at_page_end, survives

# x, outputs of a 1x1 convolution: strips of 64 pixels and what is left of them, whole vectors of 16 and not;
# channels that fill their words of four and not; more and fewer outputs than a panel, a tile, a thread.
POINTWISE: list[tuple[tuple[int, int, int, int], int]] = [
    ((1, 1, 4, 4), 1),
    ((2, 3, 16, 16), 5),
    ((3, 70, 13, 17), 130),
    ((1, 64, 14, 14), 12),
    ((2, 5, 1, 160), 65),
    ((9, 33, 8, 8), 17),
    ((1, 20, 8, 40), 600),
    ((2, 96, 9, 7), 40),
    ((1, 130, 7, 7), 72),
]
# Channels of a word, of a vector of bytes, of 64 bytes, and around them.
CHANNELS = (1, 2, 3, 4, 5, 12, 15, 16, 17, 20, 48, 63, 64, 68, 80, 130)
# op, channels, weight and arguments of a convolution for each way that planes take.
SHAPES: dict[str, tuple[str, int, tuple[int, int, int, int], dict[str, Any]]] = {
    "dense": ("int8_conv2d", 21, (70, 21, 1, 1), {}),
    "sparse": ("sparse_conv2d", 21, (40, 21, 1, 1), {}),
    "depthwise": ("int8_conv2d", 21, (21, 1, 3, 3), {"padding": 1, "groups": 21}),
    "windows": ("int8_conv2d", 3, (20, 3, 3, 3), {"padding": 1}),
    "image": ("int8_conv2d", 21, (20, 21, 3, 3), {"padding": 1}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ["4x1", "unstructured"]

needs_planes = pytest.mark.skipif(
    not _C.isas().get("avx512vnni", False), reason="this CPU cannot run avx512vnni"
)


def check(case: Case, kernel: str) -> None:
    with dispatch.force(case.op, kernel):
        agree(case, kernel)


@pytest.mark.parametrize("kernel", kernel_parameters("int8_conv2d"))
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
def test_dense_pointwise(kernel: str, threads: int, mode: str) -> None:
    torch.set_num_threads(threads)
    for x, outputs in POINTWISE:
        for dtype in DTYPES if mode != "int8" else DTYPES[:1]:
            check(conv_case("int8_conv2d", x, (outputs, x[1], 1, 1), mode=mode, x_dtype=dtype), kernel)


# Height and width of x, height and width of the filter, options: whole vectors of 16 outputs and not, filters
# wider than a word, planes that leave together and in blocks of rows, strides and dilations that the planes'
# kernel takes and that it does not; planes that are too narrow for it. The first have more channels.
DEPTHWISE: list[tuple[tuple[int, int], tuple[int, int], dict[str, Any]]] = [
    ((1, 1), (1, 1), {}),
    ((7, 7), (3, 3), {"padding": 1}),
    ((4, 15), (3, 3), {"padding": 1}),
    ((1, 14), (3, 3), {"padding": 1}),
    ((28, 33), (3, 3), {"padding": 1}),
    ((28, 33), (3, 3), {"padding": 1, "stride": 2}),
    ((15, 17), (3, 3), {"padding": (0, 1), "stride": (3, 1)}),
    ((15, 32), (3, 3), {"padding": 1, "dilation": (2, 1)}),
    ((16, 16), (5, 5), {"padding": 2}),
    ((19, 41), (7, 7), {"padding": 3, "stride": 2}),
    ((20, 23), (9, 9), {"padding": 4}),
    ((5, 64), (1, 3), {"padding": (0, 1)}),
    ((64, 15), (3, 1), {"padding": (1, 0)}),
    ((6, 18), (2, 4), {}),
    ((20, 20), (3, 3), {"padding": 2, "dilation": 2}),
    ((20, 20), (3, 3), {"padding": 4, "dilation": 4}),
    ((20, 40), (3, 3), {"padding": 5, "dilation": 5}),
    ((20, 60), (3, 3), {"padding": 1, "stride": 4}),
    ((20, 75), (3, 3), {"padding": 1, "stride": 5}),
    ((9, 18), (3, 35), {"padding": (1, 17)}),
    ((9, 18), (3, 33), {"padding": (1, 16)}),
    ((3, 1030), (3, 3), {"padding": 1}),
    ((3, 1030), (3, 3), {"padding": 1, "stride": 2}),
    ((70, 90), (3, 3), {"padding": 1}),
    ((400, 330), (3, 3), {"padding": 1, "stride": 2}),
]


@pytest.mark.parametrize("kernel", kernel_parameters("int8_conv2d"))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
def test_depthwise(kernel: str, threads: int, mode: str) -> None:
    torch.set_num_threads(threads)
    for i, (size, taps, options) in enumerate(DEPTHWISE):
        channels = 70 if i < 6 else 3
        x_dtype = DTYPES[i % 3] if mode != "int8" else torch.float32
        shapes = (2, channels, *size), (channels, 1, *taps)
        check(
            conv_case("int8_conv2d", *shapes, mode=mode, x_dtype=x_dtype, groups=channels, **options), kernel
        )


# x, weight, options of filters whose whole window is a row of the weight: words of windows that are filled
# and not, more outputs than a panel, rows of whole vectors and almost, of several strips, bands of rows,
# images of several samples and one row, strides and dilations that the planes' kernel takes and that it does
# not.
WINDOWS: list[tuple[tuple[int, int, int, int], tuple[int, int, int], dict[str, Any]]] = [
    ((2, 3, 32, 32), (32, 3, 3), {"padding": 1, "stride": 2}),
    ((1, 3, 40, 224), (70, 7, 7), {"padding": 3, "stride": 2}),
    ((3, 1, 30, 30), (5, 5, 5), {"padding": 2}),
    ((2, 7, 17, 15), (20, 3, 3), {"padding": 1}),
    ((2, 4, 9, 47), (17, 3, 3), {"padding": 1}),
    ((2, 5, 9, 45), (16, 3, 3), {"padding": 1, "stride": 3}),
    ((1, 3, 50, 64), (12, 3, 3), {"padding": (1, 0), "stride": 4}),
    ((1, 3, 20, 80), (12, 3, 3), {"padding": 1, "stride": 5}),
    ((2, 2, 1, 96), (9, 3, 3), {"padding": (1, 1)}),
    ((2, 3, 20, 32), (9, 2, 6), {"padding": (0, 3), "stride": (3, 1)}),
    ((1, 3, 20, 32), (9, 3, 3), {"padding": (2, 1), "dilation": (2, 1)}),
    ((1, 3, 700, 64), (8, 3, 3), {"padding": 1}),
    ((1, 3, 9, 20000), (4, 3, 3), {"padding": 1}),
]


@pytest.mark.parametrize("kernel", kernel_parameters("int8_conv2d"))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
def test_windows(kernel: str, threads: int, mode: str) -> None:
    torch.set_num_threads(threads)
    for i, (size, (outputs, *taps), options) in enumerate(WINDOWS):
        x_dtype = DTYPES[i % 3] if mode != "int8" else torch.float32
        weight = (outputs, size[1], taps[0], taps[1])
        check(conv_case("int8_conv2d", size, weight, mode=mode, x_dtype=x_dtype, **options), kernel)


@pytest.mark.parametrize("kernel", kernel_parameters("sparse_conv2d"))
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_pointwise(kernel: str, threads: int, mode: str, pattern: str) -> None:
    """Few kept weights, so that packs hold lists, and more, so that they hold SELL alone."""
    torch.set_num_threads(threads)
    for x, outputs in POINTWISE:
        for keep in (0.1, 0.6):
            shape = (outputs, x[1], 1, 1)
            check(conv_case("sparse_conv2d", x, shape, mode=mode, pattern=pattern, keep=keep), kernel)


@pytest.mark.parametrize("kernel", kernel_parameters("int8_conv2d"))
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_and_types(kernel: str, channels: int) -> None:
    for mode in ("dynamic", "static", "int8"):
        for dtype in DTYPES if mode != "int8" else DTYPES[:1]:
            for arguments in ({"padding": 1}, {"padding": 1, "stride": 2}):
                shape = (6, channels, 3, 3)
                case = conv_case(
                    "int8_conv2d", (2, channels, 9, 11), shape, mode=mode, x_dtype=dtype, **arguments
                )
                check(case, kernel)


@needs_planes
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_outputs(shape: str, activation: str) -> None:
    """Of every type, and of parts of vectors: 13 x 15 pixels of two samples follow each other."""
    op, channels, weight, arguments = SHAPES[shape]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        options: dict[str, Any] = {"activation": activation, "out_dtype": dtype}
        if dtype == torch.int8:
            options.update(
                out_scale=torch.tensor([0.02]), out_zero_point=torch.tensor([3], dtype=torch.int32)
            )
        options.update(arguments)
        case = conv_case(op, (2, channels, 13, 15), weight, mode="static", keep=0.1, **options)
        with dispatch.force(op, "avx512vnni"):
            public = getattr(ops, op)
            planes = case(public)
            pixels = case.with_x(case.x.contiguous(memory_format=torch.channels_last))(public)
        assert planes.is_contiguous() and planes.dtype == dtype
        assert torch.equal(planes, pixels)


@needs_planes
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_value_that_is_not_finite_spoils_its_sample_alone(shape: str, value: float) -> None:
    op, channels, weight, options = SHAPES[shape]
    for size in ((14, 14), (13, 17), (13, 15)):
        case = conv_case(op, (3, channels, *size), weight, mode="static", keep=0.1, **options)
        with dispatch.force(op, "avx512vnni"):
            clean = case(getattr(ops, op))
            for place in ((0, 0, 0), (-1, -1, -1), (channels // 4, 7, 3)):
                spoilt = case.x.clone()
                spoilt[(1, *place)] = value
                y = case.with_x(spoilt)(getattr(ops, op))
                assert bool(torch.isnan(y[1]).all())
                assert torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])


@needs_planes
def test_nothing_past_the_end_of_planes_is_read() -> None:
    """Images that end where a page without access begins."""

    def run() -> None:
        torch.set_num_threads(1)
        for channels in (3, 17, 64):
            for size in ((1, 1), (3, 5), (7, 7), (14, 14), (13, 17), (1, 79)):
                for dtype in (torch.float32, torch.bfloat16, torch.int8):
                    x = torch.randint(-100, 100, (2, channels, *size)).to(dtype)
                    end = at_page_end(x)
                    options = {
                        "x_scale": torch.tensor([1.0]),
                        "x_zero_point": torch.tensor([0], dtype=torch.int32),
                    }
                    w = torch.randint(-127, 128, (40, channels, 1, 1), dtype=torch.int8)
                    scale = torch.ones(40)
                    with dispatch.force("int8_conv2d", "avx512vnni"):
                        got = int8_conv2d(end, w, scale, **options, out_dtype=torch.int32)
                    assert torch.equal(got, dense_reference(x, w, scale, **options, out_dtype=torch.int32))
                    mask = sparse_mask((40, channels), "4x1", 0.1, seed=channels)
                    layout = encode(w.flatten(1) * mask, mask, "4x1", 1)
                    sparse = {**options, "pattern": "4x1", "weight_shape": (40, channels, 1, 1)}
                    with dispatch.force("sparse_conv2d", "avx512vnni"):
                        got = sparse_conv2d(end, *layout, scale, **sparse, out_dtype=torch.int32)
                    assert torch.equal(
                        got, sparse_reference(x, *layout, scale, **sparse, out_dtype=torch.int32)
                    )
                    options.update(padding=1, out_dtype=torch.int32)
                    for groups, per_group in ((channels, 1), (1, channels)):
                        w = torch.randint(-127, 128, (channels, per_group, 3, 3), dtype=torch.int8)
                        with dispatch.force("int8_conv2d", "avx512vnni"):
                            got = int8_conv2d(end, w, torch.ones(channels), groups=groups, **options)
                        assert torch.equal(
                            got, dense_reference(x, w, torch.ones(channels), groups=groups, **options)
                        )

    assert survives(run)


@needs_planes
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packs_for_images_hold_lists(pattern: str) -> None:
    """Besides SELL, where both are at most 1.5 times a dense weight; a linear layer's pack has SELL alone."""
    for keep, lists in ((0.1, True), (0.6, False)):
        mask = sparse_mask((256, 64), pattern, keep, seed=1)
        w = torch.ones(mask.shape, dtype=torch.int8) * mask
        layout = encode(w, mask, pattern, 1)
        packs = [
            entries.pack(*layout, pattern, shape, kernel="avx512vnni", op="test")
            for shape in ((256, 64), (256, 64, 1, 1))
        ]
        linear, image = (packing.pack_info(pack) for pack in packs)
        assert int(image["blocks"]) == (1 if lists else 0) and int(linear["blocks"]) == 0
        assert int(image["slots"]) == int(linear["slots"]) > 0
        if lists:
            assert 2 * packs[1].numel() <= 3 * 256 * 64

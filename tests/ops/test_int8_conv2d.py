"""``int8_conv2d`` passes the operator suite on every kernel, and the sizes at which its own paths change."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from tautorch import _C, dispatch, ops
from tautorch.ops import geometry as conv
from tautorch.ops import packing, tails
from tautorch.reference.int8_conv2d import int8_conv2d as reference
from tautorch.testing.cases import MODES, Case, conv_case
from tautorch.testing.values import int8_values

from .agreement import agree
from .conftest import kernel_parameters
from .suite import ConvSuite

LAST = torch.channels_last
each_kernel = pytest.mark.parametrize("kernel", kernel_parameters("int8_conv2d"))


class TestInt8Conv2d(ConvSuite):
    op = "int8_conv2d"


# x, w, arguments: each meets another cut, copy or form of the weights
SHAPES: list[tuple[tuple[int, ...], tuple[int, int, int, int], dict[str, Any]]] = [
    ((2, 3, 9, 11), (8, 3, 7, 7), {"stride": 2, "padding": 3}),  # rows of 21 bytes
    ((4, 1, 5, 5), (32, 1, 3, 3), {}),  # rows of 3 bytes
    ((1, 2, 70, 3), (5, 2, 3, 3), {"padding": 1}),  # strips of fewer channels than a transposition takes
    ((1, 64, 7, 7), (70, 64, 3, 3), {"padding": 1}),  # shared between threads
    ((1, 64, 7, 7), (600, 64, 3, 3), {"padding": 1}),  # the same, by outputs
    ((2, 48, 80, 91), (2, 48, 3, 3), {"padding": 1}),  # several bands a thread
    ((9, 32, 7, 7), (20, 32, 3, 3), {"padding": 1}),  # six images to a block of pixels
    ((3, 8, 14, 14), (20, 8, 3, 3), {"padding": 1}),  # one
    ((1, 8, 26, 56), (9, 8, 3, 3), {"padding": 1}),  # six rows, the whole block
    ((1, 8, 3, 340), (8, 8, 3, 3), {"padding": 1}),  # a part of a row
    ((1, 17, 13, 13), (19, 17, 3, 3), {"padding": 1, "dilation": (2, 1)}),  # rows, dilated between them
    ((1, 17, 13, 13), (19, 17, 3, 3), {"padding": 1, "dilation": (1, 2)}),  # taps
    ((1, 34, 13, 13), (38, 17, 3, 3), {"padding": 1, "groups": 2}),  # groups of odd width side by side
    ((3, 5, 8, 6), (9, 5, 1, 1), {"stride": 2}),  # pixels that no filter sees are left out
    ((2, 4, 1, 70), (8, 4, 1, 5), {"padding": (0, 2), "stride": (1, 3)}),
    ((2, 4, 70, 2), (8, 4, 5, 1), {"padding": (3, 2), "stride": (2, 2)}),
    ((1, 2, 3, 3), (3, 2, 1, 1), {"padding": 2, "stride": 3}),
    ((1, 3, 2, 2), (3, 3, 2, 2), {"padding": 5, "stride": 4}),  # filters that see padding alone
    ((300, 16, 1, 1), (16, 16, 1, 1), {}),
    ((2, 32, 5, 7), (32, 4, 3, 3), {"padding": 1, "groups": 8}),  # groups that are merged
    ((1, 24, 6, 6), (48, 3, 3, 3), {"padding": 1, "groups": 8}),
    ((1, 15, 6, 6), (20, 3, 3, 3), {"padding": 1, "groups": 5, "dilation": 2}),
    ((2, 8, 6, 6), (24, 1, 3, 3), {"padding": 1, "groups": 8}),  # into one
    ((1, 512, 5, 4), (64, 16, 3, 3), {"padding": 1, "groups": 32}),  # pixels of 512 bytes, with gaps
    ((1, 512, 5, 4), (64, 256, 3, 3), {"padding": 1, "groups": 2, "stride": 2}),
    ((2, 8, 6, 5), (70, 8, 5, 3), {"padding": (4, 1), "dilation": (3, 1)}),  # taps left out above and below
    ((2, 8, 3, 5), (70, 8, 3, 3), {"padding": (2, 1), "dilation": (2, 2)}),
    ((3, 12, 7, 7), (70, 12, 3, 3), {"padding": 1}),  # columns of taps left out at the sides
    ((2, 8, 9, 5), (20, 8, 5, 5), {"padding": 2, "stride": 2}),
    ((2, 8, 4, 3), (20, 8, 3, 3), {"padding": (1, 2)}),
    ((40, 4, 3, 3), (8, 4, 3, 3), {"padding": 1}),
    ((2, 64, 13, 13), (64, 4, 3, 3), {"padding": 1, "groups": 16}),  # one quad of inputs an output
    ((1, 32, 5, 5), (16, 4, 3, 3), {"groups": 8}),  # one, of 64 bytes
    ((1, 32, 6, 7), (32, 8, 3, 3), {"padding": 1, "groups": 4, "stride": 2}),  # two
    ((1, 48, 6, 6), (48, 16, 3, 3), {"padding": 1, "groups": 3}),  # four, by the plain panels
    ((1, 64, 6, 6), (32, 8, 3, 3), {"padding": 1, "groups": 8}),  # two of eight
    ((1, 128, 5, 5), (32, 16, 3, 3), {"padding": 1, "groups": 8}),  # four of sixteen, by the plain panels
    ((1, 24, 5, 5), (30, 12, 3, 3), {"padding": 1, "groups": 2}),
    ((1, 8, 12, 12), (8, 4, 9, 9), {"padding": 4, "groups": 2}),
    ((5, 20, 7, 3), (300, 20, 1, 1), {}),  # int8 images read where they are
    ((1, 24, 3, 3), (600, 24, 1, 1), {}),
    *[  # depthwise: vectors of 32 and 64 channels, taps beside quads of 4, beside passes of 16
        ((1, c, 6, 5), (c, 1, *k), {"groups": c, "padding": 1})
        for c in (1, 31, 32, 33, 64, 65, 96, 130)
        for k in ((1, 1), (2, 2), (3, 3))
    ],
    ((1, 70, 9, 50), (70, 1, 5, 3), {"groups": 70, "padding": (2, 1), "stride": 2}),
    ((1, 40, 8, 9), (40, 1, 4, 4), {"groups": 40, "padding": 2, "dilation": 2}),
    ((1, 40, 8, 9), (40, 1, 5, 5), {"groups": 40, "padding": 2}),
    ((1, 66, 4, 50), (66, 1, 9, 9), {"groups": 66, "padding": 4}),
]


@each_kernel
@pytest.mark.parametrize("x, w, arguments", SHAPES, ids=str)
def test_shapes(
    kernel: str, x: tuple[int, ...], w: tuple[int, int, int, int], arguments: dict[str, Any]
) -> None:
    torch.set_num_threads(2)
    with dispatch.force("int8_conv2d", kernel):
        for mode in MODES["int8_conv2d"]:
            case = conv_case("int8_conv2d", x, w, mode=mode, **arguments)
            agree(case, kernel)
            agree(case.with_x(case.x.contiguous(memory_format=LAST)), kernel)
            if mode in ("static", "int8"):  # where the operand outside the image is 0, taps are left out
                for point in (-128, 0):
                    agree(case.but(x_zero_point=torch.tensor([point], dtype=torch.int32)), kernel)
            if mode == "int8":  # a scale for each sample
                scales = 0.01 + 0.05 * torch.rand(x[0])
                agree(case.but(x_scale=scales, x_zero_point=torch.tensor([-128], dtype=torch.int32)), kernel)


@each_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_sample_alone(kernel: str, value: float) -> None:
    """Static scales are used before the sample has been seen to its end."""
    torch.set_num_threads(2)
    for shape, w, arguments in (
        ((3, 8, 40, 41), (8, 8, 3, 3), {"padding": 1}),
        ((3, 40, 40, 41), (40, 1, 3, 3), {"padding": 1, "groups": 40}),
        ((3, 64, 3, 3), (300, 64, 1, 1), {}),
        # pixels that no filter sees
        ((3, 8, 8, 8), (8, 8, 1, 1), {"stride": 2}),
        ((3, 8, 8, 8), (8, 8, 3, 3), {"stride": 2}),
        ((3, 8, 17, 17), (8, 8, 3, 3), {"stride": 5}),
        # several samples in a block whose pixels are put in another order
        ((3, 8, 7, 7), (8, 8, 3, 3), {"padding": 1, "x_zero_point": torch.tensor([-128], dtype=torch.int32)}),
    ):
        case = conv_case("int8_conv2d", shape, w, mode="static", **arguments)  # type: ignore[arg-type]
        last = (shape[1] - 1, shape[2] - 1, shape[3] - 1)
        for channel, row, column in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 2, 2), last):
            x = case.x.clone()
            x[1, channel, row, column] = value
            for image in (x, x.contiguous(memory_format=LAST)):
                with dispatch.force("int8_conv2d", kernel):
                    y = case.with_x(image)(ops.int8_conv2d)
                    raw = case.with_x(image).raw()
                    assert torch.equal(raw(ops.int8_conv2d), raw(reference))
                    assert bool(torch.isnan(y[1]).all())
                    assert torch.equal(y[0], case(ops.int8_conv2d)[0])
                    assert torch.equal(y[2], case(ops.int8_conv2d)[2])


@each_kernel
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(kernel: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for shape, w, arguments in (
        ((1, 64, 7, 7), (700, 64, 3, 3), {"padding": 1}),
        ((1, 128, 13, 13), (64, 128, 3, 3), {"padding": 1}),
        ((5, 64, 10, 10), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    ):
        for mode in ("static", "dynamic", "int8"):
            with dispatch.force("int8_conv2d", kernel):
                agree(conv_case("int8_conv2d", shape, w, mode=mode, **arguments), kernel)  # type: ignore[arg-type]


@each_kernel
def test_weights_come_back_from_every_form(kernel: str) -> None:
    if kernel == "reference":
        return
    shapes = [(w, a.get("groups", 1), a.get("dilation", 1)) for _, w, a in SHAPES]
    for (w, groups, dilation), only in itertools.product(shapes, (False, True)):
        weight = int8_values(w, "random", seed=1, low=-127)
        geometry = conv.geometry_of("int8_conv2d", w, 1, 0, dilation, groups)
        kind = packing.DENSE_W8 if only else packing.DENSE_I8
        packed = conv.pack_forms(weight, groups, geometry.dilation[1], kind, kernel)
        few = kind == packing.DENSE_I8 and groups > 1 and w[0] // groups == w[1] and w[1] in (4, 8, 16)
        few = few and kernel in dispatch.AVX512 and w[2] * w[3] <= 64
        assert packing.pack_info(packed)["kind"] == (packing.GROUPED_I8 if few else kind)
        assert torch.equal(conv.unpack(packed, w), weight)
        assert torch.equal(conv.unpack(conv.pack(weight, groups, kind, kernel), w), weight)


@each_kernel
def test_one_channel_lies_as_its_strides_say(kernel: str) -> None:
    """Such an image is contiguous both ways; torch's convolutions look at the strides."""
    case = conv_case("int8_conv2d", (2, 1, 6, 5), (4, 1, 3, 3), mode="int8", padding=1)
    for stride, last in (((30, 30, 5, 1), False), ((30, 1, 5, 1), True)):
        x = torch.empty_strided(case.x.shape, stride, dtype=case.x.dtype).copy_(case.x)
        with dispatch.force("int8_conv2d", kernel):
            y = case.with_x(x)(ops.int8_conv2d)
        if kernel != "reference":
            assert y.is_contiguous(memory_format=LAST) == last
        assert torch.equal(y, case(ops.int8_conv2d))


def test_packs_of_other_convolutions_are_refused() -> None:
    case: Case = conv_case("int8_conv2d", (1, 6, 7, 7), (8, 6, 3, 3), mode="int8")
    weight = case.args[1]
    kernel = dispatch.choose(
        dispatch.Problem("int8_conv2d", "cpu", 8, 54, {"groups": 1, "weight_only": False})
    )
    packed = conv.pack_forms(weight, 1, 1, packing.DENSE_I8, kernel)

    def plan(channels: int, kh: int, kw: int, dw: int) -> bytes:
        codes, _ = tails.tail(
            weight_scale=case.args[2],
            bias=None,
            mode=tails.DYNAMIC,
            x_scale=None,
            x_zero_point=None,
            activation="none",
        )
        geometry = (channels, kh, kw, 1, 1, 0, 0, 1, dw)
        return _C.int8_conv2d_plan(packed.data_ptr(), packed.numel(), geometry, codes)

    plan(6, 3, 3, 1)
    for wrong in ((5, 3, 3, 1), (6, 3, 3, 2), (6, 9, 1, 1), (6, 3, 1, 1), (3, 3, 3, 1)):
        with pytest.raises(ValueError, match="of another shape"):
            plan(*wrong)
    with pytest.raises(ValueError, match="unpack: packed weight must hold"):
        conv.unpack(packed, (8, 5, 3, 3))


@each_kernel
@pytest.mark.parametrize("channels", [4, 8, 16])
def test_groups_of_few_channels(channels: int, kernel: str) -> None:
    """Rows of any number of pixels, blocks of 16 channels that are not full, results that are no numbers."""
    codes = {"out_scale": torch.tensor([0.7]), "out_zero_point": torch.tensor([-30], dtype=torch.int32)}
    for i, (width, groups) in enumerate(((1, 2), (2, 3), (3, 5), (5, 9), (7, 4), (8, 17), (12, 3), (57, 2))):
        total, shape = channels * groups, (channels * groups, channels, 3, 3)
        how: dict[str, Any] = ({"padding": 1}, {"padding": 2, "dilation": 2}, {"padding": 1, "stride": 2})[
            i % 3
        ]
        case = conv_case("int8_conv2d", (2, total, 3, width), shape, mode="int8", groups=groups, **how)
        case = case.with_x(case.x.contiguous(memory_format=LAST))
        infinite = torch.randn(total)
        infinite[i % total] = float("inf")  # one alone: what the others get depends on their operands
        with dispatch.force("int8_conv2d", kernel):
            agree(case.but(**codes), kernel)
            agree(case.but(**codes, activation="relu"), kernel)
            agree(case.but(activation=("relu", "gelu")[i % 2]), kernel)
            nan = dataclasses.replace(case.but(**codes), args=(*case.args[:-1], infinite))
            assert nan.bias is infinite and torch.equal(nan(ops.int8_conv2d), nan(reference))


@each_kernel
@pytest.mark.parametrize("channels", [4, 20, 64, 260])
def test_pixels_that_are_read_where_they_lie(channels: int, kernel: str) -> None:
    """Any number of them, blocks and tiles that are not full; all ways out, results that are no numbers."""
    torch.set_num_threads(2)
    codes = {"out_scale": torch.tensor([0.7]), "out_zero_point": torch.tensor([-30], dtype=torch.int32)}
    sizes = [(p, n) for p in (1, 6, 7, 13, 25) for n in (16, 24, 31, 64)] + [(40, 600), (197, 130), (389, 70)]
    for i, (pixels, outputs) in enumerate(sizes):
        case = conv_case("int8_conv2d", (2, channels, 1, pixels), (outputs, channels, 1, 1), mode="int8")
        bias = torch.randn(outputs)
        # One alone: what the others get depends on their operands.
        bias[(0, outputs // 2, -1)[i % 3]] = (float("nan"), float("inf"))[i % 2]
        with dispatch.force("int8_conv2d", kernel):
            for x in (case.x.contiguous(memory_format=LAST), case.x):
                given = case.with_x(x)
                for how in ({}, codes, {**codes, "activation": ("relu", "gelu")[i % 2]}):
                    agree(given.but(**how), kernel)
                nan = dataclasses.replace(given.but(**codes), args=(*given.args[:-1], bias))
                assert torch.equal(nan(ops.int8_conv2d), nan(reference))

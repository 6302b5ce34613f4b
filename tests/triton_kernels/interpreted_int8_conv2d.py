"""int8_conv2d in Triton's interpreter, against the reference. Run by test_int8_conv2d.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.triton_kernels import interpreting

from tautorch.reference.int8_conv2d import int8_conv2d as reference
from tautorch.testing.cases import Case, conv_case
from tautorch.testing.tolerances import assert_close
from tautorch.triton_kernels import int8_conv2d as tk
from tautorch.triton_kernels._device import ACTIVATIONS
from tautorch.triton_kernels._int8_linear_tiles import Config

interpreting.let_scalars_be_indices()

# exp and huge inputs overflow on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
SMALL = Config(16, 32, 32, 4, 2, group_m=2)
# x, weight, stride, padding, dilation
SHAPES = [
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1)),
    ((2, 3, 7, 5), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 33, 6, 7), (33, 33, 3, 2), (2, 1), (2, 0), (1, 2)),
    ((3, 31, 5, 4), (34, 31, 1, 1), (2, 2), (0, 0), (1, 1)),
    ((1, 4, 9, 8), (7, 4, 5, 3), (3, 2), (4, 3), (2, 1)),
]


def check(case: Case, config: Config | None = SMALL) -> None:
    x, weight, scale, bias = case.args
    options = {k: v for k, v in case.kwargs.items() if k != "groups"}
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    last = weight.permute(0, 2, 3, 1).contiguous()
    got = tk.int8_conv2d(x, last, scale, bias, **options, row_sums=sums, config=config)
    expected = case(reference)
    if options.get("activation", "none") not in ("none", "relu") and expected.dtype == torch.int8:
        assert (got.int() - expected.int()).abs().max() <= 1
        return
    kind = "integer" if options.get("activation", "none") in ("none", "relu") else "activation"
    assert_close(got, expected, magnitude=case.magnitude(reference).nan_to_num(1.0), kind=kind)
    raw = {k: v for k, v in case.raw().kwargs.items() if k != "groups"}
    got = tk.int8_conv2d(x, last, scale, bias, **raw, row_sums=sums, config=config)
    assert torch.equal(got, case.raw()(reference))


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("x,w,stride,padding,dilation", SHAPES)
def test_shapes(mode: str, x: Any, w: Any, stride: Any, padding: Any, dilation: Any) -> None:
    check(conv_case("int8_conv2d", x, w, mode=mode, stride=stride, padding=padding, dilation=dilation))


def test_the_chosen_tile() -> None:
    check(
        conv_case("int8_conv2d", (2, 3, 7, 5), (5, 3, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
        None,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_epilogue(out_dtype: torch.dtype, activation: str) -> None:
    case = conv_case(
        "int8_conv2d", (2, 5, 4, 4), (6, 5, 2, 2), stride=(1, 1), padding=(1, 0), dilation=(1, 1)
    ).but(activation=activation)
    if out_dtype == torch.int8:
        zero_point = torch.tensor([-7], dtype=torch.int32)
        check(case.but(out_scale=torch.tensor([0.05]), out_zero_point=zero_point))
    else:
        check(case.but(out_dtype=out_dtype))


def test_special_samples_memory_and_scales() -> None:
    case = conv_case(
        "int8_conv2d", (4, 5, 4, 4), (6, 5, 2, 2), stride=(1, 1), padding=(1, 0), dilation=(1, 1)
    )
    x = case.x.clone()
    x[0, 0, 0, 0], x[1, 4, 3, 3], x[2] = float("nan"), -float("inf"), 0
    check(case.with_x(x))
    check(case.with_x(case.x.contiguous(memory_format=torch.channels_last)))
    check(case.with_x(torch.randn(4, 5, 8, 8)[:, :, ::2, 4:]))
    given = conv_case(
        "int8_conv2d", (4, 5, 4, 4), (6, 5, 2, 2), mode="int8", stride=(1, 1), padding=(1, 0), dilation=(1, 1)
    )
    check(given.but(x_scale=torch.rand(4)))
    assert tk.int8_conv2d(
        case.x[:0], torch.zeros(6, 2, 2, 5, dtype=torch.int8), torch.ones(6), stride=(1, 1), padding=(0, 0),
        dilation=(1, 1),
    ).shape == (0, 6, 3, 3)  # fmt: skip

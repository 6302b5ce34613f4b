"""lowrank_conv2d in Triton's interpreter, against the reference. Run by test_lowrank_conv2d.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.triton_kernels import interpreting

from tautorch.reference.lowrank_conv2d import lowrank_conv2d as reference
from tautorch.testing.cases import Case, conv_case
from tautorch.testing.tolerances import assert_close
from tautorch.triton_kernels import lowrank_conv2d as tk
from tautorch.triton_kernels._device import ACTIVATIONS
from tautorch.triton_kernels._lowrank_tiles import Config, Stage, tile_rank

interpreting.let_scalars_be_indices()

# exp and huge inputs overflow on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
OP = "lowrank_conv2d"
T = 16
MODES = ["float", "dynamic", "static", "int8"]
# x, weight, rank, stride, padding, dilation: one pixel; windows that hang over each edge; ranks and channels
# around a tile and a step; a window wider than the image; windows that touch no pixel at all
SHAPES = [
    ((1, 1, 1, 1), (1, 1, 1, 1), 1, (1, 1), (0, 0), (1, 1)),
    ((2, 3, 7, 5), (33, 3, 3, 3), 15, (1, 1), (1, 1), (1, 1)),
    ((1, 33, 6, 7), (31, 33, 3, 2), 17, (2, 1), (2, 0), (1, 2)),
    ((3, 31, 5, 4), (34, 31, 1, 1), 33, (2, 2), (0, 0), (1, 1)),
    ((1, 4, 9, 8), (7, 4, 5, 3), 5, (3, 2), (4, 3), (2, 1)),
    ((1, 2, 1, 2), (3, 2, 2, 2), 2, (3, 3), (5, 4), (1, 1)),
]


def configs(case: Case, down: int = 3, up: int = 2) -> dict[str, Config]:
    """Both ways to run a case, in small tiles, K and N shared among programs that have unequal parts."""
    size = case.args[1].element_size()
    whole = tile_rank(case.args[1].shape[0], size)
    narrow = whole if size == 1 else T
    return {
        "one": Config(None, Stage(T, 32, 32, 4, 2, splits=up)),
        "two": Config(Stage(T, narrow, 32, 4, 2, splits=down), Stage(T, 32, 32, 4, 2, group_m=2)),
        "whole": Config(Stage(32, whole, 32, 4, 2), Stage(32, T, 32, 4, 2)),
    }


def run(case: Case, config: Config | None) -> torch.Tensor:
    x, down, up, bias = case.args
    options = {k: v for k, v in case.kwargs.items() if k != "groups"}
    if options.get("x_zero_point") is not None:
        options["down_sums"] = down.sum((1, 2, 3), dtype=torch.int32)
    return tk.lowrank_conv2d(
        x, down.permute(0, 2, 3, 1).contiguous(), up.flatten(1), bias, **options, config=config
    )


def check(case: Case, config: Config | None) -> None:
    actual, expected = run(case, config), case(reference)
    kind = "integer" if case.exact else "float"
    size = case.magnitude(reference).nan_to_num(1.0)
    assert_close(actual, expected, magnitude=size, kind=kind, k=case.k + case.args[1].shape[0])
    if case.exact:
        assert torch.equal(run(case.raw(), config), case.raw()(reference))


def case_of(shape: Any, mode: str, **more: Any) -> Case:
    x, w, rank, stride, padding, dilation = shape
    where = {"stride": stride, "padding": padding, "dilation": dilation}
    return conv_case(OP, x, w, mode=mode, rank=rank, **where, **more)


@pytest.mark.parametrize("way", ["one", "two", "whole", "chosen"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Any, mode: str, way: str) -> None:
    case = case_of(shape, mode)
    check(case, configs(case).get(way))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_epilogue(out_dtype: torch.dtype, activation: str, bias: bool) -> None:
    way = "one" if bias else "two"
    case = case_of(SHAPES[1], "dynamic", bias=bias).but(activation=activation)
    if out_dtype == torch.int8:
        zero_point = torch.tensor([-7], dtype=torch.int32)
        case = case.but(out_scale=torch.tensor([0.03]), out_zero_point=zero_point if bias else None)
    else:
        case = case.but(out_dtype=out_dtype)
    actual, expected = run(case, configs(case)[way]), case(reference)
    if out_dtype == torch.int8:
        apart = (actual.int() - expected.int()).abs().max()
        assert apart <= (0 if activation in ("none", "relu") else 1) and expected.unique().numel() > 10
        return
    kind = "integer" if activation in ("none", "relu") else "activation"
    assert_close(actual, expected, magnitude=case.magnitude(reference), kind=kind)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_ranks_beyond_a_tile(mode: str) -> None:
    check(case_of(((2, 3, 4, 3), (9, 3, 2, 2), 257, (1, 1), (1, 0), (1, 1)), mode), None)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_any_split_gives_the_same(splits: int) -> None:
    """More parts than steps (two taps of two chunks) leave some parts empty."""
    for mode in ("float", "dynamic"):
        case = case_of(((2, 40, 3, 4), (70, 40, 1, 2), 20, (1, 1), (0, 0), (1, 1)), mode)
        check(case, configs(case, down=splits, up=splits)["one"])
        check(case, configs(case, down=splits)["two"])


@pytest.mark.parametrize("way", ["one", "two"])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_special_samples_memory_and_scales(way: str, mode: str) -> None:
    case = case_of(((4, 5, 4, 4), (6, 5, 2, 2), 4, (1, 1), (1, 0), (1, 1)), mode)
    config = configs(case)[way]
    x = case.x.clone()
    x[0, 0, 0, 0], x[1, 4, 3, 3], x[2] = float("nan"), -float("inf"), 0
    got = run(case.with_x(x), config)
    assert got[:2].isnan().all() and not got[2:].isnan().any()
    assert_close(got, case.with_x(x)(reference), magnitude=case.magnitude(reference).nan_to_num(1.0))
    check(case.with_x(case.x.contiguous(memory_format=torch.channels_last)), config)
    check(case.with_x(torch.randn(4, 5, 8, 8)[:, :, ::2, 4:]), config)
    given = case_of(((4, 5, 4, 4), (6, 5, 2, 2), 4, (1, 1), (1, 0), (1, 1)), "int8")
    check(given.but(x_scale=torch.rand(4)), config)


@pytest.mark.parametrize("way", ["one", "two"])
def test_what_is_not_finite_stays_in_its_windows(way: str) -> None:
    """Float factors: padding and a step's tail must not multiply what lies there."""
    case = case_of(((1, 3, 5, 5), (6, 3, 3, 3), 4, (1, 1), (1, 1), (1, 1)), "float")
    x = case.x.clone()
    x[0, 2, 0, 0] = float("inf")
    got = run(case.with_x(x), configs(case)[way])
    touched = torch.zeros(5, 5, dtype=torch.bool)
    touched[:2, :2] = True
    assert (~got.isfinite().all(1))[0].equal(touched)


@pytest.mark.parametrize("way", ["one", "two"])
def test_half_precision_factors(way: str) -> None:
    """The interpreter cannot multiply bf16; fp16 takes the same path. h is rounded to x's dtype."""
    case = case_of(SHAPES[2], "float", x_dtype=torch.float16)
    x, down, up, bias = case.args
    down, up = down.half(), up.half()
    got = run(Case(OP, "float", "", case.k, (x, down, up, bias), case.kwargs), configs(case)[way])
    where = {name: case.kwargs[name] for name in ("stride", "padding", "dilation")}
    conv = torch.nn.functional.conv2d
    h = conv(x.double(), down.double(), **where).half().double()
    want = conv(h, up.double(), bias.double()).half()
    size = conv(conv(x.double().abs(), down.double().abs(), **where), up.double().abs(), bias.double().abs())
    assert got.dtype == torch.float16
    assert bool(((got.double() - want.double()).abs() <= 2 * torch.finfo(torch.float16).eps * size).all())


def test_no_samples() -> None:
    for mode in MODES:
        case = case_of(SHAPES[1], mode)
        assert run(case.with_x(case.x[:0]), None).shape == (0, 33, 7, 5)


def test_one_launch_takes_no_rank_beyond_a_tile() -> None:
    case = case_of(((1, 3, 4, 3), (9, 3, 2, 2), 257, (1, 1), (1, 0), (1, 1)), "float")
    with pytest.raises(ValueError, match="one launch takes r <= 256, got r=257"):
        run(case, Config(None, Stage(T, 32, 32, 4, 2)))

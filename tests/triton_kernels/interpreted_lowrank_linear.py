"""lowrank_linear in Triton's interpreter, against the reference. Run by test_lowrank_linear.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.triton_kernels import interpreting
from torch import Tensor

from tautorch.reference.lowrank_linear import lowrank_linear as reference
from tautorch.reference.quantizer import quantize_weight
from tautorch.testing.cases import Case, linear_case
from tautorch.testing.tolerances import assert_close
from tautorch.triton_kernels import _lowrank_launch
from tautorch.triton_kernels import lowrank_linear as tk
from tautorch.triton_kernels._device import ACTIVATIONS
from tautorch.triton_kernels._lowrank_tiles import Config, Stage, tile_rank

interpreting.let_scalars_be_indices()

# exp and huge inputs overflow on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
OP = "lowrank_linear"
T = 16
SIZES = [
    (1, 1, 1, 1),
    (T - 1, 33, 31, 15),
    (T, 32, 32, 16),
    (T + 1, 31, 33, 17),
    (2, 67, 7, 33),
    (35, 2, 131, 40),
]
MODES = ["float", "dynamic", "static", "int8"]


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


def with_sums(case: Case) -> Case:
    """The case as the kernels take it: with the sums that a zero point needs."""
    if case.kwargs.get("x_zero_point") is None:
        return case
    sums = {"down_sums": case.args[1].sum(1, dtype=torch.int32)}
    if case.kwargs.get("residual") is not None:
        sums["residual_sums"] = case.kwargs["residual"].sum(1, dtype=torch.int32)
    return case.but(**sums)


def check(case: Case, config: Config | None) -> None:
    actual = with_sums(case).but(config=config)(tk.lowrank_linear)
    kind = "integer" if case.exact else "float"
    expected = case(reference)
    assert_close(actual, expected, magnitude=case.magnitude(reference), kind=kind, k=case.k)
    if case.exact and "residual" not in case.kwargs:
        raw = with_sums(case.raw()).but(config=config)(tk.lowrank_linear)
        assert torch.equal(raw, case.raw()(reference))


@pytest.mark.parametrize("way", ["one", "two", "whole", "chosen"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m,n,k,r", SIZES)
def test_sizes(m: int, n: int, k: int, r: int, mode: str, way: str) -> None:
    case = linear_case(OP, m, n, k, mode=mode, rank=r)
    check(case, configs(case).get(way))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_epilogue(out_dtype: torch.dtype, activation: str, bias: bool) -> None:
    way = "one" if bias else "two"
    case = linear_case(OP, 17, 33, 40, rank=9, bias=bias).but(activation=activation)
    if out_dtype == torch.int8:
        zero_point = torch.tensor([-7], dtype=torch.int32)
        case = case.but(out_scale=torch.tensor([0.03]), out_zero_point=zero_point if bias else None)
    else:
        case = case.but(out_dtype=out_dtype)
    actual, expected = case.but(config=configs(case)[way])(tk.lowrank_linear), case(reference)
    if out_dtype == torch.int8:
        apart = (actual.int() - expected.int()).abs().max()
        assert apart <= (0 if activation in ("none", "relu") else 1) and expected.unique().numel() > 10
        return
    kind = "integer" if activation in ("none", "relu") else "activation"
    assert_close(actual, expected, magnitude=case.magnitude(reference), kind=kind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m,n,k,r", [(1, 1, 1, 1), (17, 33, 65, 33)])
@pytest.mark.parametrize("narrow", [True, False])
def test_int8_residual(mode: str, m: int, n: int, k: int, r: int, narrow: bool) -> None:
    values, scale = quantize_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(3)))
    case = linear_case(OP, m, n, k, mode=mode, rank=r).but(residual=values, residual_scale=scale)
    actual = with_sums(case).but(config=configs(case)["two"] if narrow else None)(tk.lowrank_linear)
    size = case.magnitude(reference) + case.x.float().abs().max() * 0.1 * k
    assert_close(actual, case(reference), magnitude=size, kind="float", k=case.k)


@pytest.mark.parametrize("r", [257, 300])
def test_int8_ranks_beyond_a_tile(r: int) -> None:
    for mode in ("dynamic", "static"):
        check(linear_case(OP, 5, 33, 40, mode=mode, rank=r), None)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_any_split_gives_the_same(splits: int) -> None:
    """More parts than steps leave some parts empty."""
    for mode in ("float", "dynamic"):
        case = linear_case(OP, 18, 35, 100, mode=mode, rank=20)
        check(case, configs(case, down=splits, up=splits)["one"])
        check(case, configs(case, down=splits)["two"])


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(_lowrank_launch, "_counters", lambda count, device: kept)
    case = linear_case(OP, 20, 17, 100, rank=9)
    for _ in range(2):
        check(case, configs(case)["two"])
        assert not kept.any()


@pytest.mark.parametrize("way", ["one", "two"])
def test_special_rows(way: str) -> None:
    for mode in ("dynamic", "static"):
        case = linear_case(OP, 9, 33, 70, mode=mode, rank=12)
        x = case.x.clone()
        x[0], x[1] = 0, 2.0**-120
        x[2, 3], x[3, 69], x[4, 0] = float("nan"), float("inf"), -float("inf")
        case = case.with_x(x)
        got = with_sums(case).but(config=configs(case)[way])(tk.lowrank_linear)
        assert got[2:5].isnan().all() and not got[5:].isnan().any()
        assert_close(got, case(reference), magnitude=case.magnitude(reference).nan_to_num(1.0))


@pytest.mark.parametrize("way", ["one", "two"])
def test_half_precision_factors(way: str) -> None:
    """The interpreter cannot multiply bf16; fp16 takes the same path. h is rounded to x's dtype."""
    case = linear_case(OP, 20, 35, 65, mode="float", rank=9, x_dtype=torch.float16)
    x, down, up, bias = case.args
    down, up = down.half(), up.half()
    got = tk.lowrank_linear(x, down, up, bias, config=configs(case)[way])
    want = ((x.double() @ down.double().T).half().double() @ up.double().T + bias).half()
    size = (x.double().abs() @ down.double().abs().T) @ up.double().abs().T + bias.abs()
    assert got.dtype == torch.float16
    assert bool(((got.double() - want.double()).abs() <= 2 * torch.finfo(torch.float16).eps * size).all())


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 0, 33), (2, 3, 33)])
@pytest.mark.parametrize("mode", ["float", "dynamic"])
def test_leading_shapes(mode: str, shape: tuple[int, ...]) -> None:
    case = linear_case(OP, 4, 9, 33, mode=mode)
    case = case.with_x(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    assert case(tk.lowrank_linear).shape == (*shape[:-1], 9)
    if 0 not in shape:
        check(case, None)


def test_strides() -> None:
    base = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))
    wide = torch.randint(-128, 128, (40, 40), dtype=torch.int8)
    for mode in ("float", "dynamic", "int8"):
        case = linear_case(OP, 9, 17, 20, mode=mode)
        b = wide if mode == "int8" else base
        for x in (b[:9, :20], b[:20, :9].t(), b[:9, ::2], b[0, :20].expand(9, 20)):
            check(case.with_x(x), configs(case)["two"])


def test_one_scale_per_row() -> None:
    case = linear_case(OP, 21, 33, 40, mode="int8")
    check(case.but(x_scale=torch.rand(21) * 0.1), configs(case)["two"])


def test_zero_sizes() -> None:
    none: dict[str, Any] = {"down_scale": torch.ones(0), "up_scale": torch.ones(4)}
    empty: Tensor = torch.zeros(0, 8, dtype=torch.int8)
    bias = torch.arange(4.0)
    y = tk.lowrank_linear(torch.ones(3, 8), empty, torch.zeros(4, 0, dtype=torch.int8), bias, **none)
    assert torch.equal(y, bias.expand(3, 4))
    y = tk.lowrank_linear(torch.ones(3, 8), torch.zeros(0, 8), torch.zeros(4, 0), bias)
    assert torch.equal(y, bias.expand(3, 4))

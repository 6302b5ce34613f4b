"""``LowRankLinear`` passes the contract; its factors are the best ones, or those of a pair."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tautorch.nn import Int8Linear, LowRankLinear, SparseLinear
from tautorch.testing.cases import Case
from tautorch.testing.values import sparse_mask

from .contract import LinearContract
from .subject import Variant

ODD = {"in_features": 70, "out_features": 37}


def sparse(rest: nn.Linear) -> SparseLinear:
    """A residual of two fifths of the weights, in int8."""
    return SparseLinear.from_float(rest, pattern="4x1", mask=sparse_mask(rest.weight.shape, "4x1", 0.4))


def sparse_float(rest: nn.Linear) -> SparseLinear:
    """The same in float."""
    mask = sparse_mask(rest.weight.shape, "unstructured", 0.4)
    return SparseLinear.from_float(rest, pattern="unstructured", mask=mask, weight_dtype=torch.float32)


class TestLowRankLinear(LinearContract):
    module_type = LowRankLinear
    variants: ClassVar[dict[str, Variant]] = {
        "float": (ODD, {"rank": 37}),
        "int8": (ODD, {"rank": 20, "weight_dtype": torch.int8}),
        "static": (
            {"in_features": 64, "out_features": 48},
            {
                "rank": 33,
                "weight_dtype": torch.int8,
                "quant": "static",
                "x_scale": 0.021,
                "x_zero_point": 3,
                "activation": "gelu",
            },
        ),
        "no_bias": (
            {"in_features": 33, "out_features": 65, "bias": False},
            {"rank": 1, "activation": "silu"},
        ),
        "residual": (ODD, {"rank": 8, "weight_dtype": torch.int8, "residual": "int8"}),
        "static_residual": (
            ODD,
            {
                "rank": 8,
                "weight_dtype": torch.int8,
                "residual": sparse,
                "quant": "static",
                "x_scale": 0.021,
                "x_zero_point": 3,
                "activation": "relu",
            },
        ),
        "float_residual": (ODD, {"rank": 8, "residual": sparse_float, "activation": "gelu"}),
        "float_int8_residual": (ODD, {"rank": 8, "residual": "int8"}),
    }

    def case(self, module: Any, x: Tensor) -> Case:
        state = module.state_dict()
        names = ("down_scale", "up_scale", "x_scale", "x_zero_point")
        kwargs = {k: state[k] for k in names if k in state}
        if module.residual is not None:
            kept = {name.removeprefix("residual."): t for name, t in state.items() if "residual." in name}
            kwargs["residual"] = kept.get("weight", kept.get("values"))
            kwargs["residual_scale"] = kept.get("weight_scale")
            if "values" in kept:
                kwargs["residual_pattern"] = module.residual.pattern
                kwargs["residual_crow_indices"] = kept["crow_indices"]
                kwargs["residual_col_indices"] = kept["col_indices"]
        mode = module.quant if module.weight_dtype == torch.int8 else "float"
        args = (x, state["down"], state["up"], state.get("bias"))
        return Case(
            self.op,
            mode,
            "LowRankLinear",
            module.in_features,
            args,
            {**kwargs, "activation": module.activation},
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
    def test_the_residual_gives_the_layer_back(self, dtype: torch.dtype) -> None:
        layer, x = nn.Linear(40, 50), torch.randn(9, 40)
        module = LowRankLinear.from_float(layer, rank=5, weight_dtype=dtype, residual="int8")
        error = (module(x) - layer(x)).norm() / layer(x).norm()
        assert float(error.detach()) < 0.015
        weight = module.to_float().weight
        torch.testing.assert_close(weight, layer.weight, rtol=0, atol=0.01 * float(layer.weight.abs().max()))
        expected = module(x)
        module.residual.weight.zero_()  # an edit is seen
        assert float((module(x) - expected).detach().norm()) > 0.1 * float(expected.detach().norm())

    def test_a_ready_residual_with_a_pair(self) -> None:
        pair = nn.Sequential(OrderedDict(down=nn.Linear(24, 7), up=nn.Linear(7, 18)))
        rest = nn.Linear(24, 18, bias=False)
        x = torch.randn(9, 24)
        for residual in (Int8Linear.from_float(rest), SparseLinear.from_float(rest, weight_dtype="float32")):
            module = LowRankLinear.from_float(pair, residual=residual)
            assert module.residual is residual
            expected = pair(x) + rest(x)
            assert float(((module(x) - expected).norm() / expected.norm()).detach()) < 0.01
            with pytest.raises(ValueError, match="to_factors needs a layer without residual"):
                module.to_factors()

    def test_bad_residuals(self) -> None:
        layer = nn.Linear(8, 6)
        made = LowRankLinear.from_float
        with pytest.raises(ValueError, match='residual must be "int8", a function or None'):
            made(layer, rank=2, residual="int4")
        with pytest.raises(TypeError, match="residual must be Int8Linear or SparseLinear, got Linear"):
            made(layer, rank=2, residual=lambda rest: rest)
        with pytest.raises(ValueError, match="residual must have no bias"):
            made(layer, rank=2, residual=Int8Linear.from_float(layer))
        with pytest.raises(ValueError, match="residual must be 8 -> 6"):
            made(layer, rank=2, residual=Int8Linear(8, 7, bias=False))
        with pytest.raises(ValueError, match="residual must hold int8 values with int8 factors"):
            made(layer, rank=2, weight_dtype=torch.int8, residual=sparse_float)
        with pytest.raises(ValueError, match="residual must name one of"):
            LowRankLinear(8, 6, rank=2, residual={"class": "Linear"})
        pair = nn.Sequential(OrderedDict(down=nn.Linear(8, 3), up=nn.Linear(3, 6)))
        with pytest.raises(TypeError, match="residual must be a module or None for a pair"):
            made(pair, residual="int8")

    def test_full_rank_is_the_layer(self) -> None:
        layer = nn.Linear(19, 23)
        module = LowRankLinear.from_float(layer, rank=19)
        x = torch.randn(5, 19)
        torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.to_float().weight, layer.weight, rtol=1e-4, atol=1e-5)

    def test_the_factors_are_the_best_ones(self) -> None:
        layer = nn.Linear(30, 20)
        module = LowRankLinear.from_float(layer, rank=6)
        lost = torch.linalg.svdvals(layer.weight.detach().double())[6:].norm()
        error = (module.to_float().weight - layer.weight).detach().double().norm()
        torch.testing.assert_close(error, lost, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
    def test_a_pair_is_taken_as_it_is(self, biases: tuple[bool, bool], dtype: torch.dtype) -> None:
        down, up = nn.Linear(24, 7, bias=biases[0]), nn.Linear(7, 18, bias=biases[1])
        pair = nn.Sequential(OrderedDict(down=down, up=up)).eval()
        module = LowRankLinear.from_float(pair, weight_dtype=dtype)
        x = torch.randn(9, 24)
        assert module.rank == 7 and not module.training
        error = float(((module(x) - pair(x)).norm() / pair(x).norm()).detach())
        assert error < (1e-5 if dtype == torch.float32 else 0.03)
        first, second = module.to_factors()
        torch.testing.assert_close(second(first(x)), module.to_float()(x), rtol=1e-4, atol=1e-5)

    def test_bad_factors(self) -> None:
        layer, pair = nn.Linear(8, 6), nn.Sequential(OrderedDict(down=nn.Linear(8, 3), up=nn.Linear(3, 6)))
        for rank in (0, 7):
            with pytest.raises(ValueError, match=rf"lowrank_linear: rank must be in 1\.\.6 .*, got {rank}"):
                LowRankLinear.from_float(layer, rank=rank)
        with pytest.raises(TypeError, match="lowrank_linear: rank must be given"):
            LowRankLinear.from_float(layer)
        with pytest.raises(ValueError, match="lowrank_linear: rank must be None or 3, the pair's, got 2"):
            LowRankLinear.from_float(pair, rank=2)
        with pytest.raises(ValueError, match="lowrank_linear: up must have in_features=3"):
            LowRankLinear.from_factors(nn.Linear(8, 3), nn.Linear(4, 6))
        with pytest.raises(ValueError, match="lowrank_linear: weight_dtype must be"):
            LowRankLinear.from_float(layer, rank=2, weight_dtype=torch.float16)
        with pytest.raises(ValueError, match='lowrank_linear: quant must be "dynamic" for float32'):
            LowRankLinear.from_float(layer, rank=2, quant="static", x_scale=0.1)


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float32])
def test_another_residual_shows_in_the_next_call(weight_dtype: torch.dtype) -> None:
    def layer(residual: bool) -> LowRankLinear:
        torch.manual_seed(0)
        linear = nn.Linear(64, 64)
        given = "int8" if residual else None
        return LowRankLinear.from_float(linear, rank=4, weight_dtype=weight_dtype, residual=given)

    x, ours, alone = torch.randn(3, 64), layer(True), layer(False)
    with_residual = ours(x)
    assert not torch.allclose(with_residual, alone(x))
    kept = ours.residual
    ours.residual = None
    assert torch.equal(ours(x), alone(x))
    other = Int8Linear.from_float(nn.Linear(64, 64, bias=False))
    for residual in (other, kept):
        ours.residual = residual
        assert torch.equal(ours(x), copy.deepcopy(ours)(x))
    assert torch.equal(ours(x), with_residual)
    ours.residual = Int8Linear.from_float(nn.Linear(64, 32, bias=False))
    with pytest.raises(ValueError, match="residual must be 64 -> 64"):
        ours(x)


def test_a_pickle_without_a_registered_residual_stays_ready() -> None:
    layer = LowRankLinear.from_float(nn.Linear(16, 8), rank=2)
    state = layer.__getstate__()
    state["_modules"] = {}
    state["residual"] = None
    old = LowRankLinear.__new__(LowRankLinear)
    old.__setstate__(state)
    x = torch.randn(3, 16)
    assert torch.equal(old(x), layer(x)) and old.ready() and old.residual is None


def test_every_layer_of_a_checkpoint_tells_what_is_wrong_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Int8Linear(4, 4))
    state = {**model.state_dict(), "0.weight": torch.zeros(1, 1)}
    del state["1.bias"]
    with pytest.raises(RuntimeError, match=r'(?s)Missing key\(s\).*"1.bias".*size mismatch for 0.weight'):
        model.load_state_dict(state)


class Adapter(nn.Module):
    """Something between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def test_two_layers_with_something_between_are_no_pair() -> None:
    with pytest.raises(TypeError, match="Adapter, whose forward may do more"):
        LowRankLinear.from_float(Adapter())
    swapped = nn.Sequential(OrderedDict(up=nn.Linear(16, 4), down=nn.Linear(4, 16)))
    with pytest.raises(TypeError, match="OrderedDict"):
        LowRankLinear.from_float(swapped)

"""``LowRankLinear`` passes the contract; its factors are the best ones, or those of a pair."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tautorch.nn import LowRankLinear
from tautorch.testing.cases import Case

from .contract import LinearContract, Variant

ODD = {"in_features": 70, "out_features": 37}


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
    }

    def case(self, module: Any, x: Tensor) -> Case:
        state = module.state_dict()
        names = ("down_scale", "up_scale", "x_scale", "x_zero_point")
        kwargs = {k: state[k] for k in names if k in state}
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

"""``Int8Linear`` passes the contract."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tautorch.nn import Int8Linear
from tautorch.testing.cases import Case

from .contract import LinearContract
from .subject import Variant


class TestInt8Linear(LinearContract):
    module_type = Int8Linear
    variants: ClassVar[dict[str, Variant]] = {
        "dynamic": ({"in_features": 70, "out_features": 37}, {}),
        "static": (
            {"in_features": 64, "out_features": 48},
            {"quant": "static", "x_scale": 0.021, "x_zero_point": 3, "activation": "gelu"},
        ),
        "weight_only": ({"in_features": 33, "out_features": 65}, {"quant": "weight_only"}),
        "no_bias": ({"in_features": 65, "out_features": 16, "bias": False}, {"activation": "silu"}),
    }

    def case(self, module: Any, x: Tensor) -> Case:
        state = module.state_dict()
        kwargs = {k: state[k] for k in ("x_scale", "x_zero_point") if k in state}
        mode = module.quant
        if mode == "weight_only":
            kwargs["weight_only"] = True
        kwargs["activation"] = module.activation
        args = (x, state["weight"], state["weight_scale"], state.get("bias"))
        return Case(self.op, mode, "Int8Linear", module.in_features, args, kwargs)

    def test_static_layers_take_int8(self) -> None:
        module = Int8Linear.from_float(nn.Linear(20, 30), quant="static", x_scale=0.05, x_zero_point=-4)
        q = torch.randint(-128, 128, (7, 20), dtype=torch.int8)
        y = module(q)
        assert y.dtype == torch.float32
        case = self.case(module, q)
        self.agrees(module, q, y)
        assert case.kwargs["x_scale"].dtype == torch.float32

    def test_dynamic_layers_refuse_int8(self) -> None:
        with pytest.raises(ValueError, match="int8_linear: x_scale must be given for int8 x"):
            Int8Linear.from_float(nn.Linear(4, 4))(torch.zeros(2, 4, dtype=torch.int8))

    def test_scales_must_fit_the_quantisation(self) -> None:
        layer = nn.Linear(4, 4)
        with pytest.raises(ValueError, match="int8_linear: quant must be one of"):
            Int8Linear.from_float(layer, quant="int4")
        with pytest.raises(ValueError, match=r"int8_linear: .*needs x_scale"):
            Int8Linear.from_float(layer, quant="static")
        with pytest.raises(ValueError, match="int8_linear: x_scale and x_zero_point need"):
            Int8Linear.from_float(layer, x_scale=0.1)
        for scale, point in ((0.0, 0), (float("nan"), 0), (-1.0, 0), (1.0, 128), (1.0, -129)):
            with pytest.raises(ValueError, match=r"int8_linear: x_(scale|zero_point) must"):
                Int8Linear.from_float(layer, quant="static", x_scale=scale, x_zero_point=point)

    def test_too_long_for_int32(self) -> None:
        with pytest.raises(ValueError, match="int8_linear: K must be at most 66311"):
            Int8Linear(66312, 1)
        Int8Linear(66312, 1, quant="weight_only")

    def test_an_ensemble_runs_each_with_its_own(self) -> None:
        x = torch.randn(4, 16)
        layers = [Int8Linear.from_float(nn.Linear(16, 24)) for _ in range(3)]
        want = torch.stack([layer(x) for layer in layers])  # all are packed
        members = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
        for device in ("cpu", "meta"):
            base = copy.deepcopy(layers[0]).to(device)
            run = torch.func.vmap(lambda *state, base=base: torch.func.functional_call(base, state, (x,)))
            assert torch.equal(run(*members), want)

"""``LowRankConv2d`` passes the contract."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tautorch.nn import LowRankConv2d
from tautorch.testing.cases import Case

from .contract import ConvContract
from .subject import Variant
from .test_int8_conv2d import geometry_of

ODD = {"in_channels": 10, "out_channels": 18, "kernel_size": 3, "padding": 1}
GROUPED = {"in_channels": 12, "out_channels": 20, "kernel_size": (3, 2), "stride": (2, 1), "groups": 2}


class TestLowRankConv2d(ConvContract):
    module_type = LowRankConv2d
    variants: ClassVar[dict[str, Variant]] = {
        "float": (ODD, {"rank": 18}),
        "int8": (ODD, {"rank": 7, "weight_dtype": torch.int8}),
        "grouped": (GROUPED, {"rank": 5, "weight_dtype": torch.int8, "activation": "relu"}),
        "static": (
            GROUPED,
            {
                "rank": 10,
                "weight_dtype": torch.int8,
                "quant": "static",
                "x_scale": 0.021,
                "x_zero_point": 3,
                "activation": "gelu",
            },
        ),
        "no_bias": ({**ODD, "bias": False}, {"rank": 1, "activation": "silu"}),
    }

    def case(self, module: Any, x: Tensor) -> Case:
        state = module.state_dict()
        names = ("x_scale", "x_zero_point", "down_scale", "up_scale")
        kwargs = {k: state[k] for k in names if k in state}
        kwargs.update(geometry_of(module), activation=module.activation)
        mode = module.quant if module.weight_dtype == torch.int8 else "float"
        k = state["down"][0].numel() + module.rank
        args = (x, state["down"], state["up"], state.get("bias"))
        return Case(self.op, mode, "LowRankConv2d", k, args, kwargs)

"""``Int8Conv2d`` passes the contract."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tautorch.nn import Int8Conv2d
from tautorch.testing.cases import Case

from .contract import ConvContract
from .subject import Variant


def geometry_of(module: Any) -> dict[str, Any]:
    """The convolution's keywords of the functional form; padding in pixels."""
    padding = module.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return {
        "stride": module.stride,
        "padding": (0, 0) if padding == "valid" else padding,
        "dilation": module.dilation,
        "groups": module.groups,
    }


class TestInt8Conv2d(ConvContract):
    module_type = Int8Conv2d
    variants: ClassVar[dict[str, Variant]] = {
        "dynamic": ({"in_channels": 10, "out_channels": 18, "kernel_size": 3, "padding": 1}, {}),
        "static": (
            {"in_channels": 12, "out_channels": 20, "kernel_size": (3, 2), "stride": (2, 1), "groups": 4},
            {"quant": "static", "x_scale": 0.021, "x_zero_point": 3, "activation": "gelu"},
        ),
        "weight_only": (
            {"in_channels": 5, "out_channels": 33, "kernel_size": 3, "padding": "same", "dilation": 2},
            {"quant": "weight_only"},
        ),
        "depthwise": (
            {
                "in_channels": 17,
                "out_channels": 17,
                "kernel_size": 5,
                "padding": 2,
                "groups": 17,
                "bias": False,
            },
            {"activation": "silu"},
        ),
        "pointwise": ({"in_channels": 33, "out_channels": 16, "kernel_size": 1}, {"activation": "relu"}),
    }

    def case(self, module: Any, x: Tensor) -> Case:
        state = module.state_dict()
        kwargs = {k: state[k] for k in ("x_scale", "x_zero_point") if k in state}
        kwargs.update(geometry_of(module), activation=module.activation)
        if module.quant == "weight_only":
            kwargs["weight_only"] = True
        args = (x, state["weight"], state["weight_scale"], state.get("bias"))
        return Case(self.op, module.quant, "Int8Conv2d", state["weight"][0].numel(), args, kwargs)

"""``SparseConv2d`` passes the contract."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tautorch.nn import SparseConv2d
from tautorch.testing.cases import Case
from tautorch.testing.values import sparse_mask

from .contract import ConvContract
from .subject import Variant
from .test_int8_conv2d import geometry_of

ODD = {"in_channels": 10, "out_channels": 18, "kernel_size": 3, "padding": 1}
GROUPED = {"in_channels": 12, "out_channels": 20, "kernel_size": (3, 2), "stride": (2, 1), "groups": 2}


class TestSparseConv2d(ConvContract):
    module_type = SparseConv2d
    variants: ClassVar[dict[str, Variant]] = {
        "unstructured": (ODD, {"pattern": "unstructured"}),
        "2:4": (GROUPED, {"pattern": "2:4", "activation": "gelu"}),
        "4x1": (
            GROUPED,
            {"pattern": "4x1", "quant": "static", "x_scale": 0.021, "x_zero_point": 3, "activation": "relu"},
        ),
        "16x16": ({**ODD, "bias": False}, {"pattern": "16x16", "activation": "silu"}),
        "float 4x1": (ODD, {"pattern": "4x1", "weight_dtype": torch.float32}),
        "float 2:4": (ODD, {"pattern": "2:4", "weight_dtype": torch.float32}),
    }

    def from_float(self, layer: nn.Module, **kwargs: Any) -> Any:
        if isinstance(layer, nn.Conv2d):
            shape, pattern = tuple(layer.weight.shape), kwargs.get("pattern", "4x1")
            kwargs["mask"] = sparse_mask(shape, pattern, 0.5, groups=layer.groups, seed=3)
        return SparseConv2d.from_float(layer, **kwargs)  # type: ignore[arg-type]

    def case(self, module: Any, x: Tensor) -> Case:
        state = module.state_dict()
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        kwargs = {k: state[k] for k in ("x_scale", "x_zero_point") if k in state}
        kwargs.update(geometry_of(module), activation=module.activation)
        kwargs.update(pattern=module.pattern, weight_shape=shape)
        mode = module.quant if module.weight_dtype == torch.int8 else "float"
        names = ("values", "crow_indices", "col_indices", "weight_scale", "bias")
        k = shape[1] * shape[2] * shape[3]
        return Case(self.op, mode, "SparseConv2d", k, (x, *map(state.get, names)), kwargs)

    def test_blocks_do_not_cross_groups(self) -> None:
        layer = nn.Conv2d(4, 12, 1, groups=2)
        mask = torch.zeros(12, 2, 1, 1, dtype=torch.bool)
        mask[4:8] = True  # half of a block of 4 in either group of 6
        with pytest.raises(ValueError, match=r"sparse_conv2d: mask must keep or drop each 4x1 block"):
            SparseConv2d.from_float(layer, pattern="4x1", mask=mask)
        mask[:] = False
        mask[4:10] = True  # the short block of the first group, a whole one of the second
        module = SparseConv2d.from_float(layer, pattern="4x1", mask=mask)
        assert torch.equal(module.to_float().weight != 0, mask & (layer.weight != 0))

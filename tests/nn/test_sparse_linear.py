"""``SparseLinear`` passes the contract, and its indices are checked wherever they come from."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tautorch.nn import SparseLinear
from tautorch.reference.layouts import PATTERNS
from tautorch.testing.cases import Case
from tautorch.testing.values import sparse_mask

from .contract import LinearContract
from .subject import Variant

ODD = {"in_features": 70, "out_features": 37}


def halved(layer: nn.Linear, pattern: str) -> Tensor:
    """A mask that keeps half of the blocks."""
    return sparse_mask(layer.weight.shape, pattern, 0.5, seed=3)


class TestSparseLinear(LinearContract):
    module_type = SparseLinear
    variants: ClassVar[dict[str, Variant]] = {
        "unstructured": (ODD, {"pattern": "unstructured"}),
        "2:4": ({"in_features": 66, "out_features": 48}, {"pattern": "2:4", "activation": "gelu"}),
        "4x1": (ODD, {"quant": "static", "x_scale": 0.021, "x_zero_point": 3}),
        "16x16": ({**ODD, "bias": False}, {"pattern": "16x16", "activation": "silu"}),
        "64x64": (ODD, {"pattern": "64x64", "weight_dtype": torch.float32}),
        "float": (ODD, {"pattern": "unstructured", "weight_dtype": torch.float32, "activation": "relu"}),
    }

    def from_float(self, layer: nn.Module, **kwargs: Any) -> Any:
        if isinstance(layer, nn.Linear):
            kwargs["mask"] = halved(layer, kwargs.get("pattern", "4x1"))
        return SparseLinear.from_float(layer, **kwargs)  # type: ignore[arg-type]

    def case(self, module: Any, x: Tensor) -> Case:
        state = module.state_dict()
        kwargs = {k: state[k] for k in ("x_scale", "x_zero_point") if k in state}
        kwargs.update(pattern=module.pattern, out_features=module.out_features, activation=module.activation)
        mode = module.quant if module.weight_dtype == torch.int8 else "float"
        names = ("values", "crow_indices", "col_indices", "weight_scale", "bias")
        return Case(self.op, mode, "SparseLinear", module.in_features, (x, *map(state.get, names)), kwargs)

    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
    def test_no_mask_keeps_the_non_zeros(self, pattern: str, dtype: torch.dtype) -> None:
        layer = nn.Linear(70, 37)
        mask = halved(layer, pattern)
        with torch.no_grad():
            layer.weight *= mask
        module = SparseLinear.from_float(layer, pattern=pattern, weight_dtype=dtype)
        masked = SparseLinear.from_float(layer, pattern=pattern, mask=mask, weight_dtype=dtype)
        state = masked.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
        weight = module.to_float().weight
        assert not bool(weight[~mask].any())
        tolerance = 0.0 if dtype == torch.float32 else float(layer.weight.abs().max()) / 250
        assert float((weight - layer.weight).abs().max()) <= tolerance

    def test_masks_that_do_not_fit(self) -> None:
        layer = nn.Linear(24, 10)
        mask = torch.ones(10, 24, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"sparse_linear: mask must have the weight's shape \(10, 24\)"):
            SparseLinear.from_float(layer, mask=mask.T)
        with pytest.raises(TypeError, match="sparse_linear: mask must be bool"):
            SparseLinear.from_float(layer, mask=mask.float())
        mask[5, 7] = False
        with pytest.raises(
            ValueError, match=r"sparse_linear: .* 4x1 block .* \(1, 7\): rows 4..7, columns 7..7"
        ):
            SparseLinear.from_float(layer, mask=mask)
        with pytest.raises(ValueError, match=r"sparse_linear: .* 16x16 block .* \(0, 0\)"):
            SparseLinear.from_float(layer, pattern="16x16", mask=mask)
        with pytest.raises(ValueError, match=r"sparse_linear: .*at most 2 of each 4 .*block \(0, 0\)"):
            SparseLinear.from_float(layer, pattern="2:4", mask=mask)
        with pytest.raises(ValueError, match="sparse_linear: pattern must be one of"):
            SparseLinear.from_float(layer, pattern="8x8")
        with pytest.raises(ValueError, match="sparse_linear: weight_dtype must be"):
            SparseLinear.from_float(layer, weight_dtype=torch.int32)
        with pytest.raises(ValueError, match='sparse_linear: quant must be "dynamic" for float32'):
            SparseLinear.from_float(layer, weight_dtype=torch.float32, quant="static", x_scale=0.1)

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_hostile_indices_are_refused(self, pattern: str) -> None:
        layer = nn.Linear(70, 37)
        module = SparseLinear.from_float(layer, pattern=pattern, mask=halved(layer, pattern))
        x = torch.randn(3, 70)
        y, state = module(x), module.state_dict()
        for name in ("crow_indices", "col_indices"):
            if name not in state:
                continue
            for value in (-1, 71, 2**15 - 1):
                bad = state[name].clone()
                if bad.dtype == torch.uint8:
                    bad[-1, -1] = 0  # the same place twice
                else:
                    bad[-1] = value
                with pytest.raises(RuntimeError, match=f"sparse_linear: {name} must"):
                    module.load_state_dict({**state, name: bad})
                with pytest.raises(ValueError, match=f"sparse_linear: {name} must"):
                    setattr(module, name, bad)
                    module(x)
                module.load_state_dict(state)
                assert torch.equal(module(x), y)

    def test_wider_indices_do_not_wrap(self) -> None:
        module = SparseLinear.from_float(nn.Linear(70, 37), pattern="unstructured")
        state = module.state_dict()
        y = module(torch.ones(1, 70))
        wide = {k: v.int() if k.endswith("indices") else v for k, v in state.items()}
        module.load_state_dict(wide)
        assert torch.equal(module(torch.ones(1, 70)), y)
        wide["col_indices"] = wide["col_indices"] + 65536  # as int16 the same
        with pytest.raises(RuntimeError, match=r"sparse_linear: col_indices must be in 0\.\.69, got 65605"):
            module.load_state_dict(wide)
        assert torch.equal(module(torch.ones(1, 70)), y)

    def test_stored_zeros_survive_packing(self) -> None:
        """A layer wider than the packs' indices keeps its own, also of zeros."""
        for pattern, k in (("unstructured", 65_600), ("2:4", 70)):
            layer = nn.Linear(k, 3, bias=False)
            mask = torch.zeros(3, k, dtype=torch.bool)
            mask[0, ::2] = True
            module = SparseLinear.from_float(layer, pattern=pattern, mask=mask)
            state = module.state_dict()
            for name in ("values", "col_indices"):
                state[name] = state[name].clone()
            state["values"].view(-1)[::3] = 0
            if pattern == "2:4":
                state["col_indices"].fill_(0b1101_1110)  # places 2, 3 and 1, 3, of which 3 is beyond K
                state["values"].fill_(5)[:, -1] = 0
            module.load_state_dict(state)
            x = torch.randn(2, k)
            y = module(x)
            self.agrees(module, x, y)
            after = module.state_dict()
            assert all(torch.equal(tensor, after[name]) for name, tensor in state.items())
            with torch.no_grad():
                module.col_indices.copy_(module.col_indices.clone())
            assert torch.equal(module(x), y)

    def test_counts_must_fit(self) -> None:
        with pytest.raises(ValueError, match=r"sparse_linear: nnz must be in 0\.\.12 blocks, got 13"):
            SparseLinear(6, 5, nnz=13)
        module = SparseLinear(6, 5, nnz=12)
        assert module.get_config()["nnz"] == 12 and module.density() == 1.0

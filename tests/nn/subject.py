"""What a contract is about: a module, the layer it replaces, and the operator's call it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.nn.packed import PackedModule
from tautorch.testing.cases import Case

from ..ops.agreement import compare, reference_of

Variant = tuple[dict[str, Any], dict[str, Any]]


class Subject:
    """What a suite gives, and what its tests are written with."""

    module_type: ClassVar[type[PackedModule]]
    float_type: ClassVar[type[nn.Module]]
    variants: ClassVar[dict[str, Variant]]
    # a layer of 64 KiB or more of weights, for the memory bound
    roomy: ClassVar[dict[str, Any]]

    # ---- what a suite gives ----

    def case(self, module: Any, x: Tensor) -> Case:
        """The operator's call that ``module(x)`` stands for."""
        raise NotImplementedError

    def x(self, variant: str, batch: int = 3) -> Tensor:
        """An input of ``batch`` rows or samples."""
        raise NotImplementedError

    def roomy_x(self) -> Tensor:
        """An input of the roomy layer."""
        raise NotImplementedError

    # ---- helpers ----

    @property
    def op(self) -> str:
        return self.module_type.op

    def float_layer(self, variant: str) -> nn.Module:
        torch.manual_seed(7)
        return self.float_type(**self.variants[variant][0])

    def module(self, variant: str) -> Any:
        return self.from_float(self.float_layer(variant), **self.variants[variant][1])

    def from_float(self, layer: nn.Module, **kwargs: Any) -> Any:
        return self.module_type.from_float(layer, **kwargs)  # type: ignore[attr-defined]

    def agrees(self, module: Any, x: Tensor, y: Tensor | None = None) -> None:
        """``module(x)`` is what the reference computes from the module's canonical tensors."""
        y = module(x).detach() if y is None else y
        case = self.case(module, x.detach())
        compare(case, y, case(reference_of(self.op)))

    @pytest.fixture(autouse=True)
    def no_scalar_kernel(self) -> Iterator[None]:
        """On an AVX512-VNNI machine nothing here runs anything slower."""
        dispatch.note_used(self.op, "nothing yet")
        yield
        if _C.isas().get("avx512vnni"):
            assert dispatch.last_used(self.op) in ("nothing yet", *dispatch.AVX512)

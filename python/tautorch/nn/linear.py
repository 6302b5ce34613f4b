"""What the three replacements of ``nn.Linear`` share: arguments and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C
from tautorch.ops import library as lib
from tautorch.ops._gpu_product import launches

from .eager import STATE, USUAL, autocast_input, is_compiling, plain_on_cuda
from .layer import LayerModule

_direct_call, _eager_call, _run_rows = _C.direct_call, _C.eager_call, _C.run_rows


class LinearModule(LayerModule):
    """A linear layer over packed weights.

    Takes ``[..., in_features]`` in float32, bfloat16 or float16 and returns the same dtype; int8 x is taken
    with ``quant="static"``, as values of the calibrated scale.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Linear
    fixed_names = frozenset({"in_features", "out_features"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        *,
        quant: str,
        quants: Sequence[str],
        activation: str,
        requantize: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_tail(out_features, bias, device, quant, quants, activation, requantize)

    @classmethod
    def _arguments(cls, module: nn.Module) -> dict[str, Any]:
        cls._check_type(module)
        assert isinstance(module, nn.Linear)
        return {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
            "device": module.weight.device,
        }

    def to_float(self) -> nn.Linear:
        """``nn.Linear`` (float32) with the weight this layer stands for, without the fused activation."""
        device = self.weight_device()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=device)
        self._give(layer)
        return layer

    def get_config(self) -> dict[str, Any]:
        shape = {"in_features": self.in_features, "out_features": self.out_features}
        return {**shape, **super().get_config()}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._repr_end()}"
        )

    def _checked(self, x: Tensor) -> Tensor:
        """x, if it is as wide as the weight. The torch op could not tell where the weight is packed."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.op}: x must be [..., {self.in_features}] as the weight is [{self.out_features}, "
                f"{self.in_features}], got {list(x.shape)}"
            )
        return x

    def _call(self, plan: bytes, x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
        return lib.linear_call(plan, self.in_features, self.out_features, x_dtype, dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without nn.Module's own way round to forward where nothing could notice: 1.1 us.
        if not is_compiling():
            out = _direct_call(STATE, USUAL, _forward, None, type(self), self.__dict__, args, kwargs)
            if out is not None:
                return out
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        if not is_compiling():
            call = _eager_call(STATE, self.__dict__, input) or self._fresh_call(input)
            if call is not None:
                out: Tensor | None = _run_rows(self.run, call, input)
                if out is None and type(call[0]) is bytes:  # a plan of the CPU
                    out = lib.run_linear(self.run, call, input)
                if out is not None:
                    return out
            if plain_on_cuda(input, self._parameters):
                watched = self._watch_on(input.device)
                with launches() as found:
                    y = self._through_op(self._checked(input))
                if found and watched is not None:
                    self._remember(found[-1], watched)
                return y
        # graphs, gradients, the reference backend, and every error
        if self._in_graph(input):
            return self._through_op(input)
        return self._through_op(autocast_input(self._checked(input)))


_forward = LinearModule.forward

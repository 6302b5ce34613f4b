"""``Int8Linear``: a linear layer with int8 weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops import int8_linear as _op  # noqa: F401  (registers the operator)
from tautorch.ops import tails
from tautorch.ops.int8_linear import OP, pack, plan, unpack

from .linear import LinearModule
from .packed import Canonical
from .tail import QUANTS, int8_tensors


class Int8Linear(LinearModule):
    """``y = activation(q(x) @ weight.T * scales + bias)`` with int8 ``weight`` ``[out, in]``.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; ``dtype`` is ignored (weights are
            int8, scales and bias float32).
        quant: "dynamic" (x quantised per row), "static" (by ``x_scale``, ``x_zero_point``) or "weight_only"
            (x stays float).
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused.
        requantize: the output is int8, by ``out_scale`` and ``out_zero_point``, for a layer that takes int8.

    Buffers: ``weight`` int8 ``[out, in]``, ``weight_scale`` float32 ``[out]``; static: ``x_scale`` float32
    and ``x_zero_point`` int32, one value each; ``requantize``: also ``out_scale`` and
    ``out_zero_point``.
    """

    op: ClassVar[str] = OP
    run: ClassVar[Any] = _C.int8_linear_run
    packed_names: ClassVar[tuple[str, ...]] = ("weight",)

    weight = Canonical()
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant: str = "dynamic",
        activation: str = "none",
        requantize: bool = False,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            quant=quant,
            quants=QUANTS,
            activation=activation,
            requantize=requantize,
        )
        if quant != "weight_only":
            tails.check_k(OP, in_features)
        self._buffers["weight"] = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        *,
        quant: str = "dynamic",
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
        weight_scale: Tensor | None = None,
        activation: str = "none",
        out_scale: Tensor | float | None = None,
        out_zero_point: Tensor | int | None = None,
    ) -> Int8Linear:
        """Quantise a float layer's weight to int8, symmetric, one scale per output.

        Args:
            module: the layer; left as it is.
            quant, activation: see the class.
            x_scale, x_zero_point: for ``quant="static"``, from ``tautorch.quantize.calibrate``; None takes
                what ``tautorch.quantize`` left on the layer.
            weight_scale: ``[out]``, the int8 steps of each output; None takes the layer's ``weight_scale``
                buffer, which ``tautorch.quantize`` leaves, while the weight lies on those steps, else
                amax / 127.
            out_scale, out_zero_point: of the next layer's input; the output is int8 then.

        Raises:
            TypeError: not an ``nn.Linear``.
            ValueError: a weight or bias with NaN or Inf, or scales that do not fit ``quant``.
        """
        requantize = out_scale is not None
        new = cls(**cls._arguments(module), quant=quant, activation=activation, requantize=requantize)
        new._take(
            module.bias,
            **int8_tensors(OP, module, quant, x_scale, x_zero_point, weight_scale, out_scale, out_zero_point),
        )
        return new.train(module.training)

    def dense_weight(self) -> Tensor:
        buffers = self._state()
        packed = buffers["packed"]
        weight = unpack(packed) if packed is not None else buffers["weight"]
        assert weight is not None
        return weight.to(torch.float32) * self.weight_scale[:, None]

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _problem(self) -> dispatch.Problem:
        weight_only = self.quant == "weight_only"
        device = self.weight_scale.device.type
        return dispatch.Problem(OP, device, self.out_features, self.in_features, {"weight_only": weight_only})

    def _pack(self, kernel: str) -> Tensor:
        weight = self._buffers["weight"]
        assert weight is not None
        return pack(weight, self.quant == "weight_only", kernel)

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        return {"weight": unpack(packed)}

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        return plan(packed, self.in_features, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        buffers, bias = self._state(), self._own_bias()  # by name nn.Module takes 0.3 us each
        weight = buffers["weight"]
        if weight is None:
            weight = buffers["packed"]
        y: Tensor = torch.ops.tautorch.int8_linear(
            x,
            weight,
            buffers["weight_scale"],
            bias,
            buffers["x_scale"],
            buffers["x_zero_point"],
            self.quant == "weight_only",
            self.activation,
            buffers["out_scale"],
            buffers["out_zero_point"],
        )
        return y

"""``Int8Conv2d``: a 2-D convolution with int8 weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops import geometry as conv
from tautorch.ops import tails
from tautorch.ops.geometry import Pair
from tautorch.ops.int8_conv2d import OP, pack, plan, problem

from .convolution import ConvModule, Padding
from .packed import Canonical
from .tail import QUANTS, int8_tensors


class Int8Conv2d(ConvModule):
    """``y = activation(conv2d(q(x), weight) * scales + bias)``, int8 ``weight`` ``[O, I/groups, kh, kw]``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as ``nn.Conv2d``; ``padding_mode`` must be "zeros"; ``dtype`` is ignored (weights
            are int8, scales and bias float32).
        quant: "dynamic" (x quantised per sample), "static" (by ``x_scale``, ``x_zero_point``) or
            "weight_only" (x stays float).
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused.
        requantize: the output is int8, by ``out_scale`` and ``out_zero_point``, for a layer that takes int8.

    Buffers: ``weight``, ``weight_scale`` float32 ``[O]``; static: ``x_scale`` float32 and ``x_zero_point``
    int32, one value each; ``requantize``: ``out_scale`` and ``out_zero_point``, likewise.
    """

    op: ClassVar[str] = OP
    packed_names: ClassVar[tuple[str, ...]] = ("weight",)
    run: ClassVar[Any] = staticmethod(_C.int8_conv2d_run)

    weight = Canonical()
    weight_scale: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant: str = "dynamic",
        activation: str = "none",
        requantize: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, quant=quant, quants=QUANTS, activation=activation, requantize=requantize,
        )  # fmt: skip
        if quant != "weight_only":
            tails.check_k(OP, self.geometry.k)
        self._buffers["weight"] = torch.zeros(self.geometry.weight_shape, dtype=torch.int8, device=device)
        self.register_buffer("weight_scale", torch.ones(out_channels, dtype=torch.float32, device=device))

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d,
        *,
        quant: str = "dynamic",
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
        weight_scale: Tensor | None = None,
        activation: str = "none",
        out_scale: Tensor | float | None = None,
        out_zero_point: Tensor | int | None = None,
    ) -> Int8Conv2d:
        """Quantise a float layer's weight to int8, symmetric, one scale per output channel.

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
            TypeError: not an ``nn.Conv2d``.
            ValueError: a weight or bias with NaN or Inf, scales that do not fit ``quant``, or padding that
                is not zeros on both sides alike.
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
        packed, weight = buffers["packed"], buffers["weight"]
        if packed is not None:
            weight = conv.unpack(packed, self.geometry.weight_shape)
        assert weight is not None
        return weight.to(torch.float32) * self.weight_scale.reshape(-1, 1, 1, 1)

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _problem(self) -> dispatch.Problem:
        return problem(self.geometry, self.quant == "weight_only", self.weight_device().type)

    def _pack(self, kernel: str) -> Tensor:
        weight = self._buffers["weight"]
        assert weight is not None
        return pack(weight, self.geometry, self.quant == "weight_only", kernel)

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        return {"weight": conv.unpack(packed, self.geometry.weight_shape)}

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        return plan(packed, self.geometry, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        buffers, bias = self._state(), self._own_bias()  # by name nn.Module takes 0.3 us each
        weight = buffers["weight"]
        y: Tensor = torch.ops.tautorch.int8_conv2d(
            x,
            buffers["packed"] if weight is None else weight,
            buffers["weight_scale"],
            bias,
            *self.geometry.operands(),
            buffers["x_scale"],
            buffers["x_zero_point"],
            self.quant == "weight_only",
            self.activation,
            buffers["out_scale"],
            buffers["out_zero_point"],
        )
        return y

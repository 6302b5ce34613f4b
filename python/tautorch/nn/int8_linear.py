"""``Int8Linear``: a linear layer with int8 weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops import int8_linear as _op  # noqa: F401  (registers the operator)
from tautorch.ops import library as lib
from tautorch.ops.int8_linear import OP, pack, plan, rows_of, unpack
from tautorch.reference.quantizer import quantize_weight

from .eager import autocast_input, plain
from .packed import Canonical, PackedModule
from .tail import QUANTS, check_activation, static_tensors

_CODE = lib.DTYPE_CODE
_run = _C.int8_linear_run


class Int8Linear(PackedModule):
    """``y = activation(q(x) @ weight.T * scales + bias)`` with int8 ``weight`` ``[out, in]``.

    Takes ``[..., in_features]`` in float32, bfloat16 or float16 and returns the same dtype; int8 input is
    taken with ``quant="static"``, as values of the calibrated scale.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; ``dtype`` is ignored (weights are
            int8, scales and bias float32).
        quant: "dynamic" (x quantised per row), "static" (by ``x_scale``, ``x_zero_point``) or "weight_only"
            (x stays float).
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused.

    Buffers: ``weight`` int8 ``[out, in]``, ``weight_scale`` float32 ``[out]``; static: ``x_scale`` float32
    and ``x_zero_point`` int32, one value each.
    """

    op: ClassVar[str] = OP
    packed_names: ClassVar[tuple[str, ...]] = ("weight",)

    weight = Canonical()
    weight_scale: Tensor
    bias: nn.Parameter | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None

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
    ) -> None:
        super().__init__()
        if quant not in QUANTS:
            raise ValueError(f"{OP}: quant must be one of {', '.join(QUANTS)}, got {quant!r}")
        check_activation(OP, activation)
        if quant != "weight_only":
            lib.check_k(OP, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.quant, self.activation = quant, activation
        self._buffers["weight"] = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight_scale", torch.ones(out_features, device=device))
        static = quant == "static"
        self.register_buffer("x_scale", torch.ones(1, device=device) if static else None)
        self.register_buffer(
            "x_zero_point", torch.zeros(1, dtype=torch.int32, device=device) if static else None
        )
        zeros = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        *,
        quant: str = "dynamic",
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
        activation: str = "none",
    ) -> Int8Linear:
        """Quantise a float layer's weight to int8, symmetric, one scale per output.

        Args:
            module: the layer; left as it is.
            quant, activation: see the class.
            x_scale, x_zero_point: for ``quant="static"``, from ``tautorch.quantize.calibrate``.

        Raises:
            TypeError: not an ``nn.Linear``.
            ValueError: a weight or bias with NaN or Inf, or scales that do not fit ``quant``.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{OP}: from_float takes nn.Linear, got {type(module).__name__}")
        new = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            module.weight.device,
            quant=quant,
            activation=activation,
        )
        scale, zero_point = static_tensors(OP, quant, x_scale, x_zero_point, module.weight.device)
        new._buffers["x_scale"], new._buffers["x_zero_point"] = scale, zero_point
        q, weight_scale = quantize_weight(module.weight, op=OP)
        new._buffers["weight"], new._buffers["weight_scale"] = q, weight_scale
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.detach().to(torch.float32).clone(), requires_grad=False)
            new._check_finite("bias")
        return new.train(module.training)

    def to_float(self) -> nn.Linear:
        """``nn.Linear`` (float32) with the dequantised weight. A fused activation is not part of it."""
        weight = self._canonical_weight()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=weight.device)
        with torch.no_grad():
            linear.weight.copy_(weight.to(torch.float32) * self.weight_scale[:, None])
            if self.bias is not None and linear.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def get_config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "quant": self.quant,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant={self.quant}"
        )
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _canonical_weight(self) -> Tensor:
        packed = self._buffers["packed"]
        weight = unpack(packed) if packed is not None else self._buffers["weight"]
        assert weight is not None
        return weight

    def _problem(self) -> dispatch.Problem:
        weight_only = self.quant == "weight_only"
        device = self.weight_scale.device.type
        return dispatch.Problem(OP, device, self.out_features, self.in_features, {"weight_only": weight_only})

    def _kernel_of_pack(self) -> str:
        packed = self._buffers["packed"]
        assert packed is not None
        return str(lib.pack_info(packed)["kernel"])

    def _pack(self, kernel: str) -> Tensor:
        weight = self._buffers["weight"]
        assert weight is not None
        return pack(weight, self.quant == "weight_only", kernel)

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        return {"weight": unpack(packed)}

    def _make_plans(self, packed: Tensor) -> None:
        float_mode = lib.NONE if self.quant == "weight_only" else lib.DYNAMIC
        float_mode = lib.STATIC if self.quant == "static" else float_mode
        modes = {"float": float_mode}
        if self.quant == "static":
            modes["int8"] = lib.GIVEN
        for name, mode in modes.items():
            codes, keep = lib.tail(
                weight_scale=self.weight_scale,
                bias=self.bias,
                mode=mode,
                x_scale=self.x_scale,
                x_zero_point=self.x_zero_point,
                activation=self.activation,
            )
            self._keep += keep
            self._plans[name] = plan(packed, self.in_features, codes)

    def forward(self, x: Tensor) -> Tensor:
        d = self.__dict__
        if not plain(x, d["_parameters"]["bias"]):
            return self._through_op(x)
        if not self.ready():
            self.prepare()
        dtype = x.dtype
        if d["_epoch"] < 0 or dtype not in _CODE or x.dim() == 0 or x.shape[-1] != d["in_features"]:
            return self._through_op(x)  # the reference backend, and every error
        int8 = dtype is torch.int8
        plans = d["_plans"]  # held to the end: it keeps alive what the plan points to
        run_plan = plans.get("int8" if int8 else "float")
        if run_plan is None or dtype is torch.int32:
            return self._through_op(x)
        n = d["out_features"]
        out_dtype = torch.float32 if int8 else dtype
        if x.dim() == 2 and x.is_contiguous():
            m = x.shape[0]
            out = torch.empty((m, n), dtype=out_dtype)
            code = _CODE[dtype]
            _run(run_plan, x.data_ptr(), code, m, d["in_features"], out.data_ptr(), _CODE[out_dtype])
        else:
            rows, m, stride = rows_of(x)
            out = torch.empty((*x.shape[:-1], n), dtype=out_dtype)
            _run(run_plan, rows.data_ptr(), _CODE[dtype], m, stride, out.data_ptr(), _CODE[out_dtype])
        return out

    def _through_op(self, x: Tensor) -> Tensor:
        buffers = self._buffers
        weight = buffers["weight"]
        if weight is None:
            weight = buffers["packed"]
        y: Tensor = torch.ops.tautorch.int8_linear(
            autocast_input(x),
            weight,
            self.weight_scale,
            self.bias,
            self.x_scale,
            self.x_zero_point,
            self.quant == "weight_only",
            self.activation,
        )
        return y

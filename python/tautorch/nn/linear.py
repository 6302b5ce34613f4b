"""What the three replacements of ``nn.Linear`` share: arguments, buffers, plans and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch.ops import library as lib

from .eager import plain
from .packed import PackedModule
from .tail import check_activation

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class LinearModule(PackedModule):
    """A linear layer over packed weights; subclasses say how to pack, plan and go through the torch op.

    Takes ``[..., in_features]`` in float32, bfloat16 or float16 and returns the same dtype; int8 x is taken
    with ``quant="static"``, as values of the calibrated scale.
    """

    #: ``<op>_run`` of the CPU extension
    run: ClassVar[Any]

    bias: nn.Parameter | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None

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
    ) -> None:
        super().__init__()
        if quant not in quants:
            raise ValueError(f"{self.op}: quant must be one of {', '.join(quants)}, got {quant!r}")
        check_activation(self.op, activation)
        self.in_features, self.out_features = in_features, out_features
        self.quant, self.activation = quant, activation
        static = quant == "static"
        self.register_buffer("x_scale", torch.ones(1, device=device) if static else None)
        self.register_buffer(
            "x_zero_point", torch.zeros(1, dtype=torch.int32, device=device) if static else None
        )
        zeros = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", zeros)

    # ---- from and to float ------------------------------------------------------------------------------

    @classmethod
    def _arguments(cls, module: nn.Module) -> dict[str, Any]:
        """The constructor's leading arguments for a float layer."""
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{cls.op}: from_float takes nn.Linear, got {type(module).__name__}")
        return {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
            "device": module.weight.device,
        }

    def _take(self, bias: Tensor | None, **buffers: Tensor | None) -> None:
        """Fill in buffers, and the bias of a float layer."""
        self._buffers.update(buffers)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.float32).clone(), requires_grad=False)
            self._check_finite("bias")

    def dense_weight(self) -> Tensor:
        """The float32 weight ``[out, in]`` that this layer stands for."""
        raise NotImplementedError

    def to_float(self) -> nn.Linear:
        """``nn.Linear`` (float32) with the weight this layer stands for, without the fused activation."""
        weight = self.dense_weight()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=weight.device)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.train(self.training)

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
            f"bias={self.bias is not None}, {self._format_repr()}"
        )
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _format_repr(self) -> str:
        """How the weight is stored."""
        return f"quant={self.quant}"

    # ---- running ----------------------------------------------------------------------------------------

    def _float_input(self) -> bool:
        """Whether x is multiplied as float."""
        return self.quant == "weight_only"

    def _output_scale(self) -> str:
        """Name of the buffer that scales the outputs."""
        return "weight_scale"

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        raise NotImplementedError

    def _through_op(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _kernel_of_pack(self) -> str:
        packed = self._buffers["packed"]
        return "" if packed is None else str(lib.pack_info(packed)["kernel"])

    def _make_plans(self, packed: Tensor) -> None:
        # dtype of x: (plan, its code, dtype of the output, its code)
        static = self.quant == "static"
        mode = lib.NONE if self._float_input() else lib.STATIC if static else lib.DYNAMIC
        plan = self._plan_of(packed, mode)
        for dtype in _FLOATS:
            code = lib.DTYPE_CODE[dtype]
            self._plans[dtype] = (plan, code, dtype, code)
        if static:
            given = self._plan_of(packed, lib.GIVEN)
            codes = lib.DTYPE_CODE[torch.int8], torch.float32, lib.DTYPE_CODE[torch.float32]
            self._plans[torch.int8] = (given, *codes)

    def _plan_of(self, packed: Tensor, mode: int) -> bytes:
        codes, keep = lib.tail(
            weight_scale=self._buffers.get(self._output_scale()),
            bias=self.bias,
            mode=mode,
            x_scale=self.x_scale,
            x_zero_point=self.x_zero_point,
            activation=self.activation,
        )
        self._keep += keep
        return self._plan(packed, codes)

    def _checked(self, x: Tensor) -> Tensor:
        """x, if it is as wide as the weight. The torch op could not tell where the weight is packed."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.op}: x must be [..., {self.in_features}] as the weight is [{self.out_features}, "
                f"{self.in_features}], got {list(x.shape)}"
            )
        return x

    def forward(self, x: Tensor) -> Tensor:
        d = self.__dict__
        if not plain(x, d["_parameters"]["bias"]):
            return self._through_op(self._checked(x))
        if not self.ready():
            self.prepare()
        plans = d["_plans"]  # held to the end: it keeps alive what the plan points to
        entry = plans.get(x.dtype)
        shape = x.shape
        if entry is None or d["_epoch"] < 0 or not shape or shape[-1] != d["in_features"]:
            return self._through_op(self._checked(x))  # the reference backend, and every error
        plan, code, out_dtype, out_code = entry
        if len(shape) == 2 and x.is_contiguous():
            m, k = shape
            out = torch.empty((m, d["out_features"]), dtype=out_dtype)
            self.run(plan, x.data_ptr(), code, m, k, out.data_ptr(), out_code)
        else:
            rows, m, stride = lib.rows_of(x)
            out = torch.empty((*shape[:-1], d["out_features"]), dtype=out_dtype)
            self.run(plan, rows.data_ptr(), code, m, stride, out.data_ptr(), out_code)
        return out

"""What replacements of ``nn.Linear`` and of ``nn.Conv2d`` share: buffers of the tail, plans, the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from tautorch._layers import other_forward
from tautorch.ops import packing, tails

from .eager import plain
from .packed import PackedModule
from .tail import check_activation

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class LayerModule(PackedModule):
    """A layer over packed weights; subclasses say how to pack, plan and go through the torch op."""

    #: ``<op>_run`` of the CPU extension
    run: ClassVar[Any]
    #: the layer this one replaces
    float_type: ClassVar[type[nn.Module]]
    fixed_names = frozenset({"quant"})

    bias: nn.Parameter | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None
    out_scale: Tensor | None
    out_zero_point: Tensor | None

    def _init_tail(
        self,
        outputs: int,
        bias: bool,
        device: torch.device | str | None,
        quant: str,
        quants: Sequence[str],
        activation: str,
        requantize: bool = False,
    ) -> None:
        """Check and register what follows the product. ``requantize``: the output is int8."""
        if quant not in quants:
            raise ValueError(f"{self.op}: quant must be one of {', '.join(quants)}, got {quant!r}")
        check_activation(self.op, activation)
        self.quant, self.activation = quant, activation
        static = quant == "static"
        self.register_buffer("x_scale", torch.ones(1, dtype=torch.float32, device=device) if static else None)
        self.register_buffer(
            "x_zero_point", torch.zeros(1, dtype=torch.int32, device=device) if static else None
        )
        self.register_buffer(
            "out_scale", torch.ones(1, dtype=torch.float32, device=device) if requantize else None
        )
        self.register_buffer(
            "out_zero_point", torch.zeros(1, dtype=torch.int32, device=device) if requantize else None
        )
        zeros = (
            nn.Parameter(torch.zeros(outputs, dtype=torch.float32, device=device), requires_grad=False)
            if bias
            else None
        )
        self.register_parameter("bias", zeros)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation" and name in self.__dict__:
            check_activation(self.op, value)
            self.unpack_()  # plans hold it; the next call makes them anew
            self._reset()
        super().__setattr__(name, value)

    # ---- from and to float ------------------------------------------------------------------------------

    @classmethod
    def _arguments(cls, module: nn.Module) -> dict[str, Any]:
        """The constructor's leading arguments for a float layer; TypeError for another module."""
        raise NotImplementedError

    @classmethod
    def _check_type(cls, module: nn.Module) -> None:
        if not isinstance(module, cls.float_type):
            raise TypeError(
                f"{cls.op}: from_float takes nn.{cls.float_type.__name__}, got {type(module).__name__}"
            )
        more = other_forward(module)
        if more is not None:
            raise TypeError(f"{cls.op}: from_float takes nn.{cls.float_type.__name__}, but {more}")

    def _take(self, bias: Tensor | None, **buffers: Tensor | None) -> None:
        """Fill in buffers, and the bias of a float layer."""
        self._buffers.update(buffers)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.float32).clone(), requires_grad=False)
            self._check_finite("bias")

    def dense_weight(self) -> Tensor:
        """The float32 weight that this layer stands for, of the float layer's shape."""
        raise NotImplementedError

    def weight_device(self) -> torch.device:
        """Where the weight lies, in whichever form."""
        buffers = self._state()
        held = buffers["packed"]
        held = buffers[self.packed_names[0]] if held is None else held
        assert held is not None
        return held.device

    def _give(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Fill a float layer with the weight this one stands for, and the bias."""
        with torch.no_grad():
            layer.weight.copy_(self.dense_weight())
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
        layer.train(self.training)

    def get_config(self) -> dict[str, Any]:
        config = {"bias": self.bias is not None, "quant": self.quant, "activation": self.activation}
        return config if self.out_scale is None else {**config, "requantize": True}

    def _repr_end(self) -> str:
        """How the weight is stored, and the activation."""
        text = self._format_repr()
        text += "" if self.activation == "none" else f", activation={self.activation}"
        return text if self.out_scale is None else f"{text}, requantize=True"

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
        """The plan for ``run``, from the codes of ``tails.tail``."""
        raise NotImplementedError

    def _call(self, plan: bytes, x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
        """What the layer's forward runs on x of ``x_dtype``: a plan with its sizes."""
        raise NotImplementedError

    def _through_op(self, x: Tensor) -> Tensor:
        """The torch operator on x."""
        raise NotImplementedError

    def _in_graph(self, x: object) -> bool:
        """Whether x stands for a tensor of a graph of ``torch.fx``, which takes canonical weights then."""
        if not isinstance(x, Proxy):
            return False
        for part in self.modules():  # a residual is one
            if isinstance(part, PackedModule):
                part.unpack_()
        return True

    def _own_bias(self) -> Tensor | None:
        """``self.bias`` in less time where it is a parameter; replicas and parametrisations have others."""
        parameters = self._parameters
        return parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 -- reads it only then

    def _fresh_call(self, x: Tensor) -> tuple[Any, ...] | None:
        """What ``_C.eager_call`` gives once the plans are made; None where x goes through the operator."""
        if not plain(x, self._parameters):
            return None
        if not self.ready():
            self.prepare()
        plans = self._plans
        return plans.get(x.dtype) if self._epoch >= 0 else None

    def _kernel_of_pack(self) -> str:
        packed = self._buffers["packed"]
        return "" if packed is None else str(packing.pack_info(packed)["kernel"])

    def _make_plans(self, packed: Tensor) -> None:
        static = self.quant == "static"
        mode = tails.NONE if self._float_input() else tails.STATIC if static else tails.DYNAMIC
        plan = self._plan_of(packed, mode)
        codes = None if self.out_scale is None else torch.int8
        for dtype in _FLOATS:
            self._plans[dtype] = self._call(plan, dtype, codes or dtype)
        if static:
            given = self._plan_of(packed, tails.GIVEN)
            self._plans[torch.int8] = self._call(given, torch.int8, codes or torch.float32)

    def _plan_of(self, packed: Tensor, mode: int) -> bytes:
        codes, keep = tails.tail(
            weight_scale=self._buffers.get(self._output_scale()),
            bias=self.bias,
            mode=mode,
            x_scale=self.x_scale,
            x_zero_point=self.x_zero_point,
            activation=self.activation,
            out_scale=self.out_scale,
            out_zero_point=self.out_zero_point,
        )
        self._keep += keep
        return self._plan(packed, codes)

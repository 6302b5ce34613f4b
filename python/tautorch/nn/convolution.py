"""What the three replacements of ``nn.Conv2d`` share: arguments, buffers, plans and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch.ops import geometry as conv
from tautorch.ops import library as lib
from tautorch.ops.geometry import Geometry, Pair

from .eager import autocast_input, plain
from .packed import PackedModule
from .tail import check_activation

Padding = str | Pair


def resolve_padding(
    op: str, padding: Padding, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """Padding in pixels on both sides, of a number, a pair, "valid" or "same".

    Raises:
        ValueError: another string, or a "same" that needs a stride or different padding on the two sides.
    """
    if not isinstance(padding, str):
        return conv.as_pair(op, "padding", padding, 0)
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise ValueError(f'{op}: padding must be "same", "valid" or numbers, got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'{op}: padding="same" needs stride 1, got {stride}; give the padding in pixels')
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if total[0] % 2 or total[1] % 2:
        raise ValueError(
            f'{op}: padding="same" must be symmetric, got kernel {kernel} with dilation {dilation}; pad '
            "beforehand with nn.ZeroPad2d"
        )
    return total[0] // 2, total[1] // 2


def _check_padding_mode(op: str, mode: str) -> None:
    if mode != "zeros":
        raise ValueError(
            f"{op}: padding_mode must be 'zeros', got {mode!r}; pad beforehand with "
            f"torch.nn.functional.pad(x, ..., mode={mode!r}) and use padding=0"
        )


class ConvModule(PackedModule):
    """A convolution over packed weights; subclasses say how to pack, plan and go through the torch op.

    Takes ``[B, I, H, W]`` or ``[I, H, W]`` in float32, bfloat16 or float16 and returns the same dtype, in
    channels-last memory where x is; int8 x is taken with ``quant="static"``, as values of the calibrated
    scale.
    """

    #: ``<op>_run`` of the CPU extension
    run: ClassVar[Any]

    weight_scale: Tensor | None
    bias: nn.Parameter | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: torch.device | str | None,
        *,
        quant: str,
        quants: Sequence[str],
        activation: str,
    ) -> None:
        super().__init__()
        op = self.op
        _check_padding_mode(op, padding_mode)
        if quant not in quants:
            raise ValueError(f"{op}: quant must be one of {', '.join(quants)}, got {quant!r}")
        check_activation(op, activation)
        if groups < 1 or in_channels % groups:
            raise ValueError(f"{op}: groups must divide the {in_channels} input channels, got {groups}")
        kernel = conv.as_pair(op, "kernel_size", kernel_size, 1)
        stride = conv.as_pair(op, "stride", stride, 1)
        dilation = conv.as_pair(op, "dilation", dilation, 1)
        pixels = resolve_padding(op, padding, kernel, stride, dilation)
        shape = (out_channels, in_channels // groups, *kernel)
        self.geometry: Geometry = conv.geometry_of(op, shape, stride, pixels, dilation, groups)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = padding if isinstance(padding, str) else pixels  # as nn.Conv2d has it
        self.padding_mode, self.output_padding, self.transposed = padding_mode, (0, 0), False
        self.quant, self.activation = quant, activation
        static = quant == "static"
        self.register_buffer("x_scale", torch.ones(1, device=device) if static else None)
        self.register_buffer(
            "x_zero_point", torch.zeros(1, dtype=torch.int32, device=device) if static else None
        )
        zeros = nn.Parameter(torch.zeros(out_channels, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", zeros)

    # ---- from and to float ------------------------------------------------------------------------------

    @classmethod
    def _arguments(cls, module: nn.Module) -> dict[str, Any]:
        """The constructor's leading arguments for a float layer."""
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"{cls.op}: from_float takes nn.Conv2d, got {type(module).__name__}")
        _check_padding_mode(cls.op, module.padding_mode)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        arguments = {name: getattr(module, name) for name in names}
        return {
            **arguments,
            "bias": module.bias is not None,
            "padding_mode": module.padding_mode,
            "device": module.weight.device,
        }

    def _take(self, bias: Tensor | None, **buffers: Tensor | None) -> None:
        """Fill in buffers, and the bias of a float layer."""
        for name, tensor in buffers.items():
            self._buffers[name] = tensor
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.float32).clone(), requires_grad=False)
            self._check_finite("bias")

    def dense_weight(self) -> Tensor:
        """The float32 weight ``[O, I/groups, kh, kw]`` that this layer stands for."""
        raise NotImplementedError

    def to_float(self) -> nn.Conv2d:
        """``nn.Conv2d`` (float32) with the weight this layer stands for, without the fused activation."""
        weight = self.dense_weight()
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            device=weight.device,
        )
        with torch.no_grad():
            layer.weight.copy_(weight)
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.train(self.training)

    def get_config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bias": self.bias is not None,
            "quant": self.quant,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            value = getattr(self, name)
            text += f", {name}={value}" if value != usual else ""
        text += ", bias=False" if self.bias is None else ""
        text += f", {self._format_repr()}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _format_repr(self) -> str:
        """How the weight is stored."""
        return f"quant={self.quant}"

    # ---- running ----------------------------------------------------------------------------------------

    def _float_input(self) -> bool:
        """Whether x is multiplied as float."""
        return self.quant == "weight_only"

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        raise NotImplementedError

    def _through_op(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _kernel_of_pack(self) -> str:
        packed = self._buffers["packed"]
        return "" if packed is None else str(lib.pack_info(packed)["kernel"])

    def _make_plans(self, packed: Tensor) -> None:
        static = self.quant == "static"
        mode = lib.NONE if self._float_input() else lib.STATIC if static else lib.DYNAMIC
        modes = {"float": mode, "int8": lib.GIVEN} if static else {"float": mode}
        for name, code in modes.items():
            codes, keep = lib.tail(
                weight_scale=self._buffers.get(self._output_scale()),
                bias=self.bias,
                mode=code,
                x_scale=self.x_scale,
                x_zero_point=self.x_zero_point,
                activation=self.activation,
            )
            self._keep += keep
            self._plans[name] = self._plan(packed, codes)

    def _output_scale(self) -> str:
        """Name of the buffer that scales the outputs."""
        return "weight_scale"

    def forward(self, x: Tensor) -> Tensor:
        d = self.__dict__
        if plain(x, d["_parameters"]["bias"]):
            if not self.ready():
                self.prepare()
            dtype = x.dtype
            floating = dtype in (torch.float32, torch.bfloat16, torch.float16)
            plans = d["_plans"]  # held to the end: it keeps alive what the plan points to
            plan = plans.get("float" if floating else "int8")
            if d["_epoch"] >= 0 and plan is not None and (floating or dtype is torch.int8) and self._fits(x):
                return conv.call(self.run, plan, x, d["geometry"], dtype if floating else torch.float32)
        # graphs, gradients, the reference backend, and every error
        return self._through_op(autocast_input(x))

    def _fits(self, x: Tensor) -> bool:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            return False
        height, width = self.geometry.out_size(x.shape[-2], x.shape[-1])
        return height >= 1 and width >= 1

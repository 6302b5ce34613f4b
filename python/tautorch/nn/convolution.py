"""What the three replacements of ``nn.Conv2d`` share: arguments, geometry and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C
from tautorch.ops import geometry as conv
from tautorch.ops.geometry import Geometry, Pair

from .eager import STATE, USUAL, autocast_input, is_compiling
from .layer import LayerModule

_direct_call, _eager_call = _C.direct_call, _C.eager_call

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


class ConvModule(LayerModule):
    """A convolution over packed weights.

    Takes ``[B, I, H, W]`` or ``[I, H, W]`` in float32, bfloat16 or float16 and returns the same dtype, in
    channels-last memory where x is; int8 x is taken with ``quant="static"``, as values of the calibrated
    scale.
    """

    float_type: ClassVar[type[nn.Module]] = nn.Conv2d
    fixed_names = frozenset(
        {
            *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
            *("padding_mode", "geometry"),
        }
    )

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
        requantize: bool = False,
    ) -> None:
        super().__init__()
        op = self.op
        _check_padding_mode(op, padding_mode)
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
        self._init_tail(out_channels, bias, device, quant, quants, activation, requantize)

    @classmethod
    def _arguments(cls, module: nn.Module) -> dict[str, Any]:
        cls._check_type(module)
        assert isinstance(module, nn.Conv2d)
        _check_padding_mode(cls.op, module.padding_mode)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        arguments = {name: getattr(module, name) for name in names}
        return {
            **arguments,
            "bias": module.bias is not None,
            "padding_mode": module.padding_mode,
            "device": module.weight.device,
        }

    def to_float(self) -> nn.Conv2d:
        """``nn.Conv2d`` (float32) with the weight this layer stands for, without the fused activation."""
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            device=self.weight_device(),
        )
        self._give(layer)
        return layer

    def get_config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            **super().get_config(),
        }

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            value = getattr(self, name)
            text += f", {name}={value}" if value != usual else ""
        text += ", bias=False" if self.bias is None else ""
        return f"{text}, {self._repr_end()}"

    def _call(self, plan: bytes, x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
        return conv.conv_call(plan, self.geometry, x_dtype, dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without nn.Module's own way round to forward where nothing could notice: 1.1 us.
        if not is_compiling():
            out = _direct_call(STATE, USUAL, _forward, conv.MAKERS, type(self), self.__dict__, args, kwargs)
            if out is not None:
                return out
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        if not is_compiling():
            call = _eager_call(STATE, self.__dict__, input) or self._fresh_call(input)
            if call is not None:
                out = conv.run_conv(self.run, call, input)
                if out is not None:
                    return out
        # graphs, gradients, the reference backend, and every error
        return self._through_op(input if self._in_graph(input) else autocast_input(input))


_forward = ConvModule.forward

"""``LowRankConv2d``: a 2-D convolution whose weight is a product of two factors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops import geometry as conv
from tautorch.ops import library as lib
from tautorch.ops.geometry import Pair
from tautorch.ops.lowrank_conv2d import OP, pack, plan, problem
from tautorch.reference.quantizer import quantize_weight

from .convolution import ConvModule, Padding
from .factors import svd_factors, weight_dtype_of
from .packed import Canonical
from .tail import static_tensors


class LowRankConv2d(ConvModule):
    """``y = activation(conv2d(conv2d(x, down), up) + bias)`` in one call: kh x kw to r channels, then 1x1.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as ``nn.Conv2d``; ``padding_mode`` must be "zeros"; ``dtype`` is ignored.
        rank: inner channels of each group.
        weight_dtype: ``torch.float32`` factors meet x in fp32; ``torch.int8`` ones meet quantised x, and
            the inner result is quantised per pixel.
        quant: with int8 factors "dynamic" (x quantised per sample) or "static" (by ``x_scale``,
            ``x_zero_point``).
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused.

    Buffers: ``down`` ``[groups*r, I/groups, kh, kw]`` and ``up`` ``[O, r, 1, 1]``, float32 or int8; int8:
    ``down_scale`` float32 ``[groups*r]`` and ``up_scale`` float32 ``[O]``; static: ``x_scale`` and
    ``x_zero_point``.
    """

    op: ClassVar[str] = OP
    packed_names: ClassVar[tuple[str, ...]] = ("down", "up")
    fp32_names: ClassVar[tuple[str, ...]] = ("down", "up", "down_scale", "up_scale", "bias", "x_scale")
    run: ClassVar[Any] = staticmethod(_C.lowrank_conv2d_run)

    down = Canonical()
    up = Canonical()
    down_scale: Tensor | None
    up_scale: Tensor | None

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
        rank: int = 1,
        weight_dtype: torch.dtype | str = torch.float32,
        quant: str = "dynamic",
        activation: str = "none",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, quant=quant, quants=("dynamic", "static"), activation=activation,
        )  # fmt: skip
        self.rank, self.weight_dtype = rank, weight_dtype_of(OP, weight_dtype)
        self._down_bytes = 0
        int8 = self.weight_dtype == torch.int8
        if rank < 1:
            raise ValueError(f"{OP}: rank must be at least 1, got {rank}")
        if int8:
            lib.check_k(OP, max(self.geometry.k, rank))
        elif quant != "dynamic":
            raise ValueError(f'{OP}: quant must be "dynamic" for float32 factors, got {quant!r}')
        shapes = self._shapes()
        for name, shape in shapes.items():
            self._buffers[name] = torch.zeros(shape, dtype=self.weight_dtype, device=device)
            scale = torch.ones(shape[0], device=device) if int8 else None
            self.register_buffer(f"{name}_scale", scale)

    def _shapes(self) -> dict[str, tuple[int, int, int, int]]:
        o, i, kh, kw = self.geometry.weight_shape
        return {"down": (self.groups * self.rank, i, kh, kw), "up": (o, self.rank, 1, 1)}

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        *,
        rank: int | None = None,
        weight_dtype: torch.dtype | str = torch.float32,
        quant: str = "dynamic",
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
        activation: str = "none",
    ) -> LowRankConv2d:
        """Factorise a float layer's weight by SVD of ``[O, I*kh*kw]``, each group on its own.

        Args:
            module: ``nn.Conv2d``, or a pair of them named ``down`` and ``up`` as ``tautorch.factorize``
                makes (then ``from_factors``, and ``rank`` is theirs). Left as it is.
            rank: at most ``min(O/groups, I/groups*kh*kw)``.
            weight_dtype, quant, activation: see the class.
            x_scale, x_zero_point: for ``quant="static"``, from ``tautorch.quantize.calibrate``.

        Raises:
            TypeError: another module, or no rank.
            ValueError: a rank out of range, NaN or Inf in weight or bias, or settings that do not fit.
        """
        settings: dict[str, Any] = {
            "weight_dtype": weight_dtype,
            "quant": quant,
            "x_scale": x_scale,
            "x_zero_point": x_zero_point,
            "activation": activation,
        }
        down, up = getattr(module, "down", None), getattr(module, "up", None)
        if not isinstance(module, nn.Conv2d) and isinstance(down, nn.Conv2d) and isinstance(up, nn.Conv2d):
            own = down.out_channels // down.groups
            if rank not in (None, own):
                raise ValueError(f"{OP}: rank must be None or {own}, that of the pair, got {rank}")
            if len(list(module.children())) != 2:
                raise TypeError(f"{OP}: from_float takes nn.Conv2d or a pair, got {type(module).__name__}")
            return cls.from_factors(down, up, **settings).train(module.training)
        arguments = cls._arguments(module)
        if rank is None:
            raise TypeError(f"{OP}: rank must be given for nn.Conv2d, got None")
        assert isinstance(module, nn.Conv2d)
        groups, weight = module.groups, module.weight
        first, second = svd_factors(OP, weight.reshape(groups, weight.shape[0] // groups, -1), rank)
        return cls._build(
            arguments,
            first.reshape(groups * rank, *weight.shape[1:]),
            second.reshape(weight.shape[0], rank, 1, 1),
            module.bias,
            **settings,
        ).train(module.training)

    @classmethod
    def from_factors(
        cls,
        down: nn.Conv2d,
        up: nn.Conv2d,
        *,
        weight_dtype: torch.dtype | str = torch.float32,
        quant: str = "dynamic",
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
        activation: str = "none",
    ) -> LowRankConv2d:
        """Take ``up(down(x))``; a bias of ``down`` is folded into that of ``up``.

        Args:
            down: any convolution to ``groups * r`` channels.
            up: the 1x1 convolution of the same groups that follows; stride 1, no padding.

        The other arguments are those of ``from_float``.

        Raises:
            TypeError: not two ``nn.Conv2d``.
            ValueError: layers that do not follow each other like this, or as ``from_float``.
        """
        arguments = cls._arguments(down)
        follows = cls._arguments(up)
        wanted = {
            "in_channels": down.out_channels,
            "kernel_size": (1, 1),
            "stride": (1, 1),
            "groups": down.groups,
        }
        for name, value in wanted.items():
            if follows[name] != value:
                raise ValueError(f"{OP}: up must have {name}={value} to follow down, got {follows[name]}")
        if follows["padding"] not in ((0, 0), "valid", "same"):
            raise ValueError(f"{OP}: up must have no padding, got {follows['padding']}")
        bias = up.bias
        if down.bias is not None:
            folded = nn.functional.conv2d(
                down.bias.detach().double().reshape(1, -1, 1, 1),
                up.weight.detach().double(),
                None if bias is None else bias.detach().double(),
                groups=up.groups,
            )
            bias = folded.reshape(-1)
        arguments.update(out_channels=up.out_channels, bias=bias is not None)
        return cls._build(
            arguments,
            down.weight,
            up.weight,
            bias,
            weight_dtype=weight_dtype,
            quant=quant,
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            activation=activation,
        ).train(up.training)

    @classmethod
    def _build(
        cls,
        arguments: dict[str, Any],
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        *,
        weight_dtype: torch.dtype | str,
        quant: str,
        x_scale: Tensor | float | None,
        x_zero_point: Tensor | int | None,
        activation: str,
    ) -> LowRankConv2d:
        new = cls(
            **arguments, rank=up.shape[1], weight_dtype=weight_dtype, quant=quant, activation=activation
        )
        scale, zero_point = static_tensors(OP, quant, x_scale, x_zero_point, down.device)
        new._take(bias, x_scale=scale, x_zero_point=zero_point)
        for name, factor in (("down", down.detach()), ("up", up.detach())):
            if new.weight_dtype == torch.int8:
                q, factor_scale = quantize_weight(factor, op=OP)
                new._take(None, **{name: q, f"{name}_scale": factor_scale})
            else:
                new._take(None, **{name: factor.to(torch.float32, copy=True).contiguous()})
                new._check_finite(name)
        return new

    def dense_weight(self) -> Tensor:
        down, up = self._dequantised()
        g, r = self.groups, self.rank
        product = torch.bmm(up.reshape(g, -1, r), down.reshape(g, r, -1))
        return product.reshape(self.geometry.weight_shape)

    def to_factors(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The two float32 convolutions that this layer stands for, without the fused activation."""
        down, up = self._dequantised()
        g, bias = self.groups, self.bias
        inner = g * self.rank
        first = nn.Conv2d(
            self.in_channels, inner, self.kernel_size, self.stride, self.padding, self.dilation, g, bias=False
        )
        second = nn.Conv2d(inner, self.out_channels, 1, groups=g, bias=bias is not None)
        for layer, weight in ((first, down), (second, up)):
            layer.weight = nn.Parameter(weight)
        if bias is not None:
            second.bias = nn.Parameter(bias.detach().clone())
        return first.train(self.training), second.train(self.training)

    def _dequantised(self) -> tuple[Tensor, Tensor]:
        packed = self._buffers["packed"]
        factors = dict(self._buffers) if packed is None else self._unpack(packed)
        result = []
        for name, scale in (("down", self.down_scale), ("up", self.up_scale)):
            factor = factors[name]
            assert factor is not None
            weight = factor.to(torch.float32, copy=True)
            result.append(weight if scale is None else weight * scale.reshape(-1, 1, 1, 1))
        return result[0], result[1]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "rank": self.rank,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
        }

    def _format_repr(self) -> str:
        text = f"rank={self.rank}, weight_dtype={str(self.weight_dtype).removeprefix('torch.')}"
        return text if self._float_input() else f"{text}, quant={self.quant}"

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _float_input(self) -> bool:
        return self.weight_dtype != torch.int8

    def _output_scale(self) -> str:
        return "up_scale"

    def _problem(self) -> dispatch.Problem:
        buffers = self._buffers
        held = buffers["down"] if buffers["packed"] is None else buffers["packed"]
        assert held is not None
        return problem(self.geometry, self.rank, self.weight_dtype == torch.int8, held.device.type)

    def _pack(self, kernel: str) -> Tensor:
        packs = []
        for name in ("down", "up"):
            factor = self._buffers[name]
            assert factor is not None
            packs.append(pack(factor, self.groups, kernel))
        self._down_bytes = packs[0].numel()  # a multiple of the alignment
        return torch.cat(packs)

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The packs of the two factors, views."""
        return packed[: self._down_bytes], packed[self._down_bytes :]

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        parts = zip(self._shapes().items(), self._parts(packed), strict=True)
        return {name: conv.unpack(part, shape) for (name, shape), part in parts}

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        scale = self.down_scale
        if scale is not None:
            scale = scale.detach().to(torch.float32).contiguous()
            self._keep.append(scale)
        return plan(*self._parts(packed), scale, self.geometry, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        packed, down, up = (self._buffers[n] for n in ("packed", "down", "up"))
        if packed is not None and (down is None or up is None):
            down, up = self._parts(packed)
        shapes = self._shapes()
        _, *geometry = self.geometry.operands()
        y: Tensor = torch.ops.tautorch.lowrank_conv2d(
            x,
            down,
            up,
            self.bias,
            self.down_scale,
            self.up_scale,
            shapes["down"],
            shapes["up"],
            *geometry,
            self.x_scale,
            self.x_zero_point,
            self.activation,
        )
        return y

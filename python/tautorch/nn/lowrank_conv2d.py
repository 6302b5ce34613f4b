"""``LowRankConv2d``: a 2-D convolution whose weight is a product of two factors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops import geometry as conv
from tautorch.ops.geometry import Pair
from tautorch.ops.lowrank_conv2d import OP, pack, plan, problem

from .convolution import ConvModule, Padding
from .factors import svd_factors
from .lowrank import LowRankModule


class LowRankConv2d(LowRankModule, ConvModule):
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
    run: ClassVar[Any] = staticmethod(_C.lowrank_conv2d_run)

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
        ConvModule.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, quant=quant, quants=("dynamic", "static"), activation=activation,
        )  # fmt: skip
        self._init_factors(rank, weight_dtype, self._shapes(rank), self.geometry.k, device)

    def _shapes(self, rank: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        o, i, kh, kw = self.geometry.weight_shape
        return (self.groups * rank, i, kh, kw), (o, rank, 1, 1)

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
        pair = cls._pair(module)
        if pair is not None:
            cls._check_pair_rank(rank, pair[0].out_channels // pair[0].groups)
            return cls.from_factors(*pair, **settings).train(module.training)
        arguments = cls._arguments(module)
        rank = cls._given_rank(rank)
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
            pair=(down, up),
        ).train(up.training)

    def dense_weight(self) -> Tensor:
        down, up = self._float_factors()
        g, r = self.groups, self.rank
        product = torch.bmm(up.reshape(g, -1, r), down.reshape(g, r, -1))
        return product.reshape(self.geometry.weight_shape)

    def to_factors(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The two float32 convolutions that this layer stands for, without the fused activation."""
        down, up = self._float_factors()
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

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _problem(self) -> dispatch.Problem:
        return problem(self.geometry, self.rank, self.weight_dtype == torch.int8, self.weight_device().type)

    def _pack_factor(self, factor: Tensor, kernel: str) -> Tensor:
        return pack(factor, self.groups, kernel)

    def _unpack_factor(self, name: str, packed: Tensor) -> Tensor:
        return conv.unpack(packed, self._shapes(self.rank)[name == "up"])

    def _plan_factors(
        self, down: Tensor, up: Tensor, down_scale: Tensor | None, codes: dict[str, int]
    ) -> bytes:
        return plan(down, up, down_scale, self.geometry, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        buffers, bias = self._buffers, self._own_bias()  # by name nn.Module takes 0.3 us each
        down_shape, up_shape = self._shapes(self.rank)
        _, *geometry = self.geometry.operands()
        y: Tensor = torch.ops.tautorch.lowrank_conv2d(
            x, *self._operands(), bias, buffers["down_scale"], buffers["up_scale"], down_shape, up_shape,
            *geometry, buffers["x_scale"], buffers["x_zero_point"], self.activation,
        )  # fmt: skip
        return y

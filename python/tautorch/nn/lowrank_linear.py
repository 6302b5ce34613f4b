"""``LowRankLinear``: a linear layer whose weight is a product of two factors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops.int8_linear import pack, unpack
from tautorch.ops.lowrank_linear import OP, plan, problem

from .eager import autocast_input
from .factors import svd_factors
from .linear import LinearModule
from .lowrank import LowRankModule


class LowRankLinear(LowRankModule, LinearModule):
    """``y = activation(x @ down.T @ up.T + bias)`` in one call: in to r features, then to out.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; ``dtype`` is ignored.
        rank: r, the inner features.
        weight_dtype: ``torch.float32`` factors meet x in fp32; ``torch.int8`` ones meet quantised x, and
            the inner result is quantised per row.
        quant: with int8 factors "dynamic" (x quantised per row) or "static" (by ``x_scale``,
            ``x_zero_point``).
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused.

    Buffers: ``down`` ``[r, in]`` and ``up`` ``[out, r]``, float32 or int8; int8: ``down_scale`` float32
    ``[r]`` and ``up_scale`` float32 ``[out]``; static: ``x_scale`` float32 and ``x_zero_point`` int32, one
    value each.
    """

    op: ClassVar[str] = OP
    run: ClassVar[Any] = _C.lowrank_linear_run

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 1,
        weight_dtype: torch.dtype | str = torch.float32,
        quant: str = "dynamic",
        activation: str = "none",
    ) -> None:
        LinearModule.__init__(
            self, in_features, out_features, bias, device, quant=quant, quants=("dynamic", "static"),
            activation=activation,
        )  # fmt: skip
        shapes = ((rank, in_features), (out_features, rank))
        self._init_factors(rank, weight_dtype, shapes, in_features, device)

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
    ) -> LowRankLinear:
        """Factorise a float layer's weight by SVD.

        Args:
            module: ``nn.Linear``, or a pair of them named ``down`` and ``up`` as ``tautorch.factorize`` makes
                (then ``from_factors``, and ``rank`` is theirs). Left as it is.
            rank: at most ``min(in_features, out_features)``.
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
            cls._check_pair_rank(rank, pair[0].out_features)
            return cls.from_factors(*pair, **settings).train(module.training)
        arguments = cls._arguments(module)
        rank = cls._given_rank(rank)
        assert isinstance(module, nn.Linear)
        factors = svd_factors(OP, module.weight, rank)
        return cls._build(arguments, *factors, module.bias, **settings).train(module.training)

    @classmethod
    def from_factors(
        cls,
        down: nn.Linear,
        up: nn.Linear,
        *,
        weight_dtype: torch.dtype | str = torch.float32,
        quant: str = "dynamic",
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
        activation: str = "none",
    ) -> LowRankLinear:
        """Take ``up(down(x))``; a bias of ``down`` is folded into that of ``up``.

        The arguments beside the two layers are those of ``from_float``.

        Raises:
            TypeError: not two ``nn.Linear``.
            ValueError: layers that do not follow each other, or as ``from_float``.
        """
        arguments = cls._arguments(down)
        follows = cls._arguments(up)
        if up.in_features != down.out_features:
            raise ValueError(
                f"{OP}: up must have in_features={down.out_features} to follow down, got {up.in_features}"
            )
        bias: Tensor | None = up.bias
        if down.bias is not None:
            folded = up.weight.detach().double() @ down.bias.detach().double()
            bias = folded if bias is None else folded + bias.detach().double()
        arguments.update(out_features=follows["out_features"], bias=bias is not None)
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

    def dense_weight(self) -> Tensor:
        down, up = self._float_factors()
        return up @ down

    def to_factors(self) -> tuple[nn.Linear, nn.Linear]:
        """The two float32 layers that this one stands for, without the fused activation."""
        down, up = self._float_factors()
        bias = self.bias
        first = nn.Linear(self.in_features, self.rank, bias=False)
        second = nn.Linear(self.rank, self.out_features, bias=bias is not None)
        first.weight, second.weight = nn.Parameter(down), nn.Parameter(up)
        if bias is not None:
            second.bias = nn.Parameter(bias.detach().clone())
        return first.train(self.training), second.train(self.training)

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _problem(self) -> dispatch.Problem:
        dtype = str(self.weight_dtype).removeprefix("torch.")
        return problem(self.out_features, self.in_features, self.rank, dtype, self.weight_device().type)

    def _pack_factor(self, factor: Tensor, kernel: str) -> Tensor:
        return pack(factor, kernel=kernel)

    def _unpack_factor(self, name: str, packed: Tensor) -> Tensor:
        return unpack(packed)

    def _plan_factors(
        self, down: Tensor, up: Tensor, down_scale: Tensor | None, codes: dict[str, int]
    ) -> bytes:
        return plan(down, up, self.in_features, down_scale, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        buffers, bias = self._buffers, self._parameters["bias"]  # by name nn.Module takes 0.3 us each
        y: Tensor = torch.ops.tautorch.lowrank_linear(
            autocast_input(x), *self._operands(), bias, buffers["down_scale"], buffers["up_scale"],
            self.out_features, self.rank, buffers["x_scale"], buffers["x_zero_point"], False, self.activation,
        )  # fmt: skip
        return y

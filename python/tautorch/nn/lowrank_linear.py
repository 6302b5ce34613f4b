"""``LowRankLinear``: a linear layer whose weight is a product of two factors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops import library as lib
from tautorch.ops.int8_linear import pack, unpack
from tautorch.ops.lowrank_linear import OP, plan, problem
from tautorch.reference.quantizer import quantize_weight

from .eager import autocast_input
from .factors import svd_factors, weight_dtype_of
from .linear import LinearModule
from .packed import Canonical
from .tail import static_tensors


class LowRankLinear(LinearModule):
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
    packed_names: ClassVar[tuple[str, ...]] = ("down", "up")
    fp32_names: ClassVar[tuple[str, ...]] = ("down", "up", "down_scale", "up_scale", "bias", "x_scale")

    down = Canonical()
    up = Canonical()
    down_scale: Tensor | None
    up_scale: Tensor | None

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
        super().__init__(
            in_features, out_features, bias, device, quant=quant, quants=("dynamic", "static"),
            activation=activation,
        )  # fmt: skip
        self.rank, self.weight_dtype = rank, weight_dtype_of(OP, weight_dtype)
        int8 = self.weight_dtype == torch.int8
        if rank < 1:
            raise ValueError(f"{OP}: rank must be at least 1, got {rank}")
        if int8:
            lib.check_k(OP, max(in_features, rank))
        elif quant != "dynamic":
            raise ValueError(f'{OP}: quant must be "dynamic" for float32 factors, got {quant!r}')
        self._split = 0  # bytes of down's pack, which up's follows
        for name, shape in (("down", (rank, in_features)), ("up", (out_features, rank))):
            self._buffers[name] = torch.zeros(shape, dtype=self.weight_dtype, device=device)
            self.register_buffer(f"{name}_scale", torch.ones(shape[0], device=device) if int8 else None)

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
        down, up = getattr(module, "down", None), getattr(module, "up", None)
        if not isinstance(module, nn.Linear) and isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
            if len(list(module.children())) != 2:
                raise TypeError(f"{OP}: from_float takes nn.Linear or a pair, got {type(module).__name__}")
            if rank not in (None, down.out_features):
                raise ValueError(f"{OP}: rank must be None or {down.out_features}, the pair's, got {rank}")
            return cls.from_factors(down, up, **settings).train(module.training)
        arguments = cls._arguments(module)
        if rank is None:
            raise TypeError(f"{OP}: rank must be given for nn.Linear, got None")
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
    ) -> LowRankLinear:
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
        return up @ down

    def to_factors(self) -> tuple[nn.Linear, nn.Linear]:
        """The two float32 layers that this one stands for, without the fused activation."""
        down, up = self._dequantised()
        bias = self.bias
        first = nn.Linear(self.in_features, self.rank, bias=False)
        second = nn.Linear(self.rank, self.out_features, bias=bias is not None)
        first.weight, second.weight = nn.Parameter(down), nn.Parameter(up)
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
            result.append(weight if scale is None else weight * scale[:, None])
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
        dtype = str(self.weight_dtype).removeprefix("torch.")
        device = "cpu" if held is None else held.device.type
        return problem(self.out_features, self.in_features, self.rank, dtype, device)

    def _pack(self, kernel: str) -> Tensor:
        packs = []
        for name in ("down", "up"):
            factor = self._buffers[name]
            assert factor is not None
            packs.append(pack(factor, kernel=kernel))
        self._split = packs[0].numel()
        return torch.cat(packs)  # a pack's length is a multiple of its alignment

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The packs of the two factors, views."""
        return packed[: self._split], packed[self._split :]

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        return {name: unpack(part) for name, part in zip(("down", "up"), self._parts(packed), strict=True)}

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        scale = self.down_scale
        if scale is not None:
            scale = scale.detach().to(torch.float32).contiguous()
            self._keep.append(scale)
        return plan(*self._parts(packed), self.in_features, scale, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        packed, down, up = (self._buffers[n] for n in ("packed", "down", "up"))
        if packed is not None and (down is None or up is None):
            down, up = self._parts(packed)
        y: Tensor = torch.ops.tautorch.lowrank_linear(
            autocast_input(x), down, up, self.bias, self.down_scale, self.up_scale, self.out_features,
            self.rank, self.x_scale, self.x_zero_point, False, self.activation,
        )  # fmt: skip
        return y

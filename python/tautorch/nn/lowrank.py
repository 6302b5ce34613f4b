"""What the low-rank layers share: two factors, in one pack, and their ways from and to float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tautorch.ops import packing, tails
from tautorch.reference.quantizer import quantize_weight

from .factors import weight_dtype_of
from .layer import LayerModule
from .packed import Canonical
from .tail import grid_of, static_tensors


class LowRankModule(LayerModule):
    """A layer whose weight is ``up @ down``; see its subclasses."""

    fixed_names = frozenset({"rank", "weight_dtype"})
    packed_names: ClassVar[tuple[str, ...]] = ("down", "up")
    fp32_names: ClassVar[tuple[str, ...]] = ("down", "up", "down_scale", "up_scale", "bias", "x_scale")

    down = Canonical()
    up = Canonical()
    down_scale: Tensor | None
    up_scale: Tensor | None
    _views: tuple[Tensor, Tensor] | None

    def _init_factors(
        self,
        rank: int,
        weight_dtype: torch.dtype | str,
        shapes: Sequence[tuple[int, ...]],
        k: int,
        device: torch.device | str | None,
    ) -> None:
        """Register the factors of the given shapes; ``k`` is the length of the first inner product."""
        op = self.op
        self.rank, self.weight_dtype = rank, weight_dtype_of(op, weight_dtype)
        int8 = self.weight_dtype == torch.int8
        if rank < 1:
            raise ValueError(f"{op}: rank must be at least 1, got {rank}")
        if int8:
            tails.check_k(op, max(k, rank))
        elif self.quant != "dynamic":
            raise ValueError(f'{op}: quant must be "dynamic" for float32 factors, got {self.quant!r}')
        for name, shape in zip(("down", "up"), shapes, strict=True):
            self._buffers[name] = torch.zeros(shape, dtype=self.weight_dtype, device=device)
            self.register_buffer(
                f"{name}_scale", torch.ones(shape[0], dtype=torch.float32, device=device) if int8 else None
            )

    # ---- from and to float ------------------------------------------------------------------------------

    @classmethod
    def _pair(cls, module: nn.Module) -> tuple[Any, Any] | None:
        """The layers ``down`` and ``up`` of a pair such as ``tautorch.factorize`` makes, else None."""
        down, up = getattr(module, "down", None), getattr(module, "up", None)
        if isinstance(module, cls.float_type) or not (
            isinstance(down, cls.float_type) and isinstance(up, cls.float_type)
        ):
            return None
        if len(list(module.children())) != 2:
            kind = cls.float_type.__name__
            raise TypeError(f"{cls.op}: from_float takes nn.{kind} or a pair, got {type(module).__name__}")
        if type(module).forward is not nn.Sequential.forward or list(module._modules) != ["down", "up"]:
            raise TypeError(
                f"{cls.op}: from_float takes a pair as nn.Sequential(OrderedDict(down=..., up=...)), got "
                f"{type(module).__name__}, whose forward may do more"
            )
        return down, up

    @classmethod
    def _check_pair_rank(cls, rank: int | None, own: int) -> None:
        if rank not in (None, own):
            raise ValueError(f"{cls.op}: rank must be None or {own}, the pair's, got {rank}")

    @classmethod
    def _given_rank(cls, rank: int | None) -> int:
        if rank is None:
            raise TypeError(f"{cls.op}: rank must be given for nn.{cls.float_type.__name__}, got None")
        return rank

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
        pair: tuple[nn.Module, nn.Module] | None = None,
    ) -> Self:
        """The layer of two float factors; those of a ``pair`` may lie on scales ``quantize`` left on it."""
        new = cls(
            **arguments, rank=up.shape[1], weight_dtype=weight_dtype, quant=quant, activation=activation
        )  # type: ignore[call-arg]
        scale, zero_point = static_tensors(
            cls.op, quant, x_scale, x_zero_point, down.device, pair[0] if pair else None
        )
        new._take(bias, x_scale=scale, x_zero_point=zero_point)
        for i, (name, factor) in enumerate((("down", down.detach()), ("up", up.detach()))):
            if new.weight_dtype == torch.int8:
                q, factor_scale = quantize_weight(factor, grid_of(pair[i]) if pair else None, op=cls.op)
                new._take(None, **{name: q, f"{name}_scale": factor_scale})
            else:
                new._take(None, **{name: factor.to(torch.float32, copy=True).contiguous()})
                new._check_finite(name)
        return new

    def _float_factors(self) -> tuple[Tensor, Tensor]:
        """The factors as fresh float32 tensors."""
        buffers = self._state()
        packed = buffers["packed"]
        factors = buffers if packed is None else self._unpack(packed)
        result = []
        for name, scale in (("down", self.down_scale), ("up", self.up_scale)):
            factor = factors[name]
            assert factor is not None
            weight = factor.to(torch.float32, copy=True)
            result.append(weight if scale is None else weight * scale.reshape(-1, *[1] * (weight.dim() - 1)))
        return result[0], result[1]

    def get_config(self) -> dict[str, Any]:
        dtype = str(self.weight_dtype).removeprefix("torch.")
        return {**super().get_config(), "rank": self.rank, "weight_dtype": dtype}

    def _format_repr(self) -> str:
        text = f"rank={self.rank}, weight_dtype={str(self.weight_dtype).removeprefix('torch.')}"
        return text if self._float_input() else f"{text}, quant={self.quant}"

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _pack_factor(self, factor: Tensor, kernel: str) -> Tensor:
        raise NotImplementedError

    def _unpack_factor(self, name: str, packed: Tensor) -> Tensor:
        raise NotImplementedError

    def _plan_factors(
        self, down: Tensor, up: Tensor, down_scale: Tensor | None, codes: dict[str, int]
    ) -> bytes:
        raise NotImplementedError

    def _float_input(self) -> bool:
        return self.weight_dtype != torch.int8

    def _output_scale(self) -> str:
        return "up_scale"

    def _pack(self, kernel: str) -> Tensor:
        packs = []
        for name in ("down", "up"):
            factor = self._buffers[name]
            assert factor is not None
            packs.append(self._pack_factor(factor, kernel))
        return torch.cat(packs)  # a pack's length is a multiple of its alignment

    def _reset(self) -> None:
        super()._reset()
        self.__dict__["_views"] = None

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The packs of the two factors, views."""
        views: tuple[Tensor, Tensor] | None = self._views
        if views is None:
            down = int(packing.pack_info(packed)["bytes"])  # up's follows
            views = packed[:down], packed[down:]
        return views

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        parts = zip(("down", "up"), self._parts(packed), strict=True)
        return {name: self._unpack_factor(name, part) for name, part in parts}

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        scale = self.down_scale
        if scale is not None:
            scale = scale.detach().to(torch.float32).contiguous()
            self._keep.append(scale)
        # The same views at every call of the torch op: by them it finds its plan again.
        self._views = self._parts(packed)
        return self._plan_factors(*self._views, scale, codes)

    def _operands(self) -> tuple[Tensor | None, Tensor | None]:
        """What the torch op takes for down and up: the canonical factors, or their packs."""
        buffers = self._state()
        packed, down, up = (buffers[n] for n in ("packed", "down", "up"))
        if packed is not None and (down is None or up is None):
            return self._parts(packed)
        return down, up

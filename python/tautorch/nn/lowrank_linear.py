"""``LowRankLinear``: a linear layer whose weight is a product of two factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops.int8_linear import pack, unpack
from tautorch.ops.lowrank_linear import OP, plan, problem

from .factors import svd_factors
from .int8_linear import Int8Linear
from .linear import LinearModule
from .lowrank import LowRankModule
from .sparse_linear import SparseLinear

ResidualModule = Int8Linear | SparseLinear
_RESIDUALS: dict[str, type[ResidualModule]] = {c.__name__: c for c in (Int8Linear, SparseLinear)}


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

        residual: an ``Int8Linear`` or ``SparseLinear`` without bias, dynamic and of the same sizes, whose
            product is added before the bias in the same call: ``activation(x @ down.T @ up.T + residual(x) +
            bias)``. x is quantised for int8 values as for int8 factors; float32 values need float32 factors.
            Or its description, as ``get_config`` gives it. It becomes the sub-module ``residual``.

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
        residual: ResidualModule | Mapping[str, Any] | None = None,
    ) -> None:
        LinearModule.__init__(
            self, in_features, out_features, bias, device, quant=quant, quants=("dynamic", "static"),
            activation=activation,
        )  # fmt: skip
        shapes = ((rank, in_features), (out_features, rank))
        self._init_factors(rank, weight_dtype, shapes, in_features, device)
        self.register_module("residual", self._checked_residual(residual, device))

    def _checked_residual(
        self, residual: nn.Module | Mapping[str, Any] | None, device: torch.device | str | None
    ) -> ResidualModule | None:
        if isinstance(residual, Mapping):
            config = dict(residual)
            cls = _RESIDUALS.get(config.pop("class", ""))
            if cls is None:
                raise ValueError(f"{OP}: residual must name one of {', '.join(_RESIDUALS)}, got {residual}")
            residual = cls(**config, device=device)
        if residual is None:
            return None
        if not isinstance(residual, Int8Linear | SparseLinear):
            raise TypeError(
                f"{OP}: residual must be Int8Linear or SparseLinear, got {type(residual).__name__}"
            )
        shape = residual.in_features, residual.out_features
        if shape != (self.in_features, self.out_features):
            raise ValueError(
                f"{OP}: residual must be {self.in_features} -> {self.out_features} as this layer, got "
                f"{shape[0]} -> {shape[1]}"
            )
        plain = residual.activation == "none" and residual.out_scale is None
        if residual.bias is not None or not plain or residual.quant != "dynamic":
            raise ValueError(
                f'{OP}: residual must have no bias, no activation, float output and quant="dynamic": this '
                f"layer adds them and says how x is quantised, got {residual}"
            )
        if residual._float_input() and not self._float_input():
            raise ValueError(f"{OP}: residual must hold int8 values with int8 factors, got {residual}")
        return residual

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
        residual: str | nn.Module | Callable[[nn.Linear], nn.Module] | None = None,
    ) -> LowRankLinear:
        """Factorise a float layer's weight by SVD.

        Args:
            module: ``nn.Linear``, or a pair of them named ``down`` and ``up`` as ``tautorch.factorize`` makes
                (then ``from_factors``, and ``rank`` is theirs). Left as it is.
            rank: at most ``min(in_features, out_features)``.
            weight_dtype, quant, activation: see the class.
            x_scale, x_zero_point: for ``quant="static"``, from ``tautorch.quantize.calibrate``.
            residual: what becomes of the rest of the weight, which the factors miss: None, nothing; "int8",
                an ``Int8Linear``; or a function that takes it as ``nn.Linear`` without bias and returns an
                ``Int8Linear`` or ``SparseLinear``, say
                ``lambda rest: SparseLinear.from_float(rest, pattern="4x1", mask=mask_of(rest.weight))``.
                With a pair: a ready module or None.

        Raises:
            TypeError: another module, or no rank, or no such residual.
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
            if residual is not None and not isinstance(residual, nn.Module):
                raise TypeError(f"{OP}: residual must be a module or None for a pair, got {residual!r}")
            return cls.from_factors(*pair, **settings, residual=residual).train(module.training)
        arguments = cls._arguments(module)
        rank = cls._given_rank(rank)
        assert isinstance(module, nn.Linear)
        factors = svd_factors(OP, module.weight, rank)
        new = cls._build(arguments, *factors, module.bias, **settings)
        new._add_residual(residual, module)
        return new.train(module.training)

    def _add_residual(
        self, residual: str | nn.Module | Callable[[nn.Linear], nn.Module] | None, module: nn.Linear
    ) -> None:
        if residual is None:
            return
        if not isinstance(residual, nn.Module):
            if isinstance(residual, str) and residual != "int8":
                raise ValueError(f'{OP}: residual must be "int8", a function or None, got {residual!r}')
            device = module.weight.device
            rest = nn.Linear(self.in_features, self.out_features, bias=False, device=device)
            with torch.no_grad():
                rest.weight.copy_(module.weight.detach().to(torch.float32) - self.dense_weight())
            residual = Int8Linear.from_float(rest) if isinstance(residual, str) else residual(rest)
        self.residual = self._checked_residual(residual, None)

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
        residual: nn.Module | None = None,
    ) -> LowRankLinear:
        """Take ``up(down(x))``; a bias of ``down`` is folded into that of ``up``.

        The arguments beside the two layers are those of ``from_float``; ``residual`` is a ready module.

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
        new = cls._build(
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
        )
        new.residual = new._checked_residual(residual, None)
        return new.train(up.training)

    def dense_weight(self) -> Tensor:
        down, up = self._float_factors()
        weight = up @ down
        return weight if self.residual is None else weight + self.residual.dense_weight()

    def to_factors(self) -> tuple[nn.Linear, nn.Linear]:
        """The two float32 layers that this one stands for, without the fused activation.

        Raises:
            ValueError: with a residual, which two layers cannot hold.
        """
        if self.residual is not None:
            raise ValueError(f"{OP}: to_factors needs a layer without residual, got {self.residual}")
        down, up = self._float_factors()
        bias = self.bias
        first = nn.Linear(self.in_features, self.rank, bias=False)
        second = nn.Linear(self.rank, self.out_features, bias=bias is not None)
        first.weight, second.weight = nn.Parameter(down), nn.Parameter(up)
        if bias is not None:
            second.bias = nn.Parameter(bias.detach().clone())
        return first.train(self.training), second.train(self.training)

    def get_config(self) -> dict[str, Any]:
        residual = self.residual
        described = None if residual is None else {"class": type(residual).__name__, **residual.get_config()}
        return {**super().get_config(), "residual": described}

    def _format_repr(self) -> str:
        text = super()._format_repr()
        return text if self.residual is None else f"{text}, residual={self.residual}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # the residual on the same line

    def packed_bytes(self) -> int:
        return super().packed_bytes() + (0 if self.residual is None else self.residual.packed_bytes())

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _prepare(self, kernel: str | None = None) -> None:
        residual = self._checked_residual(self.residual, None)
        kernel = dispatch.choose(self._problem()) if kernel is None else kernel
        # First: it must be packed for the kernel of this layer.
        if residual is not None and not (residual.ready() and residual._kernel_of_pack() == kernel):
            residual._prepare(kernel)
        super()._prepare(kernel)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "residual" in self.__dict__:  # pickled by a version that did not register that there is none
            self._modules["residual"] = self.__dict__.pop("residual")

    def _watch(self) -> None:
        super()._watch()
        self._seen = [*self._seen, (self._modules, "residual", self.residual)]  # it may be replaced
        if self.residual is not None:
            self._seen = [*self._seen, *self.residual._seen]
            self._stamps = [*self._stamps, *self.residual._stamps]
            self._handed.update({f"residual.{n}": entry for n, entry in self.residual._handed.items()})

    def _problem(self) -> dispatch.Problem:
        dtype = str(self.weight_dtype).removeprefix("torch.")
        residual = None if self.residual is None else getattr(self.residual, "pattern", "int8")
        device = self.weight_device().type
        return problem(self.out_features, self.in_features, self.rank, dtype, device, residual)

    def _pack_factor(self, factor: Tensor, kernel: str) -> Tensor:
        return pack(factor, kernel=kernel)

    def _unpack_factor(self, name: str, packed: Tensor) -> Tensor:
        return unpack(packed)

    def _plan_factors(
        self, down: Tensor, up: Tensor, down_scale: Tensor | None, codes: dict[str, int]
    ) -> bytes:
        residual = self.residual
        if residual is None:
            return plan(down, up, self.in_features, down_scale, codes)
        packed, scale = residual._buffers["packed"], residual.weight_scale
        assert packed is not None
        self._keep += [packed] if scale is None else [packed, scale]
        return plan(down, up, self.in_features, down_scale, codes, packed, scale)

    def _residual_operands(self) -> tuple[Any, ...]:
        """What the torch op takes for the residual."""
        residual = self.residual
        if isinstance(residual, SparseLinear):
            return (*residual._operands(), residual.weight_scale, residual.pattern)
        if residual is None:
            return (None,) * 5
        buffers = residual._state()
        weight = buffers["packed"] if buffers["weight"] is None else buffers["weight"]
        return weight, None, None, residual.weight_scale, None

    def _through_op(self, x: Tensor) -> Tensor:
        buffers, bias = self._buffers, self._own_bias()  # by name nn.Module takes 0.3 us each
        y: Tensor = torch.ops.tautorch.lowrank_linear(
            x, *self._operands(), bias, buffers["down_scale"], buffers["up_scale"],
            self.out_features, self.rank, *self._residual_operands(), buffers["x_scale"],
            buffers["x_zero_point"], False, self.activation,
        )  # fmt: skip
        return y

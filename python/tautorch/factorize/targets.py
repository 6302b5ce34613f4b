"""What a layer can be factorised into: its sizes, what each keeps, and the layers of one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tautorch._layers import Layer, layer_groups
from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear, TuckerConv2d
from tautorch.factorize.svd import Svd, tucker2, tucker_energy
from tautorch.factorize.vbmf import vbmf_rank

#: Inner channels, for "tucker" also (r_in, r_out).
Rank = int | tuple[int, int]
_L = TypeVar("_L", nn.Linear, nn.Conv2d)
# Tucker ranks grow together in these steps of the layer's own channels.
_STEPS = 64


class PairTarget:
    """A layer whose weight becomes a product of two, by SVD, whitened if there is a gram."""

    def __init__(self, name: str, layer: Layer, gram: Tensor | None = None) -> None:
        self.name, self.layer, self._gram = name, layer, gram
        groups = layer_groups(layer)
        self._matrix = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)
        self._per_rank = groups * (self._matrix.shape[1] + self._matrix.shape[2])
        self.dense = layer.weight.numel()
        self._limit = (self.dense - 1) // self._per_rank
        self._decomposed: Svd | None = None

    @property
    def _svd(self) -> Svd:
        if self._decomposed is None:
            self._decomposed = Svd(self._matrix, self._gram)
        return self._decomposed

    def ranks(self, multiple: int = 1) -> list[Rank]:
        """The multiples that make the layer smaller, growing."""
        return list(range(multiple, self._limit + 1, multiple))

    def weights(self, rank: Rank) -> int:
        """Weights of the pair."""
        return self._one(rank) * self._per_rank

    def kept(self, rank: Rank) -> float:
        """Share of the squared singular values that this rank keeps."""
        energy = self._svd.values.square().sum(0)
        return float(energy[: self._one(rank)].sum() / energy.sum().clamp_min(1e-300))

    def of_energy(self, energy: float, multiple: int) -> Rank:
        """The least multiple that keeps this share of the energy."""
        return -(-self._svd.rank_of_energy(energy) // multiple) * multiple

    def of_noise(self, multiple: int) -> Rank:
        """The least multiple that holds what VBMF tells from noise."""
        return -(-max(vbmf_rank(matrix) for matrix in self._matrix) // multiple) * multiple

    def problem(self, rank: Rank) -> str | None:
        """What is wrong with a rank, None if nothing."""
        if 1 <= self._one(rank) <= self._limit:
            return None
        return f"rank of layer {self.name!r} must be in [1, {self._limit}] to make it smaller, got {rank}"

    def build(self, rank: Rank) -> FactorizedLinear | FactorizedConv2d:
        """The pair, in the layer's dtype and on its device."""
        layer, r = self.layer, self._one(rank)
        down, up = self._svd.factors(r)
        if isinstance(layer, nn.Conv2d):
            shape = (layer.groups * r, *layer.weight.shape[1:])
            return FactorizedConv2d(
                conv_like(layer, down.reshape(shape), None, spatial=True),
                conv_like(layer, up.reshape(layer.out_channels, r, 1, 1), layer.bias),
            )
        return FactorizedLinear(_linear(layer, down[0], None), _linear(layer, up[0], layer.bias))

    def _one(self, rank: Rank) -> int:
        if not isinstance(rank, int):
            raise ValueError(f"factorize: rank of layer {self.name!r} must be one int, got {rank}")
        return rank


class TuckerTarget:
    """A convolution that becomes 1x1, kh x kw and 1x1 (Tucker-2)."""

    def __init__(self, name: str, layer: Layer) -> None:
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(
                f"factorize: layer {name!r} must be nn.Conv2d for tucker, got {type(layer).__name__}"
            )
        self.name, self.layer = name, layer
        self.dense = layer.weight.numel()
        self._energy: Tensor | None = None

    def ranks(self, multiple: int = 1) -> list[Rank]:
        """Pairs of multiples in even steps of the channels, growing, that make the layer smaller."""
        outputs, inputs, kh, kw = self.layer.weight.shape
        steps = [
            [max(1, channels * k // _STEPS // multiple) * multiple for channels in (inputs, outputs)]
            for k in range(1, _STEPS + 1)
        ]

        def used(rank: int, other: int) -> int:
            """What of `rank` the core can use beside `other`, a multiple."""
            return min(rank, -(-other * kh * kw // multiple) * multiple)

        found = dict.fromkeys((used(r_in, r_out), used(r_out, r_in)) for r_in, r_out in steps)
        return [pair for pair in found if self.problem(pair) is None]

    def weights(self, rank: Rank) -> int:
        """Weights of the three convolutions."""
        outputs, inputs, kh, kw = self.layer.weight.shape
        r_in, r_out = _two(rank)
        return inputs * r_in + r_in * r_out * kh * kw + outputs * r_out

    def kept(self, rank: Rank) -> float:
        """Share of the energy in the core of the truncated higher-order SVD (iteration adds to it)."""
        r_in, r_out = _two(rank)
        return float(self._energies()[r_out - 1, r_in - 1])

    def _energies(self) -> Tensor:
        if self._energy is None:
            self._energy = tucker_energy(self.layer.weight)
        return self._energy

    def of_energy(self, energy: float, multiple: int) -> Rank:
        """The multiples that keep this share of the energy (see `kept`) with the fewest weights."""
        outputs = self.layer.weight.shape[0]
        enough = self._energies() >= energy - 1e-12  # in each row from some input on
        pairs = []
        for r_out in range(multiple, outputs + multiple, multiple):
            row = enough[min(r_out, outputs) - 1]
            if bool(row[-1]):
                r_in = int(row.to(torch.uint8).argmax()) + 1
                pairs.append((-(-r_in // multiple) * multiple, r_out))
        return min(pairs, key=self.weights)

    def of_noise(self, multiple: int) -> Rank:
        """The least multiples that hold what VBMF tells from noise in each channel mode."""
        weight = self.layer.weight
        modes = (weight.transpose(0, 1).flatten(1), weight.flatten(1))
        r_in, r_out = (-(-vbmf_rank(mode) // multiple) * multiple for mode in modes)
        return r_in, r_out

    def problem(self, rank: Rank) -> str | None:
        """What is wrong with the ranks, None if nothing."""
        outputs, inputs = self.layer.weight.shape[:2]
        r_in, r_out = _two(rank)
        if 1 <= r_in <= inputs and 1 <= r_out <= outputs and self.weights(rank) < self.dense:
            return None
        return (
            f"ranks of layer {self.name!r} must be in [1, {inputs}] and [1, {outputs}] and give "
            f"fewer than {self.dense} weights, got {(r_in, r_out)}"
        )

    def build(self, rank: Rank) -> TuckerConv2d:
        """The three convolutions, in the layer's dtype and on its device."""
        layer, ranks = self.layer, _two(rank)
        u_in, core, u_out = tucker2(layer.weight, *ranks)
        return TuckerConv2d(
            conv_like(layer, u_in.T.reshape(ranks[0], layer.in_channels, 1, 1), None),
            conv_like(layer, core, None, spatial=True),
            conv_like(layer, u_out.reshape(layer.out_channels, ranks[1], 1, 1), layer.bias),
        )


Target = PairTarget | TuckerTarget


def _two(rank: Rank) -> tuple[int, int]:
    return rank if isinstance(rank, tuple) else (rank, rank)


def _linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    # skip_init draws no random numbers, so that factorising does not change a seeded run.
    new: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, **like
    )
    return _filled(new, layer, weight, bias)


def conv_like(
    layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int | None = None, spatial: bool = False
) -> nn.Conv2d:
    """A convolution of this weight, in the layer's groups or `groups`; where `spatial` with its geometry."""
    groups = layer.groups if groups is None else groups
    like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if spatial:
        like |= {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        like |= {"padding_mode": layer.padding_mode}
    outputs, inputs, *kernel = weight.shape
    new: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d,
        inputs * groups,
        outputs,
        tuple(kernel),
        groups=groups,
        bias=bias is not None,
        **like,
    )
    return _filled(new, layer, weight, bias)


def _filled(new: _L, layer: Layer, weight: Tensor, bias: Tensor | None) -> _L:
    with torch.no_grad():
        new.weight.copy_(weight)
        new.weight.requires_grad_(layer.weight.requires_grad)
        if bias is not None and new.bias is not None:
            new.bias.copy_(bias)
            new.bias.requires_grad_(layer.bias is not None and layer.bias.requires_grad)
    return new

"""L0 gates: how many weights are kept is itself trained, through noisy gates that can be exactly zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tautorch._layers import Layer, layer_groups, own_weight, select_layers, take_off_parametrisation
from tautorch.nn.tail import grid_of, kept_of
from tautorch.prune.patterns import Blocks, Pattern, parse_pattern

# The paper's: temperature, and the interval that the concrete distribution is stretched to.
_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1


class HardConcrete(nn.Module):
    """Gates z in [0, 1], each exactly 0 or 1 with positive probability (Louizos et al. 2018, section 2.2).

    In training z = clamp(s (zeta - gamma) + gamma, 0, 1) with s = sigmoid((log u - log(1 - u) + log alpha) /
    beta), u uniform; in eval the noise is gone and beta is 1: s = sigmoid(log alpha).

    Args:
        shape: of the gates.
        keep: the probability at the start that a gate is not zero, in (0, 1).
    """

    def __init__(self, shape: tuple[int, ...], keep: float, like: Tensor) -> None:
        super().__init__()
        # P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta)).
        start = math.log(keep / (1 - keep)) + _BETA * math.log(-_GAMMA / _ZETA)
        self.log_alpha = nn.Parameter(torch.full(shape, start, dtype=torch.float32, device=like.device))

    def kept(self) -> Tensor:
        """The probability that each gate is not zero."""
        return torch.sigmoid(self.log_alpha - _BETA * math.log(-_GAMMA / _ZETA))

    def gates(self) -> Tensor:
        """Sampled in training, deterministic in eval."""
        if self.training:
            # Away from 0 and 1, whose logits are infinite.
            u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / _BETA)
        else:
            s = torch.sigmoid(self.log_alpha)
        return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


class _BlockGate(HardConcrete):
    """A parametrisation of a weight: each block times its gate; what was pruned before stays zero."""

    #: For methods that need a plain weight.
    remedy = "call finalize() or remove() of its L0Gates first"

    def __init__(self, layer: Layer, form: Pattern, keep: float) -> None:
        mask, groups = kept_of(layer), layer_groups(layer)
        counted = torch.ones_like(layer.weight, dtype=torch.float64) if mask is None else mask.double()
        blocks = Blocks.of("L0Gates", counted, form, groups)
        super().__init__(tuple(blocks.scores.shape), keep, layer.weight)
        self._form, self._groups = form, groups
        self.register_buffer("sizes", (blocks.scores * blocks.sizes).round().long(), persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.sizes: Tensor
        self.mask: Tensor | None

    def forward(self, weight: Tensor) -> Tensor:
        gates = Blocks(self.log_alpha, self.sizes, self._form, self._groups, weight.shape).expand(
            self.gates()
        )
        gated = weight * gates.to(weight.dtype)
        return gated if self.mask is None else gated.masked_fill(~self.mask, 0.0)


class _ChannelGate(HardConcrete):
    """Each output channel of a layer times its gate."""

    def __init__(self, layer: Layer, keep: float) -> None:
        outputs = layer.weight.shape[0]
        super().__init__((outputs,), keep, layer.weight)
        mask = kept_of(layer)
        kept = torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask
        self.register_buffer("weights", kept.flatten(1).sum(1), persistent=False)
        self.register_buffer("sizes", self.weights + int(layer.bias is not None), persistent=False)
        self.weights: Tensor
        self.sizes: Tensor
        self._spatial = isinstance(layer, nn.Conv2d)

    def forward(self, out: Tensor) -> Tensor:
        gates = self.gates().to(out.dtype)
        return out * (gates[:, None, None] if self._spatial else gates)


class L0Gates:
    """Gates on the weights of a model, trained along with it (Louizos et al. 2018, arXiv:1712.01312).

        gates = L0Gates(model, pattern="4x1")
        optimizer = torch.optim.Adam([{"params": gates.weights()}, {"params": gates.parameters(), "lr": 0.1}])
        loss = task_loss + 2.0 * gates.penalty()
        ...
        masks = gates.finalize()

    The gates' parameters live in the model (its `parameters()` and `state_dict` have them) until `finalize`
    or `remove`. They need a far higher learning rate than weights: they move by units, weights by hundredths.
    Ranks that are seeded differently each draw gates of their own in training, as dropout does; the gates'
    parameters, and so the penalty and what is kept at last, are the same on all of them.
    In training each read of a gated weight draws anew, as dropout does at each call: a layer that is used
    twice in a forward has two draws. `with torch.nn.utils.parametrize.cached():` around the forward makes
    them one (but not of "channels", whose gates are on the outputs).
    Weights that were pruned before stay zero, and are not counted among those below: load a checkpoint into
    gates of a model that was pruned alike.

    Args:
        model: changed in place.
        layers: names or shell patterns, None for every layer that owns its weight alone.
        pattern: one gate for each weight ("unstructured"), block ("4x1", "BxB"), or output with its bias
            ("channels"). n:m patterns, which fix the count, have nothing to train here.
        keep: the probability at the start that a gate is open, in (0, 1).

    Raises ValueError for arguments out of range and for layers already gated or quantised, before anything
    changes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str] | None = None,
        pattern: str = "unstructured",
        keep: float = 0.9,
    ) -> None:
        op = "L0Gates"
        form = None if pattern == "channels" else parse_pattern(op, pattern)
        if form is not None and form.of:
            raise ValueError(f'{op}: pattern must be "unstructured", blocks or "channels", got {pattern!r}')
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1:
            raise ValueError(f"{op}: keep must be a probability in (0, 1), got {keep!r}")
        chosen = select_layers(op, model, layers)
        for name, layer in chosen.items():
            if "l0_gate" in layer._modules:
                raise ValueError(f"{op}: layer {name!r} must have no gates yet; call finalize() or remove()")
            if grid_of(layer) is not None:
                raise ValueError(
                    f"{op}: layer {name!r} must not be quantised yet, gates move weights off their grid; "
                    "prune first"
                )
            if not bool(torch.isfinite(layer.weight).all()):
                raise ValueError(f"{op}: the weight of layer {name!r} must be finite, got NaN or Inf")
        self._model, self._layers = model, chosen
        self._gates: dict[str, _BlockGate | _ChannelGate] = {}
        self._hooks: list[Any] = []
        for name, layer in chosen.items():
            if form is not None:
                block = _BlockGate(layer, form, keep)
                self._gates[name] = block.train(layer.training)
                parametrize.register_parametrization(layer, "weight", block)
            else:
                channel = _ChannelGate(layer, keep)
                self._gates[name] = channel.train(layer.training)
                layer.l0_gate = channel
                self._hooks.append(layer.register_forward_hook(lambda module, _, out: module.l0_gate(out)))

    def parameters(self) -> list[nn.Parameter]:
        """The gates' own, for the optimizer."""
        return [gate.log_alpha for gate in self._gates.values()]

    def weights(self) -> list[nn.Parameter]:
        """All the model's others."""
        own = {id(parameter) for parameter in self.parameters()}
        return [parameter for parameter in self._model.parameters() if id(parameter) not in own]

    def expected_l0(self) -> Tensor:
        """The expected number of weights that are not zero: a scalar with gradients."""
        return torch.stack([(gate.kept() * gate.sizes).sum() for gate in self._there()]).sum()

    def penalty(self) -> Tensor:
        """The expected share of weights that are not zero, in [0, 1]: add it, weighted, to the loss."""
        return self.expected_l0() / sum(int(gate.sizes.sum()) for gate in self._there())

    def sparsity(self) -> float:
        """The share of weights whose gates are zero in eval."""
        zero = total = 0
        with torch.no_grad():
            for gate in self._there():
                zero += int(gate.sizes[_deterministic(gate) == 0].sum())
                total += int(gate.sizes.sum())
        return zero / total

    def finalize(self) -> dict[str, Tensor]:
        """Multiply the eval-time gates into plain weights (and biases) and take the gates out.

        Returns the masks (True = kept) for `hold_masks`. The model then computes in eval what it did before.
        Raises ValueError, changing nothing, if a layer would be all zero, the gates are out already, or a
        layer with gates on its channels is clustered or otherwise parametrised by now.
        """
        self._there()
        for name, gate in self._gates.items():
            why = own_weight(self._layers[name]) if isinstance(gate, _ChannelGate) else None
            if why is not None:
                raise ValueError(f"L0Gates: layer {name!r} cannot take its gates in: {why}")
        with torch.no_grad():
            gates = {name: _deterministic(gate) for name, gate in self._gates.items()}
        for name, values in gates.items():
            gate = self._gates[name]
            if not bool((values * (gate.weights if isinstance(gate, _ChannelGate) else gate.sizes)).any()):
                raise ValueError(
                    f"L0Gates: layer {name!r} must keep a gate open, got none; weigh the penalty less"
                )
        masks: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, layer in self._layers.items():
                gate = self._gates[name]
                if isinstance(gate, _ChannelGate):
                    before = kept_of(layer)
                    factor = gates[name].reshape(-1, *[1] * (layer.weight.dim() - 1))
                    layer.weight.mul_(factor.to(layer.weight.dtype))
                    if layer.bias is not None:
                        layer.bias.mul_(gates[name].to(layer.bias.dtype))
                    masks[name] = (factor != 0).expand_as(layer.weight).clone()
                    if before is not None:
                        masks[name] &= before
                else:
                    blocks = Blocks(gates[name], gate.sizes, gate._form, gate._groups, layer.weight.shape)
                    masks[name] = blocks.expand(gates[name]) != 0
                    if gate.mask is not None:
                        masks[name] &= gate.mask
                    gate.eval()
        self._take_out(keep_gated=True)
        return masks

    def remove(self) -> None:
        """Take the gates out and leave the weights as they were without them."""
        self._take_out(keep_gated=False)

    def _there(self) -> list[_BlockGate | _ChannelGate]:
        """The gates; ValueError once they are out of the model."""
        if not self._gates:
            raise ValueError("L0Gates: the gates must be in the model, got none after finalize() or remove()")
        return list(self._gates.values())

    def _take_out(self, keep_gated: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            if "l0_gate" in layer._modules:
                del layer.l0_gate
            else:
                take_off_parametrisation(layer, keep_gated)
        self._gates, self._layers, self._hooks = {}, {}, []


def _deterministic(gate: HardConcrete) -> Tensor:
    training = gate.training
    gate.training = False
    try:
        return gate.gates()
    finally:
        gate.training = training

"""Second moments of what layers are given, for activation-aware factorisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch._batches import Batches, observe_inputs, require_seen
from tautorch._layers import Layer

# Unfolded rows held at once: 64 MiB of float64.
_UNFOLD_ELEMENTS = 8 << 20


def input_grams(
    op: str, model: nn.Module, layers: Mapping[str, Layer], batches: Batches, named: bool = True
) -> dict[str, Tensor]:
    """X X^T of each layer's inputs over `batches`, float64: [1, K, K] for Linear, [groups, K, K] for Conv2d.

    A convolution's X is its unfolded input, K = I / groups * kh * kw. A layer that never ran is a ValueError,
    or left out unless `named`; NaN or Inf in an input is one too.
    """
    grams: dict[str, Tensor] = {}

    def see(name: str, layer: Layer, x: Tensor) -> None:
        wide = x.double()
        total = _linear_gram(wide) if isinstance(layer, nn.Linear) else _conv_gram(wide, layer)
        grams[name] = grams[name] + total if name in grams else total

    require_seen(op, layers, observe_inputs(op, model, layers, batches, see), named)
    return grams


def _linear_gram(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return (rows.T @ rows).unsqueeze(0)


def _conv_gram(x: Tensor, conv: nn.Conv2d) -> Tensor:
    if x.dim() == 3:
        x = x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    per_sample = padded[0].numel() * conv.kernel_size[0] * conv.kernel_size[1]
    total = x.new_zeros(())
    for part in torch.split(padded, max(1, _UNFOLD_ELEMENTS // max(per_sample, 1))):
        columns = F.unfold(part, conv.kernel_size, conv.dilation, 0, conv.stride)
        rows = (
            columns.reshape(part.shape[0], conv.groups, -1, columns.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        )
        total = total + rows @ rows.transpose(1, 2)
    return total

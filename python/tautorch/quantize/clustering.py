"""Weight clustering: each weight becomes one of 2^bits values of its layer, and the values are trained.

Han et al. 2016, "Deep Compression", arXiv:1510.00149, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tautorch._layers import Layer, select_layers
from tautorch.nn.tail import kept_of
from tautorch.quantize.qparams import check_bits
from tautorch.quantize.whole import require_whole

Init = Literal["linear", "density", "random"]
# Lloyd's steps; 1-D k-means on weights settles in 20 to 150.
_STEPS = 500


class Clustered(nn.Module):
    """The parametrisation of a clustered weight: `weight = codebook[indices]`.

    The codebook, float32 [2^bits], is the layer's trained parameter `layer.parametrizations.weight.original`;
    its gradient is the sum over the weights of each cluster. The other tensors are buffers here,
    `layer.parametrizations.weight[0]`:

    - `indices`: uint8, of the weight's shape;
    - `gain`: float32 [2^bits], ones; where the weight has pruned zeros their index is 0 and gain[0] is 0,
      so that they stay zero whatever the optimizer does.
    """

    indices: Tensor
    gain: Tensor
    #: For methods that need a plain weight.
    remedy = "prune and factorise before quantize.cluster, or call quantize.finalize first"

    def __init__(self, indices: Tensor, codebook: Tensor, held_zero: bool) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        gain = torch.ones_like(codebook)
        if held_zero:
            gain[0] = 0.0
        self.register_buffer("gain", gain)
        self._first: Tensor | None = codebook

    def forward(self, codebook: Tensor) -> Tensor:
        """The weight."""
        flat = torch.index_select(codebook * self.gain, 0, self.indices.flatten().int())
        return flat.reshape(self.indices.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook nearest to a weight that is assigned to the layer: the mean of each cluster."""
        if self._first is not None:
            first, self._first = self._first, None
            return first.to(weight)
        index, values = self.indices.flatten().long(), weight.detach().double().flatten()
        entries = self.gain.numel()
        count = torch.bincount(index, minlength=entries)
        total = torch.bincount(index, values, minlength=entries)
        return (total / count.clamp(min=1)).to(weight)


def cluster(
    model: nn.Module,
    bits: int = 5,
    layers: Iterable[str] | None = None,
    init: Init = "linear",
    seed: int = 0,
) -> nn.Module:
    """Make the weights of each layer share 2^bits values, found by k-means and trained from then on.

    Deep Compression: Han et al. 2016, arXiv:1510.00149, section 3. In place; each layer's weight becomes the
    parametrisation `Clustered`, whose codebook is what an optimizer made afterwards trains. Exact zeros
    (pruned weights) are left out of the k-means and stay zero; they take one of the 2^bits values. See
    `codebooks` for reading the result and `finalize` for plain weights.

    Args:
        bits: 2 to 8.
        layers: names or shell patterns; None takes every Linear and Conv2d that owns its weight alone. Call
            it once for each number of bits.
        init: first centroids evenly over the range ("linear", which keeps the large weights and is the
            paper's choice), at even shares of the weights ("density"), or at drawn weights ("random", by
            `seed`). A cluster that runs empty is put where the error is largest.

    Raises ValueError for bits or init out of range, layers as in `prune`, and a weight with NaN or Inf; the
    model is then as it was.
    """
    check_bits("cluster", bits, least=2)
    require_whole("cluster", model)
    if init not in get_args(Init):
        raise ValueError(f"cluster: init must be one of {', '.join(get_args(Init))}, got {init!r}")
    targets = select_layers("cluster", model, layers)
    found = {name: _clustered(name, layer, bits, init, seed) for name, layer in targets.items()}
    for name, made in found.items():
        parametrize.register_parametrization(targets[name], "weight", made)
    return model


def clustered(layer: nn.Module) -> Clustered | None:
    """The `Clustered` of a layer's weight, None where it has none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # type: ignore[index]
    return first if isinstance(first, Clustered) else None


def codebooks(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(codebook float32 [2^bits], indices uint8 of the weight's shape) of each clustered layer, by name.

    `codebook[indices]` is the weight. Pruned weights have index 0 and codebook[0] = 0.
    """
    found = {}
    for name, module in model.named_modules():
        part = clustered(module)
        if part is not None:
            codebook = module.parametrizations["weight"].original
            found[name] = ((codebook.detach() * part.gain).float(), part.indices)
    return found


def _clustered(name: str, layer: Layer, bits: int, init: Init, seed: int) -> Clustered:
    weight = layer.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"cluster: the weight of layer {name!r} must be finite, got NaN or Inf")
    flat = weight.double().flatten()
    kept = kept_of(layer)
    pruned = kept is not None
    alive = torch.ones_like(flat, dtype=torch.bool) if kept is None else kept.flatten()
    values = flat[alive] if pruned else flat
    count = 2**bits - pruned
    centroids = kmeans(values, count, init, seed).float()
    index = torch.bucketize(values, (centroids[1:].double() + centroids[:-1].double()) / 2)
    codebook = torch.cat([centroids.new_zeros(int(pruned)), centroids]).to(weight.dtype)
    indices = torch.zeros(flat.numel(), dtype=torch.uint8, device=weight.device)
    indices[alive] = (index + pruned).to(torch.uint8)
    return Clustered(indices.reshape(weight.shape), codebook, pruned)


def kmeans(values: Tensor, count: int, init: Init = "linear", seed: int = 0) -> Tensor:
    """`count` ascending centroids of 1-D `values`, float64: Lloyd's steps to a fixed point.

    On sorted values with prefix sums a step costs count logarithms, so the steps cost less than the sort.
    Values fewer than the centroids are all centroids, the last repeated; no values give zeros.
    """
    x = values.double().sort().values
    distinct = torch.unique_consecutive(x)
    if distinct.numel() <= count:
        last = distinct[-1:] if distinct.numel() else distinct.new_zeros(1)
        return torch.cat([distinct, last.expand(count - distinct.numel())])
    centroids = _first_centroids(x, distinct, count, init, seed)
    prefix = torch.nn.functional.pad(x.cumsum(0), (1, 0))
    squares = torch.nn.functional.pad(x.square().cumsum(0), (1, 0))
    before: Tensor | None = None
    for _ in range(_STEPS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        inner = torch.searchsorted(x, middles)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), x.numel())])
        if before is not None and torch.equal(edges, before):
            break
        before = edges
        size = edges.diff()
        total = prefix[edges].diff()
        mean = torch.where(size > 0, total / size.clamp(min=1), centroids)
        if not bool((size > 0).all()):
            error = squares[edges].diff() - total * mean
            _reseed(mean, size, error, edges, x)
            before = None
        centroids = mean.sort().values
    return centroids


def _first_centroids(x: Tensor, distinct: Tensor, count: int, init: Init, seed: int) -> Tensor:
    if init == "linear":
        return torch.linspace(float(x[0]), float(x[-1]), count, dtype=torch.float64, device=x.device)
    if init == "density":
        place = (torch.arange(count, device=x.device) + 0.5) * (x.numel() / count)
        return x[place.long().clamp(max=x.numel() - 1)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(distinct.numel(), generator=generator)[:count]
    return distinct[chosen.to(x.device)].sort().values


def _reseed(mean: Tensor, size: Tensor, error: Tensor, edges: Tensor, x: Tensor) -> None:
    """Each empty centroid goes to the value farthest from its mean in one of the clusters that err most."""
    empty = (size == 0).nonzero().flatten()
    for hole, worst in zip(empty.tolist(), error.argsort(descending=True).tolist(), strict=False):
        low, high = x[edges[worst]], x[edges[worst + 1] - 1]
        mean[hole] = low if mean[worst] - low > high - mean[worst] else high

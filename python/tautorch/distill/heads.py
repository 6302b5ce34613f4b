"""A light classifier head in the place of a heavy one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tautorch import distributed
from tautorch._batches import Batches, own_copy, run_calibration
from tautorch._layers import other_forward, replace_layers
from tautorch.distill.arguments import whole
from tautorch.factorize.svd import Svd

# Of the mean variance of the inputs: a solution exists where some are constant or repeat others.
_RIDGE = 1e-6


class MeanPool(nn.Module):
    """[B, channels]: the mean over all that belongs to a channel of [B, C * positions] or [B, C, ...]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = whole("MeanPool", "channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        """The means; ValueError where the features do not divide into the channels."""
        if x.dim() < 2 or x[0].numel() % self.channels:
            raise ValueError(
                f"light_head: features must be [B, {self.channels} * positions], got {list(x.shape)}"
            )
        return x.reshape(x.shape[0], self.channels, -1).mean(-1)

    def extra_repr(self) -> str:
        """The setting."""
        return f"channels={self.channels}"


def light_head(
    model: nn.Module,
    name: str,
    calibration: Batches | None = None,
    *,
    rank: int | None = None,
    channels: int | None = None,
) -> nn.Module:
    """Replace the head `name` of `model` by a light one that starts close to it; returns the model.

    The new head is one linear layer, on the features as they are or, with `channels`, on their means over all
    positions (for a head on flattened feature maps, most of whose weights tell positions apart); with `rank`
    it is two layers with a bottleneck. It starts as the least-squares fit of the old head's outputs on the
    calibration inputs, cut to the rank that keeps most of them (reduced-rank regression, Izenman 1975).
    Without calibration the old head must be an nn.Linear, whose weight is cut by plain SVD.

    Distil it afterwards: keep a copy of the model as the teacher and train at least
    `model.get_submodule(name).parameters()` with `Distiller` and `SoftTarget`.

    Args:
        model: changed in place, in eval mode while the calibration runs; as it was if anything fails.
        name: of the head: any module from one tensor [..., K] to logits [..., N].
        calibration: batches of the model's inputs, at least as many rows as the new head has inputs, K; with
            several ranks, each its own share. What is gathered takes 8 K^2 bytes.
        rank: of the bottleneck, < min(inputs, N).
        channels: the number of channels of the features, whose positions come last.

    Raises ValueError for a name that is not there, settings that make nothing lighter, and features that do
    not fit; TypeError for a head whose input or output is no tensor.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in modules:
        shown = ", ".join([key for key in modules if key][-6:])
        raise ValueError(f"light_head: name must be of a module, got {name!r}; the model ends with {shown}")
    head = modules[name]
    for setting, value in (("rank", rank), ("channels", channels)):
        if value is not None:
            whole("light_head", setting, value)
    if calibration is None:
        more = other_forward(head)
        if more is not None:
            raise ValueError(f"light_head: calibration must be given for layer {name!r}: {more}")
        if not isinstance(head, nn.Linear) or rank is None or channels is not None:
            raise ValueError(
                "light_head: calibration must be given unless an nn.Linear head gets a rank, got "
                f"{type(head).__name__}, rank={rank}, channels={channels}"
            )
        weight, bias = head.weight.detach().double(), None if head.bias is None else head.bias.detach()
        covariance = None
    else:
        moments = _moments(model, head, calibration, channels)
        weight, bias, covariance = moments.fit()
    layers = _layers(weight, bias, covariance, rank)
    if covariance is not None and rank is not None:
        # The bias makes good for what the cut does to the mean.
        layers[-1].bias.data = moments.bias_of(layers[1].weight.data @ layers[0].weight.data)
    made = nn.Sequential(*([] if channels is None else [MeanPool(channels)]), *layers)
    like = next(head.parameters(), next(model.parameters()))
    made.to(like.device, like.dtype)
    old, new = (sum(p.numel() for p in module.parameters()) for module in (head, made))
    if new >= old:
        raise ValueError(
            f"light_head: rank and channels must make the head lighter, got {new} for {old} weights"
        )
    replace_layers(model, {name: made})
    return model


def _layers(
    weight: Tensor, bias: Tensor | None, covariance: Tensor | None, rank: int | None
) -> list[nn.Linear]:
    """One linear layer, or two with a bottleneck, of a weight [N, K]; float64."""
    outputs, inputs = weight.shape
    if rank is None:
        factors = [weight]
    else:
        if rank >= min(inputs, outputs):
            raise ValueError(
                f"light_head: rank must be below inputs and outputs, {inputs} and {outputs}, got {rank}"
            )
        gram = None if covariance is None else covariance[None]
        down, up = Svd(weight[None], gram).factors(rank)
        factors = [down[0], up[0]]
    layers = []
    for i, factor in enumerate(factors):
        last = i == len(factors) - 1
        # skip_init draws no random numbers, so that a seeded run stays the same.
        layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, factor.shape[1], factor.shape[0], bias=last and bias is not None, dtype=torch.float64
        )
        layer.weight.data = factor.contiguous()
        layers.append(layer)
    if bias is not None:
        layers[-1].bias.data = bias.double()
    return layers


class _Moments:
    """First and second moments of a head's inputs x [rows, K] and outputs y [rows, N], in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        rows = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        new = {"rows": rows, "x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y}
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in new.items()}

    def share(self) -> bool:
        """Add up what the ranks have seen; whether any has seen a row."""
        self._sums = distributed.sum_over_ranks(self._sums)
        return bool(self._sums)

    def fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight [N, K], bias [N], covariance [K, K]) of the least-squares map from x to y."""
        mean_x, mean_y, xx, xy = (self._sums[name] / self._sums["rows"] for name in ("x", "y", "xx", "xy"))
        covariance = xx - torch.outer(mean_x, mean_x)
        ridge = _RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = covariance + ridge * torch.eye(len(covariance), dtype=xx.dtype, device=xx.device)
        weight = torch.linalg.solve(damped, xy - torch.outer(mean_x, mean_y)).T
        return weight, self.bias_of(weight), covariance

    def bias_of(self, weight: Tensor) -> Tensor:
        """The best bias for a weight."""
        return (self._sums["y"] - weight @ self._sums["x"]) / self._sums["rows"]


def _moments(model: nn.Module, head: nn.Module, calibration: Batches, channels: int | None) -> _Moments:
    moments, pool = _Moments(), None if channels is None else MeanPool(channels)
    given: tuple[Any, ...] = ()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal given
        given = own_copy(args)  # the head may begin with ReLU(inplace=True)

    def hook(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        args = given
        if not args or not all(isinstance(v, Tensor) and v.is_floating_point() for v in (args[0], output)):
            got = f"{type(args[0]).__name__ if args else 'nothing'} to {type(output).__name__}"
            raise TypeError(f"light_head: the head must map one float tensor to another, got {got}")
        x = (args[0] if pool is None else pool(args[0])).double()
        x, y = x.reshape(-1, x.shape[-1]), output.double().reshape(-1, output.shape[-1])
        if len(x) != len(y):
            raise ValueError(
                f"light_head: the head must give one row per row of features, got {list(output.shape)} for "
                f"{list(args[0].shape)}; set channels="
            )
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ValueError("light_head: calibration must give finite features, got NaN or Inf")
        moments.add(x, y)

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(hook)]
    failure: Exception | None = None
    try:
        run_calibration("light_head", model, calibration)
    except Exception as error:
        failure = error
    finally:
        for handle in handles:
            handle.remove()
    distributed.raise_together(failure)
    if not moments.share():
        raise ValueError("light_head: calibration must reach the head, got no call of it")
    return moments

"""Bias correction: quantising shifts the mean of a layer's outputs, and the bias takes the shift back.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv:1906.04721,
section 4.2 and appendix D (empirical).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tautorch import distributed
from tautorch._batches import Batches, check_batches, run_calibration
from tautorch._layers import select_layers
from tautorch.nn import PackedModule
from tautorch.quantize.whole import require_whole


def correct_bias(
    model: nn.Module, original: nn.Module, batches: Batches, layers: Iterable[str] | None = None
) -> nn.Module:
    """Add E[W x] - E[Q(W) Q(x)] of each output channel to the biases of the quantised `model`, in place.

    Nagel et al. 2019, arXiv:1906.04721: means over `batches`, layer by layer in the order they run, each with
    the layers before it quantised and corrected; one run of the model for each layer. A layer without a bias
    gets one where its mean has moved.

    Args:
        model: `original` with layers quantised: compiled ones, or float ones on a grid (`gptq`, `finalize`).
        original: the float model, such as a deepcopy taken before; not changed.
        batches: what both take; no spent generator. Under `torch.distributed` each rank gives its own.
        layers: names or shell patterns of the original's Linear and Conv2d; None takes all that run and are
            not plain layers with the original's weight.

    Raises ValueError/TypeError for layers that do not exist or never run, an activation already fused into a
    layer (correct before `fuse`), an empty calibration and outputs with NaN or Inf; the model is then as it
    was.
    """
    check_batches("correct_bias", batches)
    require_whole("correct_bias", model)
    held = list(batches)
    targets = _targets(model, original, layers)
    wanted = _means(original, {name: original.get_submodule(name) for name in targets}, held)
    missing = [name for name in targets if name not in wanted]
    if missing and (layers is not None or not wanted):
        raise ValueError(
            f"correct_bias: batches must reach layer {missing[0]!r}; leave it out of layers=[...]"
        )
    saved: list[tuple[nn.Module, Tensor | None, Tensor | None]] = []
    try:
        for name, mean in wanted.items():  # in the order they ran
            layer = targets[name]
            found = _means(model, {name: layer}, held)
            if name not in found:
                raise ValueError(
                    f"correct_bias: batches must reach layer {name!r} of the quantised model too"
                )
            bias = layer._parameters["bias"]
            saved.append((layer, bias, None if bias is None else bias.detach().clone()))
            _add(layer, mean - found[name])
    except BaseException:
        with torch.no_grad():
            for changed, parameter, values in reversed(saved):
                if parameter is not None and values is not None:
                    parameter.copy_(values)
                elif changed._parameters["bias"] is not None:
                    _set(changed, None)
        raise
    return model


def _targets(model: nn.Module, original: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    theirs = select_layers("correct_bias", original, layers)
    mine = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, old in theirs.items():
        layer = mine.get(name)
        if layer is None or "bias" not in layer._parameters:
            if layers is None:
                continue
            kind = "nothing" if layer is None else type(layer).__name__
            raise ValueError(
                f"correct_bias: layer {name!r} of the quantised model must have a bias, got {kind}"
            )
        if getattr(layer, "activation", "none") != "none":
            raise ValueError(
                f"correct_bias: layer {name!r} must not have an activation fused yet, got "
                f"{layer.activation!r}; correct the bias before fuse"
            )
        same = type(layer) is type(old) and torch.equal(layer.weight, old.weight)
        if layers is not None or not same:
            found[name] = layer
    if not found:
        raise ValueError("correct_bias: the model must have a quantised layer of the original's, got none")
    return found


def _means(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]) -> dict[str, Tensor]:
    """The mean output of each channel of each layer that runs, float64 [O], in the order they first ran."""
    total: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}

    def watch(name: str, images: bool) -> Any:
        def hook(layer: nn.Module, args: Any, out: Tensor) -> None:
            if not bool(torch.isfinite(out).all()):
                raise ValueError(f"correct_bias: layer {name!r} must give finite outputs, got NaN or Inf")
            rows = (out.movedim(-3, -1) if images else out).detach().double()
            rows = rows.reshape(-1, rows.shape[-1])
            total[name] = total.get(name, 0.0) + rows.sum(0)
            count[name] = count.get(name, 0) + torch.tensor(float(rows.shape[0]), dtype=torch.float64)

        return hook

    handles = [
        layer.register_forward_hook(watch(name, hasattr(layer, "kernel_size")))
        for name, layer in layers.items()
    ]
    failure: Exception | None = None
    try:
        run_calibration("correct_bias", model, batches)
    except Exception as error:
        failure = error
    finally:
        for handle in handles:
            handle.remove()
    distributed.raise_together(failure)
    sums = distributed.sum_over_ranks(total)
    counts = distributed.sum_over_ranks(count)
    return {name: sums[name] / counts[name] for name in sums if bool(counts[name] > 0)}


def _add(layer: nn.Module, shift: Tensor) -> None:
    bias = layer._parameters["bias"]
    if bias is not None:
        with torch.no_grad():
            bias.add_(shift.to(bias))
    elif bool((shift != 0).any()):
        weight = layer._parameters.get("weight")
        dtype = torch.float32 if weight is None else weight.dtype
        _set(layer, nn.Parameter(shift.to(dtype), requires_grad=weight is not None and weight.requires_grad))


def _set(layer: nn.Module, bias: nn.Parameter | None) -> None:
    if isinstance(layer, PackedModule):
        layer.unpack_()  # its plans hold the bias; the next call makes them anew
    layer.bias = bias  # type: ignore[assignment]

"""Latency and size of the demo's stages: every peer at its best, and in turns with the product."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tautorch.compress import Speedup
from tautorch.timing import compare

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def float_bytes(model: nn.Module) -> int:
    """Bytes of the model's tensors as one safetensors file."""
    return len(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))


def stored_parameters(model: nn.Module) -> int:
    """Parameters that are not zero: what a file has to hold."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def runner(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A call to time; inference mode is entered once around the timing, not in here."""
    return lambda: model(images)


def best_format(model: nn.Module, images: Tensor, seconds: float) -> tuple[nn.Module, str]:
    """A copy of the float model in the memory format it is fastest in at this batch, and its name."""
    copies = {name: copy.deepcopy(model) for name in FORMATS}
    for name, twin in copies.items():
        twin.to(memory_format=FORMATS[name])  # type: ignore[call-overload]
    first, second = copies.items()
    with torch.inference_mode():
        inputs = [images.contiguous(memory_format=FORMATS[name]) for name in copies]
        found = compare(runner(first[1], inputs[0]), runner(second[1], inputs[1]), seconds=seconds)
    name, fastest = second if found.ratio > 1 else first
    return fastest, name


def time_stages(
    peers: Mapping[str, nn.Module],
    product: tuple[str, nn.Module],
    images: Tensor,
    batches: Sequence[int],
    seconds: float,
    advance: Callable[[], object],
) -> tuple[dict[str, dict[int, float]], list[Speedup], dict[str, str]]:
    """Time the product against every peer at every batch size.

    Args:
        peers: float models by name; each runs in the memory format that is its fastest at each batch size.
        product: name and compiled model, in channels-last.
        images: at least as many as the largest batch.
        batches: batch sizes.
        seconds: about how long one comparison takes.
        advance: called after each comparison.

    Returns:
        Seconds per call by name and batch, the comparisons, and the memory formats of each peer.
    """
    name, model = product
    latency: dict[str, dict[int, float]] = {key: {} for key in (*peers, name)}
    speedups: list[Speedup] = []
    formats: dict[str, str] = {}
    for batch in batches:
        compiled = runner(model, images[:batch].contiguous(memory_format=torch.channels_last))
        own: list[float] = []
        for peer, float_model in peers.items():
            fastest, form = best_format(float_model, images[:batch], seconds / 2)
            inputs = images[:batch].contiguous(memory_format=FORMATS[form])
            with torch.inference_mode():
                found = compare(runner(fastest, inputs), compiled, seconds=seconds)
            latency[peer][batch] = found.a_s
            own.append(found.b_s)
            speedups.append(Speedup(name, peer, batch, found.ratio, found.ratio_low, found.ratio_high))
            formats[f"{peer}, batch {batch}"] = form
            advance()
        latency[name][batch] = sorted(own)[len(own) // 2]
    return latency, speedups, formats

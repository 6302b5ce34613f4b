"""Static ranges of the inputs of layers, from calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from tautorch import distributed
from tautorch._batches import Batches, observe_inputs, require_seen
from tautorch._layers import Layer, select_layers
from tautorch.quantize.observers import Kl, MinMax, Mse, Observer, Percentile
from tautorch.quantize.qparams import QParams

OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": Mse,
    "kl": Kl,
}


def calibrate(
    model: nn.Module,
    batches: Batches,
    observer: str | Callable[[], Observer] = "mse",
    layers: Iterable[str] | None = None,
    symmetric: bool = False,
) -> dict[str, QParams]:
    """The static scale and zero point of the input of each Linear and Conv2d, by qualified name.

    Args:
        model: run over `batches` in eval mode; it is not changed, but for what its own forward writes into
            buffers of over 64 MB, or into lists and other objects.
        batches: batches of what the model takes. Under `torch.distributed` each rank gives its own, and all
            get the parameters of the whole.
        observer: "minmax", "percentile" (99.99 %), "mse", "kl", or a callable that makes an `Observer`, such
            as `functools.partial(Percentile, 99.9)`.
        layers: names or shell patterns. None takes every layer that owns its weight alone, and leaves out
            those that never ran; a named layer that never ran is a ValueError.
        symmetric: zero point 0.

    Raises ValueError for an unknown observer, an empty calibration, and NaN or Inf in a layer's input.
    """
    targets = select_layers("calibrate", model, layers)
    found = input_ranges("calibrate", model, batches, targets, observer, symmetric)
    require_seen("calibrate", targets, set(found), named=layers is not None)
    return found


def input_ranges(
    op: str,
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, Layer],
    observer: str | Callable[[], Observer] = "mse",
    symmetric: bool = False,
) -> dict[str, QParams]:
    """What `calibrate` returns, of these layers; those that never ran are left out. `op` is for messages."""
    if isinstance(observer, str) and observer not in OBSERVERS:
        raise ValueError(
            f"{op}: observer must be one of {', '.join(OBSERVERS)} or make one, got {observer!r}"
        )
    make = OBSERVERS[observer] if isinstance(observer, str) else observer
    observers: dict[str, Observer] = {}

    def see(name: str, layer: Layer, x: Tensor) -> None:
        if name not in observers:
            observers[name] = make()
        observers[name].observe(x)

    seen = observe_inputs(op, model, layers, batches, see)
    found: dict[str, QParams] = {}
    for name in (name for name in layers if name in seen):
        mine = observers[name] if name in observers else make()
        if distributed.active():
            mine.all_reduce()
        found[name] = mine.qparams(symmetric)
    return found

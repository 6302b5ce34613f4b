"""What the operators' CUDA paths share: facts of the device, and what is made of a weight once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tautorch.reference.quantizer import MAX_K_LOWEST

from . import caches, tails
from . import geometry as conv

_lowest = caches.PackCache()
_sums = caches.PackCache()
_captured: dict[int, Tensor] = {}  # by id: graphs go on reading these after their weights were packed anew


@functools.lru_cache(maxsize=64)
def facts(index: int) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors of a device."""
    p = torch.cuda.get_device_properties(index)
    return p.major * 10 + p.minor, p.multi_processor_count


def details(index: int, **more: object) -> dict[str, object]:
    """Of a problem: the facts of its device, and ``more``."""
    capability, multiprocessors = facts(index)
    return {"capability": capability, "multiprocessors": multiprocessors, **more}


def check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    """The kernels read all of these on x's device, where their values cannot be checked."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {t.device}; move it there")


def check_tail_devices(op: str, x: Tensor, tail: tails.Tail) -> None:
    """The same of a call's scales and zero points."""
    check_devices(
        op,
        x,
        x_scale=tail.x_scale,
        x_zero_point=tail.x_zero_point,
        out_scale=tail.out_scale,
        out_zero_point=tail.out_zero_point,
    )


def refuse_pack(op: str, name: str, t: Tensor | None) -> None:
    """ValueError for a CPU pack."""
    if t is not None and t.dtype == torch.uint8:
        raise ValueError(f"{op}: {name} must be canonical on CUDA, got a pack; CPU packs do not run there")


def check_lowest(op: str, name: str, weight: Tensor, k: int) -> None:
    """ValueError for weights of -128 where int32 sums of ``k`` products could overflow.

    A weight is looked at once, which waits for the device, and only where ``k`` is that long.
    """
    if k <= MAX_K_LOWEST or weight.dtype != torch.int8:
        return
    if torch.cuda.is_current_stream_capturing() and _lowest.peek(weight, k) is None:
        raise ValueError(
            f"{op}: {name} of K={k} is checked at the first call with it, which a graph cannot capture; "
            "call the layer once before capturing (tautorch.warmup)"
        )

    def look() -> Tensor:
        if bool((weight == -128).any()):
            raise ValueError(
                f"{op}: {name} must be in [-127, 127] where K is above {MAX_K_LOWEST}, got -128 with K={k}; "
                "clamp it to -127 or split the layer"
            )
        return weight.new_empty(0)

    _lowest.get(weight, k, look)


def adjacent(t: Tensor) -> Tensor:
    """A vector with adjacent elements."""
    return t.detach().contiguous()


def contiguous(t: Tensor | None) -> Tensor | None:
    """The same, or None."""
    return None if t is None else adjacent(t)


def row_sums(weight: Tensor) -> Tensor:
    """int32 sums of an int8 weight's rows, for the zero point. Made once."""
    return once(_sums, weight, lambda: weight.detach().flatten(1).sum(1, dtype=torch.int32))


def keywords(tail: tails.Tail) -> dict[str, Any]:
    """A call's tail as the Triton kernels' launchers take it."""
    arguments = tail._asdict()
    del arguments["weight_only"]
    arguments["x_scale"] = contiguous(tail.x_scale)
    return arguments


def as_images(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` of that or of ``[C, H, W]``."""
    return x if x.dim() == 4 else x.unsqueeze(0)


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Outputs for ``as_images(x)`` in the memory format and with the dimensions of x."""
    last = conv.channels_last(as_images(x))
    y = y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return y if x.dim() == 4 else y.squeeze(0)


def once(
    cache: caches.PackCache,
    weight: Tensor,
    make: Callable[[], Tensor],
    key: object = "cuda",
    also: Sequence[Tensor | None] = (),
) -> Tensor:
    """What ``make`` makes of ``weight`` (and ``also``), remembered, and safe to read from any stream."""
    if torch.cuda.is_current_stream_capturing():
        # What a graph makes exists only after its replay, so it is not remembered.
        found = cache.peek(weight, key, also)
        if found is None:
            return make()
        return _captured.setdefault(id(found), found)

    def finished() -> Tensor:
        made = make()
        torch.cuda.current_stream(weight.device).synchronize()
        return made

    found = cache.get(weight, key, finished, also)
    found.record_stream(torch.cuda.current_stream(weight.device))
    return found

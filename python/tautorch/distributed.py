"""Helpers for more than one process: each does nothing, at no cost, where `torch.distributed` is not in use.

Every rank calls them, in the same order. What calibrates or prunes in this package goes through them, so that
each rank sees its own share of the batches and all end with the same scales and masks. To work on one rank
alone in a distributed job, open `with local():` there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "active",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast_tensors",
    "broadcast_value",
    "full_tensor",
    "is_main",
    "is_sharded",
    "local",
    "local_part",
    "local_tensor",
    "main_process_only",
    "raise_together",
    "rank",
    "reshard",
    "shard_like",
    "sum_over_ranks",
    "union",
    "world_size",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

_alone = 0


@contextmanager
def local() -> Iterator[None]:
    """While open, this process works as if it were the only one: nothing is exchanged."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def active() -> bool:
    """Whether there are other ranks to talk to."""
    return _alone == 0 and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """How many processes there are, 1 where it is alone."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes files."""
    return rank() == 0


def main_process_only(function: _F) -> _F:
    """A decorator: the function runs on rank 0 and is skipped (None) on the others."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if is_main() else None

    return cast(_F, wrapped)


def barrier() -> None:
    """Wait until every rank is here."""
    if active():
        all_reduce(torch.zeros(1))


def all_reduce(value: Tensor, how: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """The sum, maximum or minimum of `value` over the ranks, bit for bit the same on each; a new tensor.

    Sums are made in the dtype given: pass float64 for statistics.
    """
    if not active():
        return value.clone()
    sent = value.detach().to(_device(), copy=True).contiguous()
    dist.all_reduce(sent, _OPS[how])
    return sent.to(value.device)


def sum_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum each named tensor over the ranks that have it; every rank gets all the names, in one order."""
    if not active():
        return dict(values)
    mine = {name: (value.shape, value.dtype) for name, value in values.items()}
    forms: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for theirs in all_gather(mine):
        forms |= {name: form for name, form in theirs.items() if name not in forms}
    device = next((value.device for value in values.values()), _device())
    summed: dict[str, Tensor] = {}
    for name, (shape, dtype) in forms.items():
        own = values.get(name)
        summed[name] = all_reduce(torch.zeros(shape, dtype=dtype, device=device) if own is None else own)
    return summed


def union(names: Iterable[str]) -> set[str]:
    """The names that any rank has."""
    return set().union(*all_gather(sorted(names)))


def all_gather(value: _T) -> list[_T]:
    """Each rank's `value` (anything that pickles), by rank."""
    if not active():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_value(value: _T) -> _T:
    """Rank 0's `value` (anything that pickles), on every rank."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor (a mask, a buffer) with rank 0's, in place."""
    if not active():
        return
    with torch.no_grad():
        for tensor in tensors:
            # Bool is not among what every backend sends.
            kind = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
            sent = tensor.detach().to(_device(), kind, copy=True).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def raise_together(error: Exception | None) -> None:
    """Raise `error` if there is one, and RuntimeError on the ranks that have none while another has.

    Without it a rank that fails leaves the others waiting for it in their next exchange.
    """
    if not active():
        if error is not None:
            raise error
        return
    messages = all_gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {other} failed: {message}")


def is_sharded(what: Tensor | nn.Module) -> bool:
    """Whether a tensor, or any parameter of a module, is a DTensor, as `fully_shard` makes them."""
    if isinstance(what, nn.Module):
        return any(_is_dtensor(parameter) for parameter in what.parameters())
    return _is_dtensor(what)


def reshard(model: nn.Module) -> None:
    """Let go of the whole weights that `fully_shard` keeps after a forward pass without a backward.

    Until then `layer.weight` is a gathered copy, and what is written to it is lost.
    """
    for module in model.modules():
        release: Any = getattr(module, "reshard", None)
        if release is not None and hasattr(module, "set_requires_gradient_sync"):
            release()


def full_tensor(value: Tensor) -> Tensor:
    """All of a sharded tensor, gathered on each rank (detached); any other tensor as it is."""
    if not _is_dtensor(value):
        return value
    whole: Tensor = value.full_tensor()
    return whole.detach()


def local_tensor(value: Tensor) -> Tensor:
    """The part of a sharded tensor that is on this rank, sharing its memory; any other tensor as it is."""
    if not _is_dtensor(value):
        return value
    part: Tensor = value.to_local()
    return part.detach()


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of the full `value`, sharded as `like` is; `value` itself if `like` is not sharded."""
    return local_tensor(shard_like(value, like))


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """The full `value` as a tensor sharded as `like` is; `value` itself if it is one, or `like` is not."""
    if not _is_dtensor(like) or _is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # No source rank: every rank has the whole value and takes its part without a word.
    there = value.to(like.to_local().device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def _is_dtensor(value: Any) -> TypeGuard[DTensor]:
    # Its module takes half a second to import, so it is asked only once somebody else has.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _device() -> torch.device:
    """Where the backend sends from: NCCL knows GPUs only."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

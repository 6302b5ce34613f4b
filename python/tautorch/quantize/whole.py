"""What changes weights in place needs all of them here."""

from __future__ import annotations

from torch import nn

from tautorch import distributed


def require_whole(op: str, model: nn.Module) -> None:
    """ValueError for a model that `fully_shard` has spread over the ranks."""
    if distributed.is_sharded(model):
        raise ValueError(
            f"{op}: the model must be whole on each rank, got one sharded by fully_shard; call {op} before "
            "sharding, or on a model that loads the full state_dict"
        )

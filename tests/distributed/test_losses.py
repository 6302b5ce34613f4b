"""Losses that look inside, or hold weights or students of their own, on two ranks as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tautorch import distributed
from tautorch.distill import (
    AttentionTransfer,
    Distiller,
    MultiTask,
    Mutual,
    Peers,
    Regression,
    SoftTarget,
    cache_teacher,
    light_head,
)
from tautorch.distill.state import unwrapped
from tests.distributed.torchrun import on_two_ranks


class Reader(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, heads, 16, 0.0, batch_first=True)
        self.kind, self.size = nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.layer(x).mean(1)
        return {"kind": self.kind(x), "size": self.size(x)}


def batches() -> list[Any]:
    """This rank's rows of each batch of 8."""
    x = torch.arange(4 * 8 * 5 * 8, dtype=torch.float32).reshape(4, 8, 5, 8).mul(0.7).sin()
    y = (torch.arange(32) % 3).reshape(4, 8)
    rows = slice(distributed.rank(), None, distributed.world_size())
    return [(a[rows], b[rows]) for a, b in zip(x, y, strict=True)]


def fit(teacher: nn.Module | None, student: nn.Module, loss: Any, data: list[Any]) -> dict[str, Tensor]:
    wrapped = DistributedDataParallel(student) if distributed.active() else student
    optimizer = torch.optim.SGD([*wrapped.parameters(), *loss.parameters()], 0.05)
    Distiller(teacher, wrapped, loss, optimizer, progress=False).fit(data, 3)
    return {**unwrapped(wrapped).state_dict(), **{f"loss.{k}": v for k, v in loss.state_dict().items()}}


def work(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    peers = Peers([nn.Sequential(nn.Flatten(), nn.Linear(40, 3)) for _ in range(3)])
    teacher, student = Reader(4).eval(), Reader(2)
    heads = MultiTask({"kind": SoftTarget(2.0, 0.0), "size": Regression()}, weights="uncertainty")
    loss = AttentionTransfer({"layer.self_attn": "layer.self_attn"}, base=heads)
    found: dict[str, Any] = {"peers": fit(None, peers, Mutual(), batches())}
    found["taught"] = fit(teacher, student, loss, [(x, None) for x, _ in batches()])
    found["light"] = light_head(teacher, "size", [x for x, _ in batches()], rank=1).state_dict()
    if distributed.active():
        with pytest.raises(ValueError, match="one process must write a cache"):
            cache_teacher(teacher, [x for x, _ in batches()], folder / "cache")
    return found


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    alone = work(tmp_path)
    for rank in on_two_ranks(work, tmp_path):
        for part, expected in alone.items():
            assert rank[part].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    rank[part][name], value, atol=2e-6, rtol=2e-5, msg=f"{part} {name}"
                )

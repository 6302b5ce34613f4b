"""A rank killed in mid-epoch: torchrun starts all again, or somebody does, and they go on exactly."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tautorch import distributed
from tautorch.distill import Distiller
from tests.distributed.test_training import WRAPPERS, assert_equal, build, loader, results, score
from tests.distributed.torchrun import on_two_ranks

# Two launches of torchrun and a restart: nine processes that import torch.
pytestmark = pytest.mark.slow

EVERY, KILLED_AT = 2, 8


class Starts:
    """Writes down the step at which each attempt starts, and kills rank 1 once, before it can be saved."""

    def __init__(self, folder: Path, kill: bool) -> None:
        self.starts, self.killed, self.kill = folder / "starts", folder / "killed", kill

    def on_fit(self, run: Distiller) -> None:
        if distributed.is_main():
            with self.starts.open("a") as file:
                file.write(f"{run.global_step}\n")

    def on_step(self, run: Distiller) -> None:
        if (
            self.kill
            and run.global_step == KILLED_AT
            and distributed.rank() == 1
            and not self.killed.exists()
        ):
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(kind: str, folder: Path, kill: bool) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    run, schedule = build(kind, 0.3, folder)
    run.callbacks.append(Starts(folder, kill))
    run.fit(loader(), 4, evaluate=score, checkpoint=folder, checkpoint_every=EVERY, resume=True)
    return results(run, schedule)


def restarted(folder: Path) -> None:
    """DDP: torchrun starts both ranks again. Then FSDP2, where it may not and ends."""
    here = {kill: train("ddp", folder / f"ddp {kill}", kill) for kill in (True, False)}
    torch.save(here, folder / f"ddp{distributed.rank()}.pt")
    train("fsdp", folder / "fsdp True", kill=True)


def started_again(folder: Path) -> dict[bool, Any]:
    return {kill: train("fsdp", folder / f"fsdp {kill}", kill) for kill in (True, False)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    on_two_ranks(restarted, folder, restarts=1, fails=True)
    fsdp = on_two_ranks(started_again, folder)
    return [
        {"ddp": torch.load(folder / f"ddp{rank}.pt", weights_only=False), "fsdp": fsdp[rank]}
        for rank in range(2)
    ]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_it_costs_the_work_since_the_last_checkpoint(
    ranks: list[dict[str, Any]], folder: Path, kind: str
) -> None:
    here = folder / f"{kind} True"
    assert (here / "killed").exists()
    # Killed at step 8, before the checkpoint of that step; step 6 was also the end of an epoch.
    starts = [int(line) for line in (here / "starts").read_text().split()]
    assert starts == [0, KILLED_AT - EVERY]
    assert (here / "log.jsonl").read_text() == (folder / f"{kind} False" / "log.jsonl").read_text()
    for rank in ranks:
        assert_equal(rank[kind][True], rank[kind][False])
    assert torch.load(here / "last.pt", weights_only=True)["global_step"] == 12

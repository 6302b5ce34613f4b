"""Runs killed by SIGKILL, each in a process of its own forked from one that has torch loaded.

`python -m tests.distill.killing FOLDER` prints {point: [how it ended, steps lost, digest after resuming]}.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tautorch.distill import Distiller, JsonLog, SoftTarget
from tautorch.distill import checkpoint as checkpoints
from tautorch.prune import Schedule

EVERY = 2
STEPS = (1, 4, 5, 9, 13)
#: The n-th file written, and where in the writing of it the process dies.
WRITES = tuple((n, phase) for n in (1, 5, 9) for phase in ("half", "unsynced", "unnamed", "named"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, amp: torch.dtype, kill_step: int | None = None) -> None:
    """Up to 8 epochs of 3 steps (the last of one batch), stopped early, all of a Distiller's state in use."""
    torch.manual_seed(0)
    random.seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    student = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 4)
    )
    optimizer = torch.optim.AdamW(student.parameters(), 0.05)
    run = Distiller(
        teacher,
        student,
        SoftTarget(),
        optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
        scheduler_interval="step",
        amp=amp,
        accumulate=2,
        clip_norm=0.5,
        callbacks=[
            Schedule(student, 0.5, pattern="2:4", end=8, every=2),
            JsonLog(folder / "log.jsonl"),
            lambda run: die() if run.global_step == kill_step else None,
        ],
        progress=False,
    )
    x = torch.arange(40 * 6, dtype=torch.float32).reshape(40, 6).sin()
    loader = DataLoader(TensorDataset(x, torch.arange(40) % 4), 8, shuffle=True)
    torch.manual_seed(7)
    run.fit(
        loader,
        8,
        checkpoint=folder,
        resume=True,
        checkpoint_every=EVERY,
        evaluate=lambda model: -float(F.mse_loss(model(x), teacher(x))),
        keep_best=True,
        patience=2,
        min_delta=0.005,
    )
    torch.save([student.state_dict(), optimizer.state_dict(), run.history], folder / "end.pt")


def die_while_writing(which: int, phase: str) -> None:
    """Arrange for death in the writing of file number `which`."""
    count = 0
    save, replace = torch.save, os.replace

    def at(name: str) -> bool:
        return count == which and phase == name

    def counted_save(state: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if at("half"):
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()
        save(state, file)

    def dying_sync(number: int) -> None:
        # A killed process, unlike a machine without power, needs no sync, and it takes 15 ms.
        if at("unsynced"):
            die()

    def dying_replace(old: Any, new: Any) -> None:
        if at("unnamed"):
            die()
        replace(old, new)
        if at("named"):
            die()

    checkpoints.torch.save, checkpoints.os.fsync = counted_save, dying_sync
    checkpoints.os.replace = dying_replace


def in_a_child(work: Callable[[], Any]) -> str:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9 else str(os.WEXITSTATUS(status))


def lost_steps(folder: Path) -> int:
    """Steps done, as logged, less those in the checkpoint."""
    last, log = folder / checkpoints.LAST, folder / "log.jsonl"
    saved = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0) - saved


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    die_while_writing(0, "never")
    # What torch imports at the first step is imported once, not in each child.
    with TemporaryDirectory() as warm:
        train(Path(warm), torch.bfloat16)
    results: dict[str, Any] = {}

    def attempt(name: str, amp: torch.dtype, deadly: list[Callable[[Path], None]]) -> None:
        here = folder / name
        here.mkdir()
        ends = []
        for kill in deadly:
            ends.append((in_a_child(lambda kill=kill: kill(here)), lost_steps(here)))  # type: ignore[misc]
        ends.append((in_a_child(lambda: train(here, amp)), 0))
        log = (here / "log.jsonl").read_text()
        files = sorted(path.name for path in here.iterdir())
        results[name] = [ends, files, log]

    def writing(which: int, phase: str) -> Callable[[Path], None]:
        def work(here: Path) -> None:
            die_while_writing(which, phase)
            train(here, torch.bfloat16)

        return work

    for kind in ("bfloat16", "float16"):
        amp: torch.dtype = getattr(torch, kind)
        attempt(f"{kind} whole", amp, [])
        several = [lambda here, step=step, amp=amp: train(here, amp, step) for step in STEPS]
        attempt(f"{kind} several", amp, several)
    for step in STEPS:
        attempt(
            f"bfloat16 step {step}",
            torch.bfloat16,
            [lambda here, step=step: train(here, torch.bfloat16, step)],
        )
    for which, phase in WRITES:
        attempt(f"bfloat16 write {which} {phase}", torch.bfloat16, [writing(which, phase)])
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

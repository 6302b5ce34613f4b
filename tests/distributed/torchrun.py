"""Running a function of a test, or a script, on two ranks, as torchrun starts them (gloo, CPU)."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

ROOT = Path(__file__).parents[2]


def command(arguments: list[str], restarts: int = 0) -> list[str]:
    """The torchrun command line of a script or module, on a port of its own."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.1"),
        "--standalone",
        *arguments,
    ]


def environment() -> dict[str, str]:
    # A restart needs a store of its own: in torch 2.13's shared one gloo finds the last attempt's addresses.
    share = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, **share, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def on_two_ranks(
    work: Callable[[Path], Any], folder: Path, restarts: int = 0, fails: bool = False
) -> list[Any]:
    """What `work(folder)` returns on each rank, by rank; AssertionError with the output if a rank fails.

    With `fails` it is one if none does, and nothing is returned.
    """
    name = f"{work.__module__}:{work.__name__}"
    done = subprocess.run(
        command(["-m", "tests.distributed.torchrun", name, str(folder)], restarts=restarts),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    if fails:
        return []
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(2)]


def call(name: str, folder: Path) -> None:
    module, function = name.split(":")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = getattr(importlib.import_module(module), function)(folder)
    torch.save(result, folder / f"result{dist.get_rank()}.pt")
    dist.destroy_process_group()


def main() -> None:
    """A function (module:name, folder) or a script with its arguments."""
    name, *arguments = sys.argv[1:]
    if name.endswith(".py"):
        sys.argv = [name, *arguments]
        runpy.run_path(name, run_name="__main__")
    else:
        call(name, Path(*arguments))
    # Without the interpreter's end: a thread of gloo may still let go of a tensor then, asks for the lock of
    # an interpreter that is gone, and aborts (pytorch/pytorch#179291; seen once here, and in seven runs of
    # eight with those threads starved).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

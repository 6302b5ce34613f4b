"""One run: peers' processes, arrays handed to them, outputs checked, cases measured."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benches.peers.arena import Contestant, contest
from benches.peers.results import Case, Results, Row, make_row
from benches.peers.worker import Worker, WorkerError
from benches.peers.workers.slices import time_slice
from torch import Tensor

from tautorch import _C
from tautorch.testing.cores import Cores, settle

OFF = 0.05
"""Largest relative error (root of the mean square) of an output quantised to 8 bits."""

Say = Callable[[str], None]


class Session:
    """What all parts of a run share.

    `workers`: the peers at hand, by name. `threads` goes to them; torch has been told already.
    """

    def __init__(
        self,
        workers: dict[str, Worker],
        results: Results,
        *,
        threads: int,
        rounds: int,
        seconds: float,
        quick: bool = False,
        say: Say = print,
        only: str = "",
        cores: Cores | None = None,
    ) -> None:
        self.workers, self.results = workers, results
        self.threads, self.rounds, self.seconds, self.quick = threads, rounds, seconds, quick
        self.say, self.only, self.cores = say, only, cores or Cores()
        shared = Path("/dev/shm")  # memory, where there is one
        self._folder = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self._folder.cleanup()

    def wanted(self, name: str) -> bool:
        """Whether the case was asked for."""
        return re.search(self.only, name) is not None

    def array(self, name: str, tensor: Tensor) -> str:
        """Path of a .npy of the tensor; the next one of this name replaces it."""
        path = Path(self._folder.name) / f"{name}.npy"
        np.save(path, tensor.detach().contiguous().numpy())
        return str(path)

    def local(
        self, name: str, call: Callable[[], Any], expected: Tensor | None = None, *, kernel: str = ""
    ) -> Contestant:
        """A contestant in this process. With `expected` its output must be near; see `off`."""
        error = None if expected is None else off(call(), expected)
        self._check(name, error)
        return Contestant(name, {"": lambda s: time_slice(call, s)}, {"": kernel}, error)

    def remote(
        self, case: Case, peer: str, title: str, about: dict[str, Any], expected: Tensor, slot: str = ""
    ) -> Contestant | None:
        """A contestant in a worker, loaded and checked; None, and why in `case.lost`, where it cannot be."""
        worker = self.workers.get(peer)
        if worker is None:
            return None
        y = str(Path(self._folder.name) / "y.npy")
        try:
            slot = slot or title
            about = {**about, "threads": self.threads}
            kernels = worker.request(op="load", slot=slot, case=about, timeout=120)["variants"]
            ways, worst = {}, 0.0
            for variant in kernels:
                worker.request(op="output", slot=slot, variant=variant, path=y)
                error = off(torch.from_numpy(np.load(y)), expected)
                self._check(f"{title} ({variant})", error)
                worst = max(worst, error)
                ways[variant] = _timer(worker, slot, variant)
            return Contestant(title, ways, kernels, worst)
        except WorkerError as error:
            case.lost[title] = str(error)
            return None

    def add_remote(self, case: Case, peer: str, title: str, about: dict[str, Any], expected: Tensor) -> None:
        """`remote` among the peers of the case."""
        contestant = self.remote(case, peer, title, about, expected)
        if contestant is not None:
            case.peers.append(contestant)

    def peak(self) -> Contestant:
        """The time of one operation at the best of one core's product instructions, registers only."""
        kernel = next(isa for isa, there in _C.isas().items() if there)
        rounds = 2000
        operations = 2 * _C.peak_i8(kernel, rounds)

        def timer(seconds: float) -> list[float]:
            return [s / operations for s in time_slice(lambda: _C.peak_i8(kernel, rounds), seconds / 4)]

        return Contestant("peak", {"": timer}, {"": kernel})

    def measure(self, case: Case) -> Row:
        """Time the contestants in turns; one row more."""
        given_up = self.cores.given_up
        timed, lost = contest(case.contestants(), rounds=self.rounds, seconds=self.seconds, cores=self.cores)
        for worker in self.workers.values():
            worker.forget()
        row = make_row(case, timed, lost, self.threads)
        if self.cores.patience:
            row["shared_slices"] = self.cores.given_up - given_up
        self.results.add(row)
        self.say(line_of(row))
        return row

    @staticmethod
    def _check(name: str, error: float | None) -> None:
        if error is not None and not error <= OFF:
            raise WorkerError(f"{name}: output is off by {error:.1%} of its root mean square")


def _timer(worker: Worker, slot: str, variant: str) -> Callable[[float], list[float]]:
    def timer(seconds: float) -> list[float]:
        settle()
        reply = worker.request(op="time", slot=slot, variant=variant, seconds=seconds)
        samples: list[float] = reply["samples"]
        return samples

    return timer


def off(y: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    if y.shape != expected.shape:
        raise WorkerError(f"output has shape {list(y.shape)}, expected {list(expected.shape)}")
    y, expected = (y.dequantize() if y.is_quantized else y).double(), expected.double()
    return float((y - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def line_of(row: Row) -> str:
    """A row as one line of progress."""
    text = f"{row['part']:<7} {row['case']:<44} {row['us']:>9.1f} us {row['gops']:>6} GOPS"
    if "share" in row:
        text += f" {row['share']:>4.0%}"
    if "ratio" in row:
        text += f"  {row['ratio']:.2f}x {row['best']}"
    for target in row["targets"]:
        text += f"  [{target['what']} {target['got']:.2f}, asked {target['want']:g}: "
        text += f"{'met' if target['met'] else 'MISSED'}]"
    for name, figures in row["peers"].items():
        if "lost" in figures:
            text += f"  ({name}: {figures['lost'][:90]})"
    return text

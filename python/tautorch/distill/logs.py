"""Logs of a `Distiller`'s run, as callbacks; written on rank 0 only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tautorch import distributed

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class JsonLog:
    """One JSON object a line: {"step", "epoch", "loss", "lr", "grad_norm", "loss/NAME"...} of each step, and
    {"step", "end_of_epoch": 0, "loss", "lr", "score"...} of each epoch.

    A resumed run takes out what was logged after its checkpoint, so that the file is that of one whole run; a
    new run starts the file afresh.

    Args:
        path: of the file; its folder is made.
        every: log every so many optimizer steps.
    """

    def __init__(self, path: str | PathLike[str], every: int = 1) -> None:
        self.path = Path(path)
        self.every = _steps("JsonLog", every)
        self._kept = 0

    def on_fit(self, distiller: Any) -> None:
        """Start the file, with what a loaded checkpoint knows of it."""
        if distributed.is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            os.truncate(self.path, min(self._kept, self.path.stat().st_size))
            self._kept = 0

    def on_step(self, distiller: Any) -> None:
        """Write the step's record, if due."""
        if distiller.global_step % self.every == 0:
            self._write({"step": distiller.global_step, "epoch": distiller.epoch, **distiller.record})

    def on_epoch(self, distiller: Any) -> None:
        """Write the epoch's record."""
        record = dict(distiller.history[-1])
        self._write({"step": distiller.global_step, "end_of_epoch": record.pop("epoch"), **record})

    @distributed.main_process_only
    def _write(self, record: Mapping[str, float]) -> None:
        # JSON has no NaN and no Infinity, which a gradient norm may be in half precision.
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The length of the file, in bytes."""
        return {"bytes": self.path.stat().st_size if self.path.exists() else 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep so much of the file."""
        self._kept = int(state["bytes"])


class TensorBoardLog:
    """Scalars for TensorBoard: "train/loss", "train/lr", "train/grad_norm", "train/loss/NAME" of each step
    and "epoch/loss", "epoch/score"... of each epoch, both over the optimizer step.

    A resumed run hides what was logged after its checkpoint. Raises ImportError, when made, where tensorboard
    is not installed.

    Args:
        folder: of the event files.
        every: log every so many optimizer steps.
    """

    def __init__(self, folder: str | PathLike[str], every: int = 1) -> None:
        try:
            # An optional package, and slow to import.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoardLog: needs tensorboard: pip install tensorboard") from error
        self.folder = Path(folder)
        self.every = _steps("TensorBoardLog", every)
        self._make: type[SummaryWriter] = SummaryWriter
        self._writer: SummaryWriter | None = None

    def on_fit(self, distiller: Any) -> None:
        """Open an event file that begins after the steps done."""
        if distributed.is_main():
            step = distiller.global_step
            self._writer = self._make(str(self.folder), purge_step=step + 1 if step else None)

    def on_step(self, distiller: Any) -> None:
        """Write the step's record, if due."""
        if distiller.global_step % self.every == 0:
            self._write("train", distiller.record, distiller.global_step)

    def on_epoch(self, distiller: Any) -> None:
        """Write the epoch's record."""
        record = {name: value for name, value in distiller.history[-1].items() if name != "epoch"}
        self._write("epoch", record, distiller.global_step)

    def on_end(self, distiller: Any) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, group: str, record: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _steps(op: str, every: int) -> int:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"{op}: every must be an int >= 1, got {every!r}")
    return every

"""A progress bar with the loss."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """One task on a rich progress display: its own (True), none (False), or a caller's `Progress`."""

    def __init__(self, progress: bool | Progress, description: str, total: int | None, done: int) -> None:
        self._description, self._total, self._done = description, total, done
        self._own = progress is True
        self._display = _display() if progress is True else progress or None
        self._means: dict[str, float] = {}

    def __enter__(self) -> Bar:
        if self._display is not None:
            if self._own:
                self._display.start()
            self._task = self._display.add_task(
                self._description, total=self._total, completed=self._done, loss=""
            )
        return self

    def advance(self, description: str, record: Mapping[str, float]) -> None:
        """One step done, with its "loss" and "loss/NAME"; shown as exponential means over about 20 steps."""
        for name, value in record.items():
            if name.startswith("loss"):
                key = name.removeprefix("loss/")
                self._means[key] = 0.95 * self._means.get(key, value) + 0.05 * value
        if self._display is not None:
            shown = " ".join(f"{name} {mean:.4f}" for name, mean in self._means.items())
            self._display.update(self._task, advance=1, description=description, loss=shown)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None and self._own:
            self._display.stop()


def _display() -> Progress:
    # rich takes longer to import than the whole of tautorch.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )

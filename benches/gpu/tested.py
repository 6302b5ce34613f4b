"""The test stage of ``make gpu``: pytest in a process of its own, watched.

A kernel that hangs, crashes or spoils the device's context so costs its own test: the process is ended, the
test has failed, and another process goes on with those that are left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 180.0  # seconds for one test: some compile several kernels
# Exit statuses beside pytest's own (0 to 5): the device is lost; the limit came before the last test.
LOST, LIMIT = 101, 102


class Recorder:
    """A pytest plugin: leaves out what was tried, writes each outcome, stops at the deadline.

    Tests of the device come first; among them those last that time candidates, as each compiles several
    kernels. Those that failed in an earlier run ("again") come at the end. ``running`` is a file that holds
    the name of the test that runs.
    """

    def __init__(
        self, outcomes: dict[str, str], save: Callable[[int], None], deadline: float, running: Path
    ) -> None:
        self.outcomes, self.save, self.deadline, self.running = outcomes, save, deadline, running
        self.left = 0
        self.status: int | None = None  # LOST or LIMIT, where that ended the session

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        todo = [i for i in items if self.outcomes.get(i.nodeid, "again") == "again"]
        todo.sort(
            key=lambda i: (
                i.nodeid in self.outcomes,
                i.get_closest_marker("gpu") is None,
                "measured" in i.name,
            )
        )
        config.hook.pytest_deselected(items=[i for i in items if i not in todo])
        items[:] = todo

    def pytest_collection_finish(self, session: Any) -> None:
        self.left = len(session.items)  # -k has been heeded only now
        self.save(self.left)

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.write_text(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        if report.outcome == "failed" and device_is_lost():
            self.status = LOST
            self.session.shouldstop = "the device's context is lost"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.left -= 1
        self.save(self.left)
        self.running.unlink(missing_ok=True)
        if time.monotonic() > self.deadline and self.left and self.status is None:
            self.status = LIMIT
            self.session.shouldstop = "the stage's limit"


def device_is_lost() -> bool:
    """Whether every further call would fail, whatever it is."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def watch(
    command: list[str], env: dict[str, str], deadline: float, running: Path, patience: float = PATIENCE
) -> tuple[int | None, str]:
    """Exit status of a process that notes its tests in ``running`` (None: it was ended), and its last test
    where that did not end."""
    running.unlink(missing_ok=True)
    process = subprocess.Popen(command, env=env, start_new_session=True)
    name, waited, last = "", 0.0, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            now, before = time.monotonic(), name
            name = test_of(running)
            # Where this process was stopped, the other may have been too: time that was not seen counts
            # little.
            waited = waited + min(now - last, 1.0) if name == before else 0.0
            last = now
            if now > deadline:
                return None, ""  # nothing is known about the test
            if name and waited > patience:
                return None, name
    finally:
        end(process)
    return process.returncode, test_of(running)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a leader of a session with all that it started, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_of(running: Path) -> str:
    """The test that runs, or nothing."""
    try:
        return running.read_text()
    except FileNotFoundError:
        return ""

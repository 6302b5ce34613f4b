"""The harness's side of a peer's process: requests with a time limit, and a stop while others are timed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

SERVE = Path(__file__).with_name("workers") / "serve.py"


class WorkerError(RuntimeError):
    """The worker could not do what it was asked, and goes on."""


class WorkerLost(WorkerError):
    """The worker's process ended or did not answer; the next request starts another."""


class Worker:
    """One peer in its own process, stopped (SIGSTOP) whenever it is not answering.

    Runtimes let their threads spin for a while after a call so that the next call finds them awake. That is
    theirs to use in their own slices, and would take a core away in those of others.
    """

    def __init__(self, title: str, python: Path | str, peer: Path) -> None:
        self.title = title
        self._command = [str(python), str(SERVE), str(peer)]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._left = b""

    def request(self, *, timeout: float = 60.0, **request: Any) -> dict[str, Any]:
        """The reply to one request.

        Raises:
            WorkerError: the worker says why not.
            WorkerLost: its process ended, or said nothing for `timeout` seconds and was ended.
        """
        process = self._running()
        assert process.stdin is not None
        try:
            process.send_signal(signal.SIGCONT)
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(timeout)
        except BrokenPipeError:
            line = b""
        if not line:
            raise WorkerLost(self._why_it_ended())
        process.send_signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        if not reply.pop("ok"):
            raise WorkerError(reply["error"])
        return reply

    def forget(self) -> None:
        """Let go of what was loaded; a process that ended has nothing left."""
        if self._process is not None:
            with contextlib.suppress(WorkerError):
                self.request(op="drop")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()
        self._errors.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._left = b""
            self._errors.truncate(0)
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        return self._process

    def _line(self, timeout: float) -> bytes:
        """One line of the worker, or nothing at its end; it is ended at the time limit."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        end = time.monotonic() + timeout
        while b"\n" not in self._left:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._end()
                raise WorkerLost(f"{self.title}: no answer within {timeout:g} s")
            read = os.read(pipe, 1 << 16)
            if not read:
                return b""
            self._left += read
        line, _, self._left = self._left.partition(b"\n")
        return line

    def _why_it_ended(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        self._end()
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        said = next((line for line in lines if "rror" in line or "xception" in line), "")
        return f"{self.title}: its process ended with {how}" + (
            f" ({' '.join(said.split())[:120]})" if said else ""
        )

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()  # ends a stopped process too
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None

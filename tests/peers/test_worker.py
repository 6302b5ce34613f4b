"""The protocol between the harness and a peer's process, and what comes of a process that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benches.peers.worker import Worker, WorkerError, WorkerLost

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def case(tmp_path: Path) -> dict[str, str]:
    case = {"kind": "linear"}
    for name, shape in (("x", (3, 8)), ("weight", (5, 8)), ("bias", (5,))):
        case[name] = str(tmp_path / f"{name}.npy")
        np.save(case[name], np.random.default_rng(0).random(shape, dtype=np.float32))
    return case


def test_a_case_is_loaded_checked_and_timed(worker: Worker, case: dict[str, str], tmp_path: Path) -> None:
    assert worker.request(op="version") == {"version": "0.1"}  # its print went elsewhere
    variants = worker.request(op="load", slot="a", case=case)["variants"]
    assert variants == {"fast": "fake", "slow": "fake"}
    path = str(tmp_path / "y.npy")
    worker.request(op="output", slot="a", variant="fast", path=path)
    x, weight, bias = (np.load(case[name]) for name in ("x", "weight", "bias"))
    np.testing.assert_allclose(np.load(path), x @ weight.T + bias, rtol=1e-6)
    slow = worker.request(op="time", slot="a", variant="slow", seconds=0.01)["samples"]
    fast = worker.request(op="time", slot="a", variant="fast", seconds=0.01)["samples"]
    assert len(slow) >= 2 and min(slow) >= 2e-3 and max(fast) < 2e-3
    worker.request(op="drop")
    with pytest.raises(WorkerError, match="KeyError"):
        worker.request(op="time", slot="a", variant="fast", seconds=0.01)


def test_slots_hold_cases_side_by_side(worker: Worker, case: dict[str, str], tmp_path: Path) -> None:
    other = str(tmp_path / "other.npy")
    np.save(other, np.zeros((5,), dtype=np.float32))
    worker.request(op="load", slot="a", case=case)
    worker.request(op="load", slot="b", case={**case, "bias": other})
    outputs = []
    for slot in ("a", "b"):
        worker.request(op="output", slot=slot, variant="fast", path=str(tmp_path / "y.npy"))
        outputs.append(np.load(tmp_path / "y.npy"))
    np.testing.assert_allclose(outputs[0] - outputs[1], np.tile(np.load(case["bias"]), (3, 1)), rtol=1e-5)


def test_a_refusal_is_one_line_and_the_worker_goes_on(worker: Worker, case: dict[str, str]) -> None:
    with pytest.raises(WorkerError, match=r"^ValueError: no such layer with a second line$") as caught:
        worker.request(op="load", slot="a", case={**case, "behave": "refuse"})
    assert not isinstance(caught.value, WorkerLost)
    assert worker.request(op="version") == {"version": "0.1"}


def test_a_crash_is_said_and_the_next_request_starts_anew(worker: Worker, case: dict[str, str]) -> None:
    with pytest.raises(WorkerLost, match=r"^Fake: its process ended with signal SIGABRT"):
        worker.request(op="load", slot="a", case={**case, "behave": "crash on load"})
    assert worker.request(op="load", slot="a", case=case)["variants"]


def test_silence_ends_the_process(worker: Worker, case: dict[str, str]) -> None:
    worker.request(op="version")
    with pytest.raises(WorkerLost, match=r"no answer within 0\.3 s"):
        worker.request(op="load", slot="a", case={**case, "behave": "hang"}, timeout=0.3)
    assert worker.request(op="version") == {"version": "0.1"}


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@linux
def test_the_process_is_stopped_between_requests(worker: Worker) -> None:
    worker.request(op="version")
    assert worker._process is not None
    end = time.monotonic() + 5
    while _state(worker._process.pid) != "T" and time.monotonic() < end:
        time.sleep(0.01)
    assert _state(worker._process.pid) == "T"
    assert worker.request(op="version") == {"version": "0.1"}


@linux
def test_a_stopped_process_ends_with_the_harness() -> None:
    code = (
        "import os, sys; from pathlib import Path; from benches.peers.worker import Worker\n"
        "w = Worker('Fake', sys.executable, Path('tests/peers/fake_peer.py')); w.request(op='version')\n"
        "print(w._process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    pid, end = int(done.stdout), time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if _state(pid) == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived the harness")

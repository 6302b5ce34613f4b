"""A worker whose peer is `fake_peer.py`, in this Python, and a session around it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benches.peers.results import Results, about
from benches.peers.session import Session
from benches.peers.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("Fake", sys.executable, Path(__file__).with_name("fake_peer.py"))
    yield worker
    worker.close()


@pytest.fixture
def session(worker: Worker, tmp_path: Path) -> Iterator[Session]:
    """One round, short slices; the worker stands for every peer."""
    workers = dict.fromkeys(("openvino", "onnxruntime", "deepsparse"), worker)
    results = Results(tmp_path / "results.json", about("a machine", {"fake": "0.1"}, 1, 1.0))
    session = Session(workers, results, threads=1, rounds=1, seconds=1e-3, quick=True)
    with torch.inference_mode():
        yield session
    session.close()

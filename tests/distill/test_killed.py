"""Processes killed by SIGKILL, at steps and while they write, and resumed: bit-identical to one whole run.

In the run: shuffled data, dropout, batch norm, autocast, accumulation, clipping, a scheduler, a pruning
schedule, the best weights, early stopping and a log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distill.killing import EVERY, STEPS, WRITES

ROOT = Path(__file__).parents[2]
POINTS = [
    *(f"{kind} several" for kind in ("bfloat16", "float16")),
    *(f"bfloat16 step {step}" for step in STEPS),
    *(f"bfloat16 write {which} {phase}" for which, phase in WRITES),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.distill.killing", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def end(folder: Path, name: str) -> list[Any]:
    state: list[Any] = torch.load(folder / name / "end.pt", weights_only=True)
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("point", POINTS)
def test_resume_is_exact(runs: tuple[Path, dict[str, Any]], point: str) -> None:
    folder, results = runs
    whole = f"{point.split()[0]} whole"
    *killed, last = results[point][0]
    assert [how for how, _ in killed] == ["killed"] * len(killed)
    assert killed
    assert last[0] == "0"
    # Killed in the middle of a step's callbacks, or in the writing of its checkpoint, it loses that step too.
    assert all(0 <= lost <= EVERY for _, lost in killed)
    assert same(end(folder, whole), end(folder, point))
    assert results[point][1:] == results[whole][1:], "the files left and the log"


def test_the_whole_run_stops_early_and_has_a_best(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = runs
    weights, _, history = end(folder, "bfloat16 whole")
    assert 5 <= len(history) < 8
    assert results["bfloat16 whole"][1] == ["best.pt", "end.pt", "last.pt", "log.jsonl"]
    assert same(weights, torch.load(folder / "bfloat16 whole" / "best.pt", weights_only=True))
    assert not same(weights, end(folder, "float16 whole")[0])

"""The loop of one's own trains, prunes and reports."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_training_loop.py"


def test_the_student_comes_to_agree(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = runpy.run_path(str(EXAMPLE))["main"](41)
    assert before < 0.4
    assert after > 0.7
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "attention" in lines[0]
    assert "soft" in lines[0]
    assert lines[-1].endswith("sparsity 0.50")

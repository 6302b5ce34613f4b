"""The ``tautorch`` command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tautorch import cli, dispatch
from tautorch.compress import Check, Report
from tautorch.demo import pipeline

RUNNER = CliRunner()


def test_kernels_lists_the_table() -> None:
    result = RUNNER.invoke(cli.app, ["kernels"])
    assert result.exit_code == 0
    lines = result.output.splitlines()[1:]
    assert [tuple(line.split()[:3]) for line in lines] == [
        (row.op, row.name, row.device) for row in dispatch.kernels()
    ]


def test_kernels_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dispatch.Kernel("int8_linear", "neon", "cpu", lambda problem: "this CPU is no Arm")
    monkeypatch.setattr(dispatch, "_table", [row])
    result = RUNNER.invoke(cli.app, ["kernels", "int8_linear"])
    assert "no: this CPU is no Arm" in result.output


def test_unknown_operator() -> None:
    result = RUNNER.invoke(cli.app, ["kernels", "nonsense"])
    assert result.exit_code == 2
    assert "int8_linear" in result.output and "'nonsense'" in result.output


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_demo_fails_with_a_broken_promise(
    passed: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pipeline.Settings] = []

    def run(settings: pipeline.Settings, console: Any) -> Report:
        seen.append(settings)
        return Report("digits", checks=[Check("reload", "identical", "it is", passed)])

    monkeypatch.setattr(pipeline, "run", run)
    result = RUNNER.invoke(cli.app, ["demo", "--no-timing", "--seed", "7", "--out", str(tmp_path)])
    assert result.exit_code == code, result.output
    assert seen == [pipeline.Settings(out=tmp_path, seed=7, timing=False)]
    assert ("A promise was broken" in result.output) is not passed


def test_demo_without_scikit_learn_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = RUNNER.invoke(cli.app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "pip install 'tautorch[demo]'" in result.output


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tautorch", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "kernels" in done.stdout

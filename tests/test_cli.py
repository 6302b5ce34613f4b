"""The ``tautorch`` command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import tautorch
from tautorch import bench, cli, dispatch
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


def test_kernels_on_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dispatch.Kernel("int8_linear", "avx512vnni", "cpu", lambda problem: "this CPU has no AVX512-VNNI")
    monkeypatch.setattr(dispatch, "_table", [row])
    monkeypatch.setattr(cli, "_console", lambda: Console(width=40))
    output = RUNNER.invoke(cli.app, ["kernels"]).output
    folded = "".join(line[33:] for line in output.splitlines()[1:])
    assert folded.replace(" ", "") == "no:thisCPUhasnoAVX512-VNNI", output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_without_a_gpu_says_so_first() -> None:
    lines = RUNNER.invoke(cli.app, ["kernels"]).output.splitlines()[1:]
    on_cuda = [line for line in lines if line.split()[2] == "cuda"]
    assert on_cuda and all(
        line.split(maxsplit=3)[3].strip() == "no: no CUDA device is visible" for line in on_cuda
    )


def test_version() -> None:
    result = RUNNER.invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.output == f"tautorch {tautorch.__version__}\n"
    help_text = RUNNER.invoke(cli.app, ["--help"]).output
    assert "Compress a trained PyTorch model" in help_text and "--version" in help_text


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


def no_folder(tmp_path: Path) -> Path:
    return tmp_path / "none" / "x.json"


def file_as_folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "x.json"


def folder_as_file(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("place", [no_folder, file_as_folder, folder_as_file])
def test_bench_says_before_it_measures_that_it_cannot_write(
    place: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("it measured"))
    path = place(tmp_path)
    result = RUNNER.invoke(cli.app, ["bench", "--json", str(path)])
    assert result.exit_code == 2
    assert result.output.startswith(f"cannot write {path}: ") and result.output.count("\n") == 1


def test_bench_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise AssertionError("3 is not 4")

    monkeypatch.setattr(bench, "run", wrong)
    result = RUNNER.invoke(cli.app, ["bench", "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 1 and list(tmp_path.iterdir()) == []


def test_demo_refuses_a_seed_that_no_generator_takes(tmp_path: Path) -> None:
    for seed in ("-1", str(2**32)):
        result = RUNNER.invoke(cli.app, ["demo", "--seed", seed, "--out", str(tmp_path)])
        assert result.exit_code == 2 and "--seed" in result.output


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_demo_says_before_it_trains_that_it_cannot_write(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("it trained"))
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / inside
    result = RUNNER.invoke(cli.app, ["demo", "--out", str(out)])
    assert result.exit_code == 2
    assert result.output.startswith(f"cannot write {out}: ") and result.output.count("\n") == 1


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tautorch", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "kernels" in done.stdout

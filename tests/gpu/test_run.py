"""``make gpu`` without a GPU: what each stage says, how it stops at its limit, and how it resumes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benches" / "gpu" / "run.py"


@pytest.fixture
def run(tmp_path: Path) -> ModuleType:
    """The script as a module, keeping its state elsewhere."""
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BUILD = tmp_path
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", ["build", "test", "sanitize", "bench"])
def test_each_stage_says_in_one_line_what_it_lacks(stage: str) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--stage", stage], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.startswith(f"{stage}: no CUDA device is visible") and done.stdout.count("\n") == 1


def test_the_cases_verify_what_they_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU and small: every call runs, a peer that is not there is left out with its reason."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benches.gpu import measure_packed

    monkeypatch.setattr(measure_packed, "DEVICE", "cpu")
    monkeypatch.setattr(measure_packed, "BATCH", 2)
    cases = [measure_packed.two_of_four(20, 64, 128), measure_packed.convolution((16, 32, 3, 2, 8), False)]
    cases.append(measure_packed.convolution((16, 32, 1, 1, 8), True))
    cases += [measure_packed.quantiser(4, 64, a) for a in ("rms_norm", "layer_norm", "silu_gate", "gelu")]
    for case in cases:
        assert next(iter(case.calls)) == "ours" and len(case.calls) > 1 and case.moved > 0
        for call in case.calls.values():
            call()
    assert [m.partition(":")[0] for m in cases[0].missing] == ["semi-structured bf16", "cuSPARSELt int8"]
    with pytest.raises(RuntimeError, match="differ from the float64 product"):
        measure_packed.same("x", torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float64))


def test_what_is_done_is_kept_until_the_sources_change(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = run.State()
    state.done("sanitize")["memcheck a"] = "clean"
    state.save()
    assert run.State().done("sanitize") == {"memcheck a": "clean"}
    monkeypatch.setattr(run, "source_hash", lambda: "other")
    assert run.State().done("sanitize") == {}


def test_a_row_is_clean_only_if_a_test_of_it_passed(run: ModuleType) -> None:
    passed = "PASSED tests/gpu/test_int8_linear_gpu.py::test_pack_block\n"
    assert run.verdict(0, passed, "weight_only_8") == run.IDLE
    assert run.verdict(5, "", "weight_only_8") == run.IDLE
    assert (
        run.verdict(0, passed + "PASSED t.py::test_weight_only[weight_only_8-1-1-1-dtype0]", "weight_only_8")
        == "clean"
    )
    assert run.verdict(86, passed, "") == "exit 86" and run.verdict(0, passed, "") == "clean"


@pytest.mark.parametrize(
    "name",
    [
        "python/tautorch/dispatch.py",
        "python/tautorch/nn/int8_linear.py",
        "python/tautorch/triton_kernels/tiles/nvidia-h200.json",
        "tests/triton_kernels/interpreted_int8_linear.py",
        "benches/gpu/measure.py",
        "csrc/kernels/common/cuda_status.h",
    ],
)
def test_the_sources_hash_covers(
    run: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert (ROOT / name).exists()
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("a")
    before = run.source_hash()
    (tmp_path / name).write_text("b")
    assert run.source_hash() != before


def test_a_command_past_its_limit_is_ended_with_its_children(run: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = "import subprocess, sys; print('begun', flush=True); "
    parent += f"subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert run.run_within(1.0, [sys.executable, "-c", parent], {}, tmp_path / "log") is None
    assert time.monotonic() - begin < 2.5
    time.sleep(3.0)
    assert not mark.exists() and (tmp_path / "log").read_text() == "begun\n"
    assert run.run_within(30.0, [sys.executable, "-c", "raise SystemExit(7)"], {}, tmp_path / "log") == 7


def test_tests_that_passed_are_left_out_the_next_time(run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pathlib\n"
        "log = pathlib.Path(__file__).with_name('ran')\n"
        "def note(name):\n    log.open('a').write(name + ' ')\n"
        "def test_good():\n    note('good')\n"
        "def test_bad():\n    note('bad')\n    assert False\n"
        "def test_last():\n    note('last')\n"
    )
    program = (
        "import importlib.util, pathlib, sys, time, pytest\n"
        f"spec = importlib.util.spec_from_file_location('gpu_run', {str(SCRIPT)!r})\n"
        "run = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(run)\n"
        f"run.BUILD = pathlib.Path({str(tmp_path)!r})\n"
        "recorder = run.Recorder(run.State(), time.monotonic() + float(sys.argv[1]))\n"
        f"pytest.main(['-q', '-p', 'no:cacheprovider', '-c', '/dev/null', {str(tmp_path)!r}], [recorder])\n"
        "print('LEFT', recorder.left)\n"
    )

    def once(seconds: int) -> str:
        command = [sys.executable, "-c", program, str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
        return done.stdout

    assert "LEFT 2" in once(-1), "past the limit, no second test begins"
    assert (tmp_path / "ran").read_text() == "good "
    assert "LEFT 0" in once(60)
    assert (tmp_path / "ran").read_text() == "good bad last "
    assert "LEFT 0" in once(60)
    assert (tmp_path / "ran").read_text() == "good bad last bad "

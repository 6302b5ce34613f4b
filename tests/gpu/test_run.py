"""``make gpu`` without a GPU: what each stage says, how it stops at its limit, and how it resumes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def test_an_extension_of_another_python_is_none(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the stage would pass without a test of any CUDA kernel."""
    monkeypatch.setattr(run, "PACKAGE", tmp_path)
    (tmp_path / "tautorch").mkdir()
    (tmp_path / "tautorch" / "_cuda.cpython-310-x86_64-linux-gnu.so").touch()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ImportError: not for me' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(python))
    with pytest.raises(run.Cannot, match=r"^test: .* import tautorch\._cuda \(ImportError: not for me\)"):
        run.need_extension("test")
    python.write_text("#!/bin/sh\ntest \"$2\" = 'import tautorch._cuda'\n")
    run.need_extension("test")


def test_a_build_that_cannot_be_configured_is_one_line(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "need_gpu", lambda stage, otherwise="": None)
    monkeypatch.setattr(run.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(run, "tool", lambda name: "false")
    monkeypatch.setenv("TAUTORCH_CUTLASS_DIR", "/nowhere")
    with pytest.raises(run.Cannot, match="build: cmake cannot configure it"):
        run.build(run.State(), time.monotonic() + 60, "")


def test_the_stages_need_no_installed_distribution() -> None:
    """They run the source tree as it is, by a Python in which tautorch was never installed."""
    program = (
        "from importlib import metadata\n"
        "plain = metadata.Distribution.from_name.__func__\n"
        "def from_name(cls, name):\n"
        "    if name == 'tautorch':\n        raise metadata.PackageNotFoundError(name)\n"
        "    return plain(cls, name)\n"
        "metadata.Distribution.from_name = classmethod(from_name)\n"
        "import tautorch\n"
        "print(tautorch.__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "unknown\n", done.stderr


def test_the_cases_verify_what_they_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU and small: every call runs, a peer that is not there is left out with its reason."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benches.gpu import measure_packed

    monkeypatch.setattr(measure_packed, "DEVICE", "cpu")
    monkeypatch.setattr(measure_packed, "BATCH", 2)
    cases = [measure_packed.two_of_four(20, 64, 128), measure_packed.convolution((16, 32, 3, 2, 8), False)]
    cases.append(measure_packed.convolution((16, 32, 1, 1, 8), True))
    cases.append(measure_packed.single_weights(4, 64, 128, 0.8))
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
    ours = passed + "PASSED t.py::test_weight_only[weight_only_8-1-1-1-dtype0]"
    assert run.verdict(0, ours, "weight_only_8") == "clean"
    other = "PASSED t.py::test_two_of_four[sm90a_sp24_256x128x128-1-1-1-int8]"
    assert run.verdict(0, other, "sp24_256x128") == run.IDLE
    assert run.verdict(0, other.replace("sm90a_sp24_256x128x128", "sp24_256x128"), "sp24_256x128") == "clean"
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


@pytest.fixture
def tested(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The test stage over the tests of a file, its processes as they are: what it says, and its status."""
    program = (
        "import importlib.util, pathlib, sys, pytest\n"
        f"spec = importlib.util.spec_from_file_location('gpu_run', {str(SCRIPT)!r})\n"
        "run = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(run)\n"
        f"run.BUILD = pathlib.Path({str(tmp_path)!r})\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "plain = pytest.main\n"
        f"files = ['-q', '-p', 'no:cacheprovider', '-c', '/dev/null', {str(tmp_path)!r}]\n"
        "only = lambda given: given[given.index('-k') :][:2] if '-k' in given else []\n"
        "pytest.main = lambda given, plugins: plain(files + only(given), plugins)\n"
        "sys.exit(run.main())\n"
    )
    (tmp_path / "stage.py").write_text(program)
    watch = run.watch

    def watched(command: list[str], env: dict[str, str], deadline: float, running: Path) -> object:
        command[1] = str(tmp_path / "stage.py")
        return watch(command, env, deadline, running, patience=5.0)

    monkeypatch.setattr(run, "watch", watched)
    monkeypatch.setattr(run, "need_gpu", lambda stage: None)
    monkeypatch.setattr(run, "need_extension", lambda stage: None)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def stage(source: str, *arguments: str) -> str:
        head = "import os, pathlib, signal, time\n"
        head += "def note(name):\n    pathlib.Path(__file__).with_name('ran').open('a').write(name + ' ')\n"
        (tmp_path / "test_it.py").write_text(head + source)
        (tmp_path / "ran").unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["run.py", "--stage", "test", "--limit", "120", *arguments])
        status = run.main()
        return f"{status} {capsys.readouterr().out.splitlines()[-1]}"

    return stage


def test_a_test_that_hangs_or_crashes_costs_itself_alone(tested: Callable[..., str], tmp_path: Path) -> None:
    tests = (
        "def test_hangs():\n    note('hangs')\n    time.sleep(60)\n"
        "def test_crashes():\n    note('crashes')\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def test_good():\n    note('good')\n"
    )
    assert tested(tests) == "1 test: 1 passed, 2 failed"
    assert (tmp_path / "ran").read_text() == "hangs crashes good "
    mended = tests.replace("time.sleep(60)", "pass").replace("os.kill(os.getpid(), signal.SIGSEGV)", "pass")
    assert tested(mended) == "0 test: 3 passed"
    assert (tmp_path / "ran").read_text() == "hangs crashes "
    assert tested(mended) == "0 test: 3 passed" and not (tmp_path / "ran").exists(), "what was done is kept"


def test_a_lost_device_ends_the_process_and_not_the_stage(tested: Callable[..., str], tmp_path: Path) -> None:
    """What failed is tried again in the next run, after the rest; tests of the device come first."""
    tests = (
        "import pytest, benches.gpu.tested as stage\n"
        "def test_host():\n    note('host')\n"
        "@pytest.mark.gpu\n"
        "@pytest.mark.parametrize('way', ['measured'])\n"
        "def test_all(way):\n    note(way)\n"
        "@pytest.mark.gpu\n"
        "def test_illegal():\n    note('illegal')\n    stage.device_is_lost = lambda: True\n"
        "    assert False\n"
        "@pytest.mark.gpu\n"
        "def test_next():\n    note(stage.device_is_lost.__name__)\n"
    )
    assert tested(tests) == "1 test: 3 passed, 1 failed"
    assert (tmp_path / "ran").read_text() == "illegal device_is_lost measured host "
    tests += "def test_late():\n    note('late')\n"
    assert tested(tests.replace("assert False", "pass")) == "0 test: 5 passed"
    assert (tmp_path / "ran").read_text() == "late illegal "


def test_a_word_selects_and_what_no_test_can_tell_is_an_error(
    tested: Callable[..., str], tmp_path: Path
) -> None:
    tests = "def test_one():\n    os._exit(0)\ndef test_two():\n    note('two')\ndef test_three(): pass\n"
    assert tested(tests, "--only", "two") == "0 test: 1 passed", "no test is left"
    assert tested(tests) == "1 test: 2 passed, 1 failed", "one ended its process, with status 0"
    (tmp_path / "test_bad.py").write_text("import nothing_here\n")
    assert tested(tests + "def test_four(): pass\n") == ("1 test: 2 passed; pytest ended with 2, see above")


def test_sanitizing_takes_rows_together_and_goes_on(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that fail together are looked at one by one; what is found does not stop the others."""
    asked: list[tuple[str, list[str]]] = []

    def run_within(seconds: float, command: list[str], env: dict[str, str], log: Path) -> int | None:
        select = command[command.index("-k") + 1]
        rows = [r for r in ("a", "b", "c", "d", "e") if f"<{r}>" in select]
        asked.append((command[2], rows))
        log.write_text("".join(f"PASSED t.py::test_it[<{r}>-1]\n" for r in rows if r != "e"))
        return 86 if "b" in rows else 0

    monkeypatch.setattr(run, "need_gpu", lambda stage: None)
    monkeypatch.setattr(run, "need_extension", lambda stage: None)
    monkeypatch.setattr(run.shutil, "which", lambda name: "/compute-sanitizer")
    monkeypatch.setattr(run, "run_within", run_within)
    names = [f"<{r}>" for r in "abcde"]
    monkeypatch.setattr(run, "sanitized_groups", lambda: [run.Group("t.py", "x and ({})", names)])

    def verdict(code: int, text: str, row: str) -> str:
        return f"exit {code}" if code else "clean" if row in text else str(run.IDLE)

    monkeypatch.setattr(run, "verdict", verdict)
    state = run.State()
    with pytest.raises(run.Cannot, match="memcheck <b>: exit 86; racecheck <b>: exit 86; see"):
        run.sanitize(state, time.monotonic() + 600, "")
    once = [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["d"], ["e"]]
    assert asked == [(check, rows) for check in ("memcheck", "racecheck") for rows in once]
    assert state.done("sanitize")["memcheck <e>"] == run.IDLE
    assert "memcheck <a>: clean" in capsys.readouterr().out
    asked.clear()
    with pytest.raises(run.Cannot):
        run.sanitize(state, time.monotonic() + 600, "")
    assert not asked, "what was found is said again, not looked for again"
    with pytest.raises(run.Cannot):
        run.sanitize(state, time.monotonic() + 600, "<b>")
    assert asked == [("memcheck", ["b"]), ("racecheck", ["b"])]
    del state.data["sanitize"]
    assert run.sanitize(state, time.monotonic() + 20, "").startswith("stopped at the limit before")


def test_sanitized_rows_are_those_of_the_table(run: ModuleType) -> None:
    groups = run.sanitized_groups()
    assert {g.file for g in groups} == {p.name for p in (ROOT / "tests/gpu").glob("test_*_gpu.py")}
    assert all("triton" in groups[0].rows and row not in groups[0].rows for row in ("cuda", "reference"))
    command = groups[0].pytest(["triton"])
    assert command[command.index("-k") + 1].endswith(" and (triton)) or test_pack_block")


def test_no_sanitized_test_captures_a_graph(run: ModuleType) -> None:
    """Torch refuses to without its caching allocator, which the stage goes without."""
    for group in run.sanitized_groups():
        if group.rows:
            command = [*group.pytest(group.rows), "--collect-only"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            assert done.returncode == 0 and "::test_" in done.stdout and "graph" not in done.stdout


def test_a_case_that_fails_does_not_end_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benches.gpu import measure

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timed: list[str] = []

    def time_case(name: str, make: object, *rest: object) -> None:
        if name == "bad":
            raise RuntimeError("accumulators differ\nand more")
        timed.append(name)

    monkeypatch.setattr(measure, "time_case", time_case)
    results = SimpleNamespace(data={"rows": {"ceilings": {"copy_tb_s": 3}}}, has=lambda name: name == "known")
    failed: list[str] = []
    cases = [(name, lambda: None) for name in ("known", "bad", "good")]
    left = measure.run_cases(iter(cases), results, torch.zeros(1), time.monotonic() + 99, "", failed)
    assert (left, timed, failed) == (0, ["good"], ["bad: accumulators differ"])


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
        "state = run.State()\n"
        "args = state.done('test'), lambda left: state.save(), time.monotonic() + float(sys.argv[1])\n"
        "recorder = run.Recorder(*args, run.BUILD / 'running')\n"
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
    assert (tmp_path / "ran").read_text() == "good bad last ", "what failed is not tried twice in one run"

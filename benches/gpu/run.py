"""``make gpu``: build, test, sanitize and bench the CUDA and Triton kernels on the machine that has the GPU.

Each stage ends within its limit (nine minutes unless told otherwise), resumes where it stopped when it is run
again, and needs no network. What it needs: python3 with torch, pybind11, cmake and ninja; nvcc of CUDA 13;
CUTLASS's headers, from ``TAUTORCH_CUTLASS_DIR`` (a folder that holds ``include/cutlass`` or ``cutlass``) or
from the installed ``nvidia-cutlass``. State is kept in build/gpu, keyed by the sources.

    python3 benches/gpu/run.py --stage build|test|sanitize|bench|all [--limit SECONDS] [--only WORD]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
from benches.gpu.tested import LIMIT, LOST, Recorder, end, watch  # noqa: E402

BUILD = ROOT / "build" / "gpu"
PACKAGE = ROOT / "python"
SANITIZER_TOOLS = ("memcheck", "racecheck")
# Small shapes on both sides of a tile's edge, padded and not: a sanitizer runs tens of times slower. And no
# graphs: torch captures none without its caching allocator, which would hide accesses past a tensor.
SMALL = "(1-1-1 or 17-65-129 or 129-257-384)"
SANITIZED = f"(test_sizes and {SMALL}) or test_any_strides or off_16_bytes"
SANITIZED_PACKED = "1-1-1 or 7-17-33 or 65-65-129 or pixel or strided or padded"
SANITIZED_WEIGHT_ONLY = "test_weight_only and (1-1-1 or 7-17-33 or 16-63-127 or 17-65-129)"
IDLE = "no test of it ran"
TOGETHER = 4
TRITON_OPS = "lowrank-and-sparse"
SANITIZED_TRITON = (
    "(test_lowrank_sizes and rule or test_sparse_sizes) and (1-1-1 or 17-65-129) or test_lowrank_residual "
    "or (test_lowrank_conv and not graph)"
)


class Cannot(Exception):
    """Why a stage cannot be done here, in one line, with what would mend it."""


class State:
    """What has been done for the present sources; written at every change."""

    def __init__(self) -> None:
        self.path = BUILD / "state.json"
        key = source_hash()
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.data: dict[str, Any] = kept if kept.get("sources") == key else {"sources": key}

    def done(self, stage: str) -> dict[str, str]:
        found: dict[str, str] = self.data.setdefault(stage, {})
        return found

    def save(self) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1))


def source_hash() -> str:
    """Of everything that decides how a kernel runs and is tested."""
    digest = hashlib.sha256()
    folders = ("csrc", "cmake", "python/tautorch", "tests", "benches/gpu")
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in {".cu", ".cuh", ".h", ".cpp", ".py", ".cmake", ".json"}:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def need_gpu(stage: str, otherwise: str = "") -> None:
    if importlib.util.find_spec("torch") is None:
        raise Cannot(f"{stage}: {sys.executable} has no torch; use the python3 that has it")
    import torch

    if not torch.cuda.is_available():
        raise Cannot(f"{stage}: no CUDA device is visible to torch {torch.__version__}{otherwise}")


def need_extension(stage: str) -> None:
    """Not a file of its name: without it the table has no CUDA rows, and their tests would be none."""
    command = [sys.executable, "-c", "import tautorch._cuda"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = (done.stderr.splitlines() or [f"exit {done.returncode}"])[-1]
        raise Cannot(f"{stage}: this Python cannot import tautorch._cuda ({why}); run --stage build first")


def environment() -> dict[str, str]:
    paths = [str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TAUTORCH_CUDA": "on"}


def tool(name: str) -> str:
    """cmake or ninja: of this Python's environment, or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Cannot(f"build: {name} not found; pip install {name}")
    return found


def run_within(seconds: float, command: list[str], env: dict[str, str], log: Path) -> int | None:
    """Exit code of a command, its output in ``log``; None where it was ended, with all it had started."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


# ---- stages -----------------------------------------------------------------------------------------------


def build(state: State, deadline: float, only: str) -> str:
    """Both extensions for this Python, into python/tautorch."""
    need_gpu("build", "; `make cuda` compiles the kernels without one")
    if shutil.which("nvcc") is None:
        raise Cannot("build: nvcc is not on PATH; install CUDA 13 or set PATH")
    if not os.environ.get("TAUTORCH_CUTLASS_DIR") and importlib.util.find_spec("cutlass_library") is None:
        raise Cannot(
            "build: no CUTLASS headers; set TAUTORCH_CUTLASS_DIR, or pip install --no-deps nvidia-cutlass"
        )
    configure = [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), "--log-level=WARNING"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    if subprocess.run(configure, env=environment(), check=False).returncode != 0:
        raise Cannot("build: cmake cannot configure it, see above")
    begin = time.monotonic()
    command = [tool("ninja"), "-C", str(BUILD), "-j", str(os.cpu_count() or 2)]
    code = run_within(deadline - begin, command, environment(), BUILD / "build.log")
    if code is None:
        return "stopped at the limit; run the stage again, finished files are kept"
    if code != 0:
        tail = [line for line in (BUILD / "build.log").read_text().splitlines() if "ptxas" not in line]
        print("\n".join(tail[-40:]))
        raise Cannot(f"build: the compiler failed; see {BUILD / 'build.log'}")
    return f"built in {time.monotonic() - begin:.0f} s"


def test(state: State, deadline: float, only: str) -> str:
    """The GPU tests and the Triton tests; what failed before is tried again, after the rest."""
    need_gpu("test")
    need_extension("test")
    outcomes = state.done("test")
    outcomes.update({name: "again" for name, outcome in outcomes.items() if outcome == "failed"})
    state.save()
    code: int | None = LIMIT
    while (left := deadline - 15 - time.monotonic()) >= 15:
        command = [sys.executable, str(Path(__file__).resolve()), "--stage", "test-part"]
        command += ["--limit", f"{left:.0f}", "--only", only]
        code, name = watch(command, environment(), deadline, BUILD / "running")
        state = State()
        outcomes = state.done("test")
        if name:
            how = "hung and was ended" if code is None else f"ended the process ({code})"
            print(f"  {name}: {how}", flush=True)
            outcomes[name], code = "failed", LIMIT  # where no time is left for those behind it
            state.save()
        elif code != LOST:
            break
    counts = {o: list(outcomes.values()).count(o) for o in ("passed", "failed", "skipped")}
    text = ", ".join(f"{n} {o}" for o, n in counts.items() if n) or "nothing ran"
    if code in (None, LIMIT, LOST):
        return f"{text}; stopped at the limit with {state.data.get('left', 0)} left; run the stage again"
    if code not in (0, 1, 5):
        raise Cannot(f"test: {text}; pytest ended with {code}, see above")
    if counts["failed"] or code == 1:
        raise Cannot(f"test: {text}")
    return text


def test_part(state: State, deadline: float, only: str) -> int:
    """What one process does of the test stage: its exit status."""
    sys.path[:0] = [str(PACKAGE), str(ROOT)]
    import pytest

    def save(left: int) -> None:
        state.data["left"] = left
        state.save()

    recorder = Recorder(state.done("test"), save, deadline, BUILD / "running")
    select = ["-k", only] if only else []
    files = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "triton_kernels")]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *select, *files], [recorder])
    return recorder.status or int(code)


def sanitize(state: State, deadline: float, only: str) -> str:
    """compute-sanitizer over small shapes: out-of-bounds accesses, then races in shared memory.

    Several rows a process, since starting one takes longer than its tests; one by one where that finds
    something. What was found is said at the end; ``only`` looks at it again.
    """
    need_gpu("sanitize")
    need_extension("sanitize")
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Cannot("sanitize: compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    done = state.done("sanitize")
    for check in SANITIZER_TOOLS:
        for group in sanitized_groups():
            todo = [r for r in group.rows if only in r and (only or f"{check} {r}" not in done)]
            queue = [todo[i : i + TOGETHER] for i in range(0, len(todo), TOGETHER)]
            while queue:
                rows = queue.pop(0)
                left = deadline - time.monotonic()
                if left < 30:
                    return f"stopped at the limit before {check} {rows[0]}; run the stage again"
                log = BUILD / f"sanitize-{check}-{rows[0]}{f'-and-{len(rows) - 1}' if rows[1:] else ''}.log"
                command = [program, "--tool", check, "--error-exitcode", "86", *group.pytest(rows)]
                # With torch's own allocator, an access past a tensor would still be inside its pool.
                env = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                code = run_within(left, command, env, log)
                if code is None:
                    return f"stopped at the limit in {check} {', '.join(rows)}; run the stage again"
                if code not in (0, 5) and rows[1:]:
                    queue[:0] = [[row] for row in rows]
                    continue
                for row in rows:
                    done[f"{check} {row}"] = verdict(code, log.read_text(), "" if row == TRITON_OPS else row)
                    print(f"  {check} {row}: {done[f'{check} {row}']}", flush=True)
                state.save()
    found = sorted(f"{key}: {outcome}" for key, outcome in done.items() if outcome.startswith("exit"))
    if found:
        raise Cannot(f"sanitize: {'; '.join(found)}; see {BUILD}/sanitize-*.log")
    idle = sorted(key for key, outcome in done.items() if outcome == IDLE)
    return f"{len(done) - len(idle)} runs clean" + "".join(f"; {key}: {IDLE}" for key in idle)


class Group(NamedTuple):
    """Rows of the table that one file tests, and which of its tests; ``{}`` stands for the rows."""

    file: str
    select: str
    rows: list[str]

    def pytest(self, rows: list[str]) -> list[str]:
        select = self.select.format(" or ".join(rows))
        command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "-k", select]
        return [*command, str(ROOT / "tests" / "gpu" / self.file)]


def sanitized_groups() -> list[Group]:
    """Every row of the table on CUDA."""
    sys.path.insert(0, str(PACKAGE))
    from tautorch import dispatch

    def rows(op: str, but: tuple[str, ...]) -> list[str]:
        return [k.name for k in dispatch.kernels(op) if k.device == "cuda" and k.name not in but]

    linear = rows("int8_linear", ("reference", "cuda"))
    floats = [row for row in linear if row.startswith("weight_only")]
    packed = [
        row
        for op in ("sparse_linear", "int8_conv2d", "sparse_conv2d")
        for row in rows(op, ("reference", "triton", "cuda"))
    ]
    return [
        Group(
            "test_int8_linear_gpu.py",
            f"(({SANITIZED}) and ({{}})) or test_pack_block",
            [row for row in linear if row not in floats],
        ),
        Group("test_int8_linear_gpu.py", f"({SANITIZED_WEIGHT_ONLY}) and ({{}})", floats),
        Group("test_packed_gpu.py", f"({SANITIZED_PACKED}) and ({{}})", packed),
        Group("test_triton_ops_gpu.py", SANITIZED_TRITON, [TRITON_OPS]),
    ]


def verdict(code: int, output: str, row: str) -> str:
    """What a sanitized run of pytest (``-rp``) showed; clean: a test that names ``row`` passed."""
    if code not in (0, 5):
        return f"exit {code}"
    whole = re.compile(rf"(?<!\w){re.escape(row)}(?!\w)")
    ran = [
        line
        for line in output.splitlines()
        if line.startswith("PASSED") and (not row or whole.search(line.partition("::")[2]))
    ]
    return "clean" if ran else IDLE


def bench(state: State, deadline: float, only: str) -> str:
    """Timings beside the peers, written row by row to benches/results."""
    need_gpu("bench")
    need_extension("bench")
    sys.path[:0] = [str(PACKAGE), str(ROOT)]
    from benches.gpu import measure

    text, failed = measure.run(ROOT / "benches" / "results", state.data["sources"], deadline, only)
    if failed:
        raise Cannot(f"bench: {text}; {len(failed)} cases failed: {'; '.join(failed)}")
    return text


STAGES: dict[str, Callable[[State, float, str], str]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test, sanitize and bench the GPU kernels.")
    parser.add_argument("--stage", choices=[*STAGES, "all", "test-part"], default="all")
    parser.add_argument("--limit", type=float, default=540, help="seconds a stage may take")
    parser.add_argument("--only", default="", help="tests, kernels or cases whose name holds this word")
    given = parser.parse_args()
    # nvcc and compute-sanitizer are there even where PATH does not say so.
    os.environ["PATH"] += os.pathsep + os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    if given.stage == "test-part":
        return test_part(State(), time.monotonic() + given.limit, given.only)
    failed = False
    for name in STAGES if given.stage == "all" else (given.stage,):
        try:
            text = STAGES[name](State(), time.monotonic() + given.limit, given.only)
            print(f"{name}: {text}")
        except Cannot as why:
            print(why)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

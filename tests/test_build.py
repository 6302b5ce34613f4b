"""What the build promises: light import, instructions in place, no link to torch, clear set-up errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tautorch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
OBJECTS = [BUILD / "CMakeFiles" / f"{target}.dir" / "csrc" for target in ("tautorch_kernels", "_C")]

IMPORT_SECONDS = 0.5
HEAVY = (
    "triton",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "onnx",
    "torch_pruning",
    "torch._inductor",
    "torch.distributed.tensor",
    "gymnasium",
    "constriction",
    "tensorboard",
)

ISAS = ("avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx", "neon", "neon_dotprod", "neon_i8mm")
# What an object of each instruction set must not hold. "none": neither AVX registers nor VEX-encoded SSE.
AVX512 = r"%zmm|%k[0-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])"
VBMI = r"\bvperm[it]2b\b|\bvpermb\b|\bvpmultishiftqb\b|\bvp(?:compress|expand)[bw]\b|\bvpsh[lr]d[vwdq]"
FORBIDDEN = {
    "none": r"%[yz]mm|\tv[a-z0-9]+\s.*%xmm",
    "avx2": rf"{AVX512}|\bvpdp",
    "avxvnni": AVX512,
    "avx512vnni": VBMI,  # Cascade Lake has VNNI without it
    "avx512vbmi": r"\bvpcompress[bw]\b|\bvpexpand[bw]\b|\bvpsh[lr]d[vwdq]",  # VBMI2
    "amx": r"\btdpb(?![us][us]d\b)|\btdpf",  # AMX-INT8 alone
}
CARRIES = {
    "avx2": r"%ymm",
    "avxvnni": r"\bvpdpbusd\b",
    "avx512vnni": r"\bvpdpbusd\b.*%zmm",
    "amx": r"(?s)\btdpbusd\b.*\btdpbssd\b|\btdpbssd\b.*\btdpbusd\b",
}


def isa_of(path: Path) -> str:
    """The instruction set a source or object file's name asks for."""
    stem = path.name.split(".")[0]
    return next((isa for isa in ISAS if stem.endswith(f"_{isa}")), "none")


def run(*command: str, **kwargs: object) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **kwargs).stdout  # type: ignore[call-overload]


def test_the_readmes_links_lead_somewhere_in_a_source_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = pytest.importorskip("scikit_build_core.build", reason="scikit-build-core is not installed")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert "docs/performance.md" in links
    missing = [
        link for link in links if not any(name == link or name.startswith(f"{link}/") for name in names)
    ]
    assert missing == []


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """The object files of the extension as built; files of sources that are gone stay out."""
    database = BUILD / "compile_commands.json"
    if not database.exists():
        pytest.skip(f"no {database}; run `make build`")
    entries = [BUILD / entry["output"] for entry in json.loads(database.read_text())]
    found = [path for path in entries if set(OBJECTS) & set(path.parents)]
    assert found
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    return found


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86 instruction names")
def test_wide_instructions_stay_in_their_files(objects: list[Path]) -> None:
    carried = set()
    for path in objects:
        text = run("objdump", "-d", "--no-show-raw-insn", str(path))
        isa = isa_of(path)
        stray = re.search(f".*(?:{FORBIDDEN[isa]}).*", text)
        assert stray is None, f"{path.relative_to(BUILD)} ({isa}) holds `{stray[0].strip()}`"
        if isa in CARRIES and re.search(CARRIES[isa], text):
            carried.add(isa)
    assert carried == set(CARRIES), "an instruction set's files do not use its instructions"


def test_isa_objects_share_nothing(objects: list[Path]) -> None:
    """A weak symbol or a constructor of an ISA file could run on a machine that lacks the instructions."""
    wide = [path for path in objects if isa_of(path) != "none"]
    assert wide
    for path in wide:
        symbols = [line.split() for line in run("nm", "--demangle", str(path)).splitlines()]
        weak = [words for words in symbols if len(words) > 2 and words[1] in "WVu"]
        assert not weak, f"{path.name} defines symbols that other files may link to: {weak[:3]}"
        assert ".init_array" not in run("objdump", "-h", str(path)), f"{path.name} has a global constructor"


def test_every_file_is_compiled_without_contraction() -> None:
    database = BUILD / "compile_commands.json"
    if not database.exists():
        pytest.skip(f"no {database}; run `make build`")
    entries = [e for e in json.loads(database.read_text()) if e["file"].endswith(".cpp")]
    assert entries
    for entry in entries:
        flags = entry["command"].split()
        assert "-ffp-contract=off" in flags, entry["file"]
        assert not {"-ffast-math", "-Ofast", "-flto", "-march=native"} & set(flags), entry["file"]
        if "/csrc/kernels/" in entry["file"]:
            assert {"-fno-exceptions", "-fno-rtti", "-O3"} <= set(flags), entry["file"]
        if isa_of(Path(entry["file"])) == "none":
            assert not [f for f in flags if f.startswith("-mavx")], entry["file"]


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not installed")
def test_extension_links_neither_torch_nor_openmp() -> None:
    extensions = sorted(Path(tautorch.__file__).parent.glob("_C*.so"))
    extensions += sorted(Path(tautorch.__file__).parent.glob("_cuda*.so"))
    assert extensions
    for path in extensions:
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", str(path)))
        assert needed
        assert not [lib for lib in needed if re.search(r"torch|c10|gomp|omp|python|cublas|cudart", lib)], (
            needed
        )


def test_the_extension_runs_without_torch() -> None:
    """What `make wheel-aarch64` and cibuildwheel run on wheels, on this one."""
    out = run(sys.executable, str(ROOT / "tools" / "try_extension.py"))
    available = [name for name, runs in tautorch._C.isas().items() if runs]
    assert out.endswith(f": {', '.join(available)} are exact\n")


IMPORT_PROBE = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import tautorch
seconds = time.process_time() - start
print(seconds)
print(*sorted(set(sys.modules) - before))
"""


def test_import_is_light() -> None:
    # Alone in its process; the least of three, in processor time, because the machine may be busy.
    runs = [run(sys.executable, "-c", IMPORT_PROBE).splitlines() for _ in range(3)]
    added = set(runs[0][1].split())
    assert "tautorch" in added
    heavy = sorted(m for m in added if any(m == h or m.startswith(f"{h}.") for h in HEAVY))
    assert not heavy, f"import tautorch brings in {heavy[:5]}"
    assert min(float(r[0]) for r in runs) < IMPORT_SECONDS


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A PATH folder with make's helpers and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "make", "find", "sort", "cmp", "mkdir", "mv", "rm", "touch"):
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"{tool} is not installed")
        (folder / tool).symlink_to(found)
    return folder


def failed_make(path: Path, venv: Path, *arguments: str) -> list[str]:
    """Run make where it must fail before it changes anything; its error lines without make's own."""
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={venv}", *arguments],
        env={**env, "PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert not venv.exists()
    return [line for line in done.stderr.splitlines() if not line.startswith("make")]


def test_missing_compiler_is_one_line(bare_path: Path, tmp_path: Path) -> None:
    (bare_path / "python3").symlink_to(sys.executable)
    for target in ("test", "demo", "build"):
        (line,) = failed_make(bare_path, tmp_path / "venv", target)
        assert re.fullmatch(r"tautorch: no C\+\+17 compiler .*; install one .* or give CXX=.*", line)
    (line,) = failed_make(bare_path, tmp_path / "venv", "build", "CXX=/nowhere/c++")
    assert "/nowhere/c++" in line


def test_missing_python_is_one_line(bare_path: Path, tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no compiler")
    wrapper = bare_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec {compiler} "$@"\n')
    wrapper.chmod(0o755)
    (line,) = failed_make(bare_path, tmp_path / "venv", "build", "PYTHON=/nowhere/python")
    assert line.startswith("tautorch: Python 3.11, 3.12 or 3.13 not found")


def test_cmake_without_compiler_says_so(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    done = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}"],
        env={**os.environ, "CXX": "/nowhere/c++"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "tautorch: no C++17 compiler found" in done.stderr

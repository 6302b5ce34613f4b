"""The kernels through a C++ program without Python: on this machine, and as aarch64 code under qemu-user.

The program gets the list of kernels that the CPU must have, so that none is left out unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "golden.json"
HERE = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
CROSS = ROOT / "build" / "aarch64"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
# A model without dot products (Raspberry Pi 4), one with SDOT, one with SMMLA too; and what each must run.
MODELS = {
    "cortex-a72": "scalar",
    "neoverse-n1": "scalar",
    "max": "scalar",
}


def run(*command: str | Path, seconds: float = 600) -> str:
    """The output of a command that must succeed."""
    env = {**os.environ, "PATH": TOOLS}
    done = subprocess.run(
        [str(word) for word in command],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def x86_kernels() -> str:
    """What this CPU must run, by the kernel's list of its features rather than by the product's own look."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    names = ["scalar"]
    if {"avx2", "fma", "f16c"} <= flags:
        names.append("avx2")
        if "avx_vnni" in flags:
            names.append("avxvnni")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
            names.append("avx512vnni")
    return ",".join(names)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="reads x86 feature names")
def test_here() -> None:
    if not (HERE / "CMakeCache.txt").exists():
        pytest.skip(f"no {HERE}; run `make build`")
    run("cmake", "--build", HERE, "--target", "native_test")
    out = run(HERE / "tests" / "native" / "native_test", GOLDEN, "--expect", x86_kernels())
    assert out.endswith("all equal\n")


@pytest.fixture(scope="module")
def aarch64() -> Path:
    """The program, cross-compiled; a second build compiles what has changed."""
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed; apt-get install {package}")
    ninja = shutil.which("ninja", path=TOOLS)
    run(
        *("cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DTAUTORCH_PYTHON=OFF"),
        f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}",
        *("-S", ROOT, "-B", CROSS),
    )
    run("cmake", "--build", CROSS, "--target", "native_test")
    return CROSS / "tests" / "native" / "native_test"


@pytest.mark.parametrize("cpu", MODELS)
def test_emulated(aarch64: Path, cpu: str) -> None:
    out = run(EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu, aarch64, GOLDEN, "--expect", MODELS[cpu])
    assert out.endswith("all equal\n")

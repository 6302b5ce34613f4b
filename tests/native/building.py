"""Builds of the native test program and the C library: in the tree of `make build`, and for aarch64."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GIVEN = os.environ.get("TAUTORCH_TEST_BUILD")  # `make sanitize` has one of its own
HERE = Path(GIVEN or ROOT / "build" / f"editable-{sys.implementation.cache_tag}")
CROSS = ROOT / "build" / "aarch64"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PREFIX = "aarch64-linux-gnu-"
EMULATOR = "qemu-aarch64"


def run(*command: str | Path, seconds: float = 600) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "PATH": TOOLS},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def build_aarch64(target: str) -> Path:
    """Cross-compile the kernels and a target (a second build compiles what changed); the build's folder."""
    if not shutil.which(f"{PREFIX}g++"):
        pytest.skip(f"{PREFIX}g++ is not installed; apt-get install g++-aarch64-linux-gnu")
    CROSS.mkdir(parents=True, exist_ok=True)
    with (CROSS / "building").open("w") as lock:  # test files may run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(
            *("cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=TOOLS)}"),
            *("-DTAUTORCH_PYTHON=OFF", "-S", ROOT, "-B", CROSS),
            f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}",
        )
        run("cmake", "--build", CROSS, "--target", target, seconds=1800)
    return CROSS


def library(name: str) -> Path:
    """libtautorch.a or libtautorch.so of this machine."""
    path = HERE / name
    if not path.exists():
        (pytest.fail if GIVEN else pytest.skip)(f"no {path}; run `make build`")
    return path

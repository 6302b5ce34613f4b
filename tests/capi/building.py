"""Where the C library is built: by `make build` for this machine, by tests for aarch64."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "include"
HERE = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
CROSS = ROOT / "build" / "aarch64"
CROSS_CC = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: str | Path) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, "PATH": TOOLS}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def library(name: str) -> Path:
    """libtautorch.a or libtautorch.so of this machine."""
    path = HERE / name
    if not path.exists():
        pytest.skip(f"no {path}; run `make build`")
    return path


def library_aarch64() -> Path:
    """libtautorch.a, cross-compiled; a second build compiles what has changed."""
    for tool, package in ((CROSS_CC, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed; apt-get install {package}")
    CROSS.mkdir(parents=True, exist_ok=True)
    with (CROSS / "building").open("w") as lock:  # other tests build there too, maybe side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(
            *("cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=TOOLS)}"),
            *("-DTAUTORCH_PYTHON=OFF", "-S", ROOT, "-B", CROSS),
            f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}",
        )
        run("cmake", "--build", CROSS, "--target", "tautorch_static")
    return CROSS / "libtautorch.a"

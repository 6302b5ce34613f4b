"""The CUDA extension that `make cuda` built, for the tests that read it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda"


@dataclass(frozen=True)
class CudaBuild:
    """The built module's path, and the module itself (imported apart from the package's own)."""

    path: Path
    module: Any


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def _sources() -> list[Path]:
    """The repository's files that the extension was compiled from, as the compilers reported them."""
    done = subprocess.run([_ninja(), "-C", BUILD, "-t", "deps"], capture_output=True, text=True, check=True)
    names = {line.strip() for line in done.stdout.splitlines() if line.startswith("    ")}
    paths = {(BUILD / name).resolve() for name in names}
    sources = sorted(p for p in paths if (ROOT / "csrc") in p.parents and p.exists())
    assert any(p.suffix == ".cu" for p in sources)
    return sources


@pytest.fixture(scope="session")
def cuda_build() -> CudaBuild:
    """The build in build/cuda, if it is there and not older than its sources; it takes minutes to make."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: install CUDA 13 to compile the CUDA kernels")
    found = sorted(BUILD.glob("_cuda*.so"))
    if not found:
        pytest.skip("the CUDA extension is not built: run `make cuda`")
    built = found[-1].stat().st_mtime
    newer = [path for path in _sources() if path.stat().st_mtime > built]
    if newer:
        pytest.skip(f"{newer[0].relative_to(ROOT)} is newer than the CUDA extension: run `make cuda`")
    spec = importlib.util.spec_from_file_location("_cuda", found[-1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return CudaBuild(found[-1], module)

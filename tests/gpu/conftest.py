"""The CUDA extension that `make cuda` built, for the tests that read it, and its kernels on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tautorch import dispatch
from tautorch.dispatch import Kernel
from tautorch.ops import _int8_linear_gpu as gpu

from . import emulated
from .stand_in import OP, Extension

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


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Our own kernels on the CPU."""
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Extension]:
    ext = Extension()
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: ext.calls.append("synchronize"))
    monkeypatch.setattr(dispatch, "cuda", ext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: None)
    monkeypatch.setattr(gpu, "_facts", lambda index: (90, 132))
    rows = [Kernel(OP, name, "cuda", lambda p: None) for name in ("cuda", "tile_a", "tile_b")]
    monkeypatch.setattr(dispatch, "_table", rows)
    yield ext
    dispatch._last_python.pop(OP, None)

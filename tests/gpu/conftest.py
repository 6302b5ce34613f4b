"""The CUDA extension that `make cuda` built, and our own CUDA code as a library of the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda"
HERE = Path(__file__).parent / "emulation"
GEMM = (
    "common/gemm_pack",
    "sparse_linear/sparse_linear_24",
    "sparse_linear/sparse_linear_24_pack",
    "int8_conv2d/int8_conv2d_gemm",
    "sparse_conv2d/sparse_conv2d_24",
)


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
    """The kernels' sources compiled by the host compiler; see emulation/emulate.h."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("nvcc (for CUDA's headers) and g++ are needed: install CUDA 13 and g++")
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
    )
    tops = [line.partition("TOP=")[2] for line in dry.stderr.splitlines() if "TOP=" in line]
    library = tmp_path_factory.mktemp("emulated") / "device.so"
    sources = [ROOT / f"csrc/kernels/common/quantize_rows{part}.cu" for part in ("", "_after", "_parts")]
    sources.append(HERE / "emulate.cpp")
    sources += [ROOT / f"csrc/kernels/int8_linear/int8_linear_{name}.cu" for name in ("pack", "stream")]
    sources += [ROOT / f"csrc/kernels/{name}.cu" for name in GEMM]
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    command += ["-isystem", f"{tops[0]}/include", "-I", str(HERE), "-I", str(ROOT / "csrc")]
    command += ['-DTAUTORCH_EMULATED_LAUNCH="emulate.h"', "-include", "emulate.h", "-x", "c++"]
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lib = ctypes.CDLL(str(library))
    for name in ("packed_bytes", "units_bytes", "float_units_bytes", "wgmma_bytes"):
        getattr(lib, name).restype = ctypes.c_int64
    return lib

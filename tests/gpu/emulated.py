"""Building our own CUDA code for the CPU, and calling it: what the tests of the emulation share.

The kernels' sources are compiled by the host compiler against a header that gives blocks, warps, barriers and
intrinsics their meaning. It shows wrong indexing, missing barriers' results and wrong arithmetic; it says
nothing about speed, and CUTLASS's main loops are not in it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "emulation"
GEMM = (
    "common/gemm_pack",
    "sparse_linear/sparse_linear_24",
    "sparse_linear/sparse_linear_24_pack",
    "int8_conv2d/int8_conv2d_gemm",
)
GEMM += ("sparse_conv2d/sparse_conv2d_24", "sparse_linear/sparse_linear_bitmap")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.int32: 4}


def cuda_headers(nvcc: str) -> Path:
    """The folder of CUDA's headers."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
    )
    tops = [line.partition("TOP=")[2] for line in dry.stderr.splitlines() if "TOP=" in line]
    return Path(tops[0]) / "include"


def build(folder: Path) -> ctypes.CDLL:
    """The emulated kernels as a library in ``folder``; skips where nvcc or g++ is missing."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("nvcc (for CUDA's headers) and g++ are needed: install CUDA 13 and g++")
    library = folder / "device.so"
    sources = [ROOT / f"csrc/kernels/common/quantize_rows{part}.cu" for part in ("", "_after", "_parts")]
    sources.append(HERE / "emulate.cpp")
    sources += [ROOT / f"csrc/kernels/int8_linear/int8_linear_{name}.cu" for name in ("pack", "stream")]
    sources += [ROOT / f"csrc/kernels/{name}.cu" for name in GEMM]
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    command += ["-isystem", str(cuda_headers(nvcc)), "-I", str(HERE), "-I", str(ROOT / "csrc")]
    command += ['-DTAUTORCH_EMULATED_LAUNCH="emulate.h"', "-include", "emulate.h", "-x", "c++"]
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lib = ctypes.CDLL(str(library))
    for name in ("packed_bytes", "units_bytes", "float_units_bytes", "wgmma_bytes"):
        getattr(lib, name).restype = ctypes.c_int64
    return lib


def at(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if t is None else t.data_ptr())


def i64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(v) for v in values]


def same(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def aligned(t: Tensor, columns: int, fill: int) -> Tensor:
    """t [rows, K] in rows of ``columns`` elements, on 16 bytes, with ``fill`` behind K."""
    room = torch.full((t.shape[0] * columns + 64 // t.element_size(),), fill, dtype=t.dtype)
    wide = room[(-room.data_ptr()) % 64 // t.element_size() :][: t.shape[0] * columns].view(-1, columns)
    wide[:, : t.shape[1]] = t
    return wide


def product(
    device: ctypes.CDLL,
    kernel: str,
    x: Tensor,
    weight: Tensor,
    out: torch.dtype,
    case: dict[str, Tensor | None],
    packed: Tensor | None = None,
) -> Tensor:
    """The weight's product by a kernel of its name; ``packed`` where it takes no rows of int8."""
    (m, k), n = x.shape, weight.shape[0]
    width = 16 // out.itemsize
    ldy = -(-n // width) * width
    y = aligned(torch.zeros(m, ldy, dtype=out), ldy, 0)
    ldx = -(-k // 16) * 16
    xs = aligned(x, ldx, 99 if x.dtype == torch.int8 else float("nan"))  # type: ignore[arg-type]
    w = aligned(weight, ldx, 0) if packed is None else packed
    scale, sums = case.get("x_scale"), weight.sum(1, dtype=torch.int32)
    status = device.linear(
        kernel.encode(), *i64(m, n, k), at(xs), DTYPES[x.dtype], *i64(ldx), at(w), *i64(ldx),
        at(sums), at(scale), *i64(1 if scale is None else scale.numel()),
        at(case.get("w_scale")), at(case.get("bias")), at(case.get("x_zero_point")),
        at(case.get("out_scale")), at(case.get("out_zero_point")), 1, DTYPES[out], at(y), *i64(ldy),
    )  # fmt: skip
    assert status == 0
    return y[:, :n]


def room_for(size: int) -> Tensor:
    """Bytes on 64."""
    room = torch.full((size + 64,), 99, dtype=torch.uint8)
    return room[(-room.data_ptr()) % 64 :][:size]


def sparse_weight(n: int, k: int) -> Tensor:
    """int8 [n, k] with 2 of each 4 kept, 1 or none here and there."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    score = torch.rand(n, -(-k // 4) * 4).reshape(n, -1, 4)
    keep = (score.argsort(2).argsort(2) < 2) & (torch.rand_like(score) < 0.9)
    return weight * keep.reshape(n, -1)[:, :k]

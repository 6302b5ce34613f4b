"""What we tell CUTLASS, held against CUTLASS's own host code: tiles, and the layout of 2:4 weights."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tautorch.reference.layouts import encode

from . import emulated

ROOT = Path(__file__).resolve().parents[2]


def _headers() -> Path | None:
    given = os.environ.get("TAUTORCH_CUTLASS_DIR")
    spec = None if given else importlib.util.find_spec("cutlass_library")
    places = (
        [Path(given)]
        if given
        else [Path(p) / "source" for p in (spec and spec.submodule_search_locations) or ()]
    )
    for place in places:
        for headers in (place / "include", place):
            if (headers / "cutlass" / "cutlass.h").exists():
                return headers
    return None


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc, headers = shutil.which("nvcc"), _headers()
    if nvcc is None or headers is None:
        pytest.skip("nvcc and CUTLASS's headers are needed: install CUDA 13 and run `make cuda`")
    program = tmp_path_factory.mktemp("cutlass") / "cutlass_host"
    command = [
        nvcc,
        "-std=c++17",
        "-DNDEBUG",
        "--expt-relaxed-constexpr",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    command += [
        "-I",
        str(headers),
        "-I",
        str(ROOT / "csrc"),
        str(Path(__file__).with_name("cutlass_host.cu")),
    ]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def test_tiles_are_those_that_cutlass_makes(host: Path) -> None:
    """No tile is made that nobody needs, and the estimate knows which are shared."""
    done = subprocess.run([host, "schedule"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rows_are_read_once_and_by_whole_pieces(tmp_path: Path) -> None:
    """Of any K: a step that began off 16 bytes would be a misaligned address on the device."""
    nvcc, compiler, headers = shutil.which("nvcc"), shutil.which("g++"), _headers()
    if nvcc is None or compiler is None or headers is None:
        pytest.skip("nvcc (for CUDA's headers), g++ and CUTLASS's headers are needed: run `make cuda`")
    program, source = tmp_path / "rows", Path(__file__).with_name("cutlass_rows.cpp")
    # CUTLASS's headers hold what g++ takes only so; it is not run here.
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-w",
        "-fpermissive",
        "-I",
        str(headers),
        "-I",
        str(ROOT / "csrc"),
    ]
    cuda = emulated.cuda_headers(nvcc)
    command += ["-isystem", str(cuda), "-isystem", str(cuda / "cccl")]
    done = subprocess.run(
        [*command, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("n,k", [(1, 4), (64, 128), (65, 136), (70, 460), (129, 1000)])
def test_two_of_four_lies_as_cutlass_reads_it(host: Path, device: ctypes.CDLL, n: int, k: int) -> None:
    """Bytes of values and places at the addresses of CUTLASS's layouts, for K and N past their units."""
    weight = torch.randint(1, 128, (n, k), dtype=torch.int8)
    weight *= (torch.arange(4) < 2)[torch.rand(n, k // 4, 4).argsort(2).reshape(n, k)]
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    kept = values.shape[1]
    device.wgmma_bytes.restype = ctypes.c_int64
    room = torch.full(
        (device.wgmma_bytes(ctypes.c_int64(n), ctypes.c_int64(2 * kept)) + 128,), 99, dtype=torch.uint8
    )
    packed = room[(-room.data_ptr()) % 128 :]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, places)]
    sizes = [ctypes.c_int64(n), ctypes.c_int64(kept), ctypes.c_void_p(packed.data_ptr())]
    assert device.pack_wgmma(*pointers, *sizes) == 0

    asked = torch.tensor([n, k]).numpy().tobytes() + weight.numpy().tobytes()
    answer = subprocess.run([host, "place"], input=asked, capture_output=True, check=True).stdout
    values_size, places_size = torch.frombuffer(bytearray(answer[:16]), dtype=torch.int64).tolist()
    theirs = torch.frombuffer(bytearray(answer[16:]), dtype=torch.uint8)
    assert theirs.numel() == values_size + places_size
    assert torch.equal(packed[:values_size], theirs[:values_size])
    ours = packed[-(-values_size // 128) * 128 :][:places_size].reshape(-1, -(-n // 64) * 64, 16)
    theirs = theirs[values_size:].reshape(ours.shape)
    whole = ours.clone()
    # Where there are no values ours are valid places, 0 and 1, and CUTLASS's not written.
    bytes_of_k = torch.arange(ours.shape[0] * 16).reshape(-1, 1, 16) * 8
    real = (bytes_of_k < k) & (torch.arange(ours.shape[1]) < n)[:, None]
    assert (whole[~real] == 0x44).all()
    half = real & (bytes_of_k + 4 >= k)  # the second group of this byte is past K
    assert torch.equal(torch.where(half, whole & 15, whole)[real], theirs[real])

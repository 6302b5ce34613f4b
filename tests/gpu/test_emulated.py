"""Our own CUDA code run on the CPU, thread by thread: quantiser, packing, and the epilogue's arithmetic.

The kernels' sources are compiled by the host compiler against a header that gives blocks, warps, barriers and
intrinsics their meaning. It shows wrong indexing, missing barriers' results and wrong arithmetic; it says
nothing about speed, and CUTLASS's main loops are not in it.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tautorch.reference.common import apply_activation
from tautorch.reference.quantizer import quantize_rows

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "emulation"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.int32: 4}
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("nvcc (for CUDA's headers) and g++ are needed: install CUDA 13 and g++")
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
    )
    tops = [line.partition("TOP=")[2] for line in dry.stderr.splitlines() if "TOP=" in line]
    library = tmp_path_factory.mktemp("emulated") / "device.so"
    sources = [ROOT / "csrc/kernels/common/quantize_rows.cu", HERE / "emulate.cpp"]
    sources.append(ROOT / "csrc/kernels/int8_linear/int8_linear_pack.cu")
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    command += ["-isystem", f"{tops[0]}/include", "-I", str(HERE), "-I", str(ROOT / "csrc")]
    command += ['-DTAUTORCH_EMULATED_LAUNCH="emulate.h"', "-include", "emulate.h", "-x", "c++"]
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lib = ctypes.CDLL(str(library))
    lib.packed_bytes.restype = ctypes.c_int64
    return lib


def at(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if t is None else t.data_ptr())


def i64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(v) for v in values]


def quantise(
    device: ctypes.CDLL, x: Tensor, x_scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    wide = max(16, -(-k // 16) * 16)
    q = torch.full((m, wide), 77, dtype=torch.int8)
    scale = torch.full((m,), -1.0)
    status = device.quantize_rows(
        at(x), DTYPES[x.dtype], *i64(x.stride(0), x.stride(1), m, k), at(x_scale), at(zero_point),
        at(q), ctypes.c_int64(wide), at(scale),
    )  # fmt: skip
    assert status == 0
    assert (q[:, k:] == 77).all(), "the padding is not the quantiser's"
    return q[:, :k], scale


def same(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "m,k", [(1, 1), (3, 7), (9, 64), (17, 130), (2, 512), (2, 513), (1, 1025), (2, 2100)]
)
def test_dynamic_rows(device: ctypes.CDLL, dtype: torch.dtype, m: int, k: int) -> None:
    x = (torch.randn(m, k) * torch.logspace(-20, 4, m)[:, None]).to(dtype)
    want_q, want_scale = quantize_rows(x)
    q, scale = quantise(device, x)
    assert torch.equal(q, want_q)
    assert torch.equal(scale, want_scale.reshape(-1))


def test_special_rows(device: ctypes.CDLL) -> None:
    for k in (37, 1200):  # a row of one warp, a row of a block
        x = torch.randn(8, k)
        x[0] = 0
        x[1] = 2.0**-101
        x[2] = 0
        x[2, 5] = 2.0**-100
        x[3, k - 1] = float("nan")
        x[4, 0] = float("inf")
        x[5, 1] = -float("inf")
        x[6] = -3.4e38
        x[7] = torch.arange(k) % 50 - 25.5
        x[7, 0] = 127.0  # halves: ties to even
        want_q, want_scale = quantize_rows(x)
        q, scale = quantise(device, x)
        assert torch.equal(q, want_q)
        same(scale, want_scale.reshape(-1))
        assert scale[3:6].isnan().all() and not q[3:6].any() and scale[0] == 1


@pytest.mark.parametrize("zero_point", [None, -128, 9])
def test_static_rows(device: ctypes.CDLL, zero_point: int | None) -> None:
    scale = torch.tensor([0.021])
    zp = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    for k in (33, 1100):
        x = torch.randn(5, k) * 3
        x[1, 2] = float("nan")
        x[2, 0] = 3e38
        q, scales = quantise(device, x, scale, zp)
        bad = ~torch.isfinite(x).all(1)
        clean = torch.where(bad[:, None], torch.zeros(()), x)
        want = torch.round(clean * (torch.ones(1) / scale)) + (zero_point or 0)
        assert torch.equal(q, want.clamp(-128, 127).to(torch.int8))
        same(scales, torch.where(bad, torch.tensor(float("nan")), scale))


def test_any_strides_and_alignment(device: ctypes.CDLL) -> None:
    base = torch.randn(64, 700)
    views = [base[:5, :64], base[:5, 1:66], base[:40, :9].t(), base[:4, ::3], base[0, :50].expand(3, 50)]
    for x in (*views, *(v.bfloat16() for v in views), base.bfloat16()[:4, 1:600]):
        want_q, want_scale = quantize_rows(x)
        q, scale = quantise(device, x)
        assert torch.equal(q, want_q) and torch.equal(scale, want_scale.reshape(-1))


@pytest.mark.parametrize("n,k", [(1, 1), (3, 16), (5, 17), (2, 300)])
def test_packing(device: ctypes.CDLL, n: int, k: int) -> None:
    wide = torch.randint(-127, 128, (n, k + 5), dtype=torch.int8)
    weight = wide[:, 3 : 3 + k]
    size = device.packed_bytes(*i64(n, k))
    room = torch.full((size + 128,), 99, dtype=torch.uint8)
    packed = room[(-room.data_ptr()) % 128 :][:size]
    assert device.pack(at(weight), *i64(weight.stride(0), n, k), at(packed)) == 0
    header = packed[:56].clone().view(torch.int64).tolist()
    (_, kept_n, kept_k, ldw, weight_off, sums_off, total) = header
    assert (kept_n, kept_k, total) == (n, k, size)
    rows = packed[weight_off:][: n * ldw].view(torch.int8).reshape(n, ldw)
    assert torch.equal(rows[:, :k], weight) and not rows[:, k:].any()
    want = weight.sum(1, dtype=torch.int32)
    assert torch.equal(packed[sums_off:][: 4 * n].clone().view(torch.int32), want)
    alone = torch.zeros(n, dtype=torch.int32)
    assert device.sums(at(weight), *i64(weight.stride(0), n, k), at(alone)) == 0
    assert torch.equal(alone, want)


@pytest.mark.parametrize("activation,out", list(itertools.product(ACTIVATIONS, DTYPES)), ids=str)
@pytest.mark.parametrize("zero_point", [None, -5])
def test_epilogue(device: ctypes.CDLL, activation: str, out: torch.dtype, zero_point: int | None) -> None:
    m, n = 12, 30
    acc = torch.randint(-(2**22), 2**22, (m, n), dtype=torch.int32)
    acc[0, :3] = torch.tensor([2**30, -(2**30), 2**24 + 1], dtype=torch.int32)  # beyond fp32's integers
    x_scale, w_scale, bias = torch.rand(m) * 1e-3, torch.rand(n) * 1e-2, torch.randn(n)
    x_scale[3] = float("nan")
    sums = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    zp = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    out_scale, out_zp = torch.tensor([0.17]), torch.tensor([6], dtype=torch.int32)
    y = torch.zeros(m, n, dtype=out)
    device.epilogue(
        *i64(m, n), at(acc), at(x_scale), at(w_scale), at(sums), at(bias), at(zp), at(out_scale), at(out_zp),
        ACTIVATIONS.index(activation), DTYPES[out], at(y),
    )  # fmt: skip
    corrected = acc - (zero_point or 0) * sums
    if out == torch.int32:
        assert torch.equal(y, corrected)
        return
    plain = (corrected.float() * x_scale[:, None]) * w_scale + bias
    want = apply_activation(plain, activation)
    if out == torch.int8:
        v = torch.round(want * (torch.ones(1) / out_scale)) + 6
        want_q = torch.where(v.isnan(), torch.full_like(v, 6), v).clamp(-128, 127)
        apart = (y.float() - want_q).abs().max()
        assert apart == 0 if activation in ("none", "relu") else apart <= 1
        return
    if activation in ("none", "relu"):
        same(y, want.to(out))
    else:
        eps = 4e-7 if out == torch.float32 else torch.finfo(out).eps
        torch.testing.assert_close(y.float(), want, rtol=eps, atol=eps, equal_nan=True)

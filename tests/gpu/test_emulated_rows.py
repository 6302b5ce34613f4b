"""The row quantiser, alone and behind stages, packing and the epilogue's arithmetic, run on the CPU."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from tautorch.reference.common import apply_activation
from tautorch.reference.quantize_rows import STAGES, stage
from tautorch.reference.quantizer import quantize_rows, quantize_static

from .emulated import DTYPES, aligned, at, i64, same

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


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


@pytest.mark.parametrize(
    "dtype,k,shared",
    [
        (torch.float32, 24592, 1),
        (torch.bfloat16, 33000, 1),
        (torch.float16, 24592, 1),
        (torch.bfloat16, 24576, 0),
        (torch.float32, 33002, 0),
    ],
    ids=str,
)
def test_long_rows_are_shared(device: ctypes.CDLL, dtype: torch.dtype, k: int, shared: int) -> None:
    """From four parts on and in whole pieces of 16 bytes; the same integers as by one block."""
    x = aligned((torch.randn(3, k) * torch.tensor([[1.0], [1e-30], [9.0]])).to(dtype), k, 0)
    x[2, k - 1] = 100  # in the last part
    wide = -(-k // 16) * 16
    for static in (False, True):
        q, scale = aligned(torch.zeros(3, wide, dtype=torch.int8), wide, 0), torch.zeros(3)
        peaks = torch.full((3,), -1, dtype=torch.int32)
        x_scale, zero = torch.tensor([0.05]), torch.tensor([4], dtype=torch.int32)
        pointers = (at(x_scale), at(zero)) if static else (None, None)
        status = device.quantize_rows_in_parts(
            at(x), DTYPES[dtype], *i64(3, k), *pointers, at(q), *i64(wide), at(scale), at(peaks)
        )
        assert status == shared
        want_q, want_scale = quantize_static(x, x_scale, zero) if static else quantize_rows(x)
        assert torch.equal(q[:, :k], want_q)
        same(scale, want_scale)
        x[1, 20000] = float("nan")  # for the second turn


# A row per block of 128 or of 256 threads, holding 8, 16, 32 and 64 values each; whole and cut chunks.
LENGTHS = [8, 1024, 1032, 2048, 4088, 8184, 16384]


STAGED = [
    *itertools.product(STAGES, (torch.bfloat16,), LENGTHS[:5]),
    *itertools.product(STAGES, (torch.float32, torch.float16), LENGTHS[:2]),
    *itertools.product(("layer_norm", "silu_gate"), (torch.float32, torch.bfloat16), LENGTHS[5:]),
]


@pytest.mark.parametrize("after,dtype,k", STAGED, ids=str)
def test_rows_behind_a_stage(device: ctypes.CDLL, after: str, dtype: torch.dtype, k: int) -> None:
    m = 2
    x = (torch.randn(m, k + 8) * 2 + 0.5).to(dtype)[:, :k]
    gate = torch.randn(m, k).to(dtype) if after == "silu_gate" else None
    norm = after.endswith("norm")
    weight, bias = (torch.rand(k) + 0.5, torch.randn(k)) if norm and k != 1024 else (None, None)
    if norm:
        x[1] += 30  # a mean far from 0
    x, wide = aligned(x, k + 8, 99)[:, :k], -(-k // 16) * 16
    gate = None if gate is None else aligned(gate, k, 0)
    weight, bias = (None if v is None else aligned(v[None], k, 0)[0] for v in (weight, bias))
    q, scale = aligned(torch.zeros(m, wide, dtype=torch.int8), wide, 77), torch.zeros(m)
    status = device.quantize_rows_after(
        at(x), DTYPES[dtype], *i64(x.stride(0), m, k), STAGES[after], at(weight), at(bias), at(gate), *i64(k),
        ctypes.c_float(1e-6), None, None, at(q), *i64(wide), at(scale),
    )  # fmt: skip
    assert status == 0
    floats = stage(x.double().float(), after, weight, bias, gate, 1e-6)
    want_q, want_scale = quantize_rows(floats)
    assert (q[:, k:] == 0).all()
    if after == "none":
        assert torch.equal(q[:, :k], want_q) and torch.equal(scale, want_scale)
        return
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    apart = (q[:, :k].int() - want_q.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() <= 1e-3 + 1 / k


def test_poisoned_and_static_rows_behind_a_stage(device: ctypes.CDLL) -> None:
    x = aligned(torch.randn(4, 64), 64, 0)
    x[0, 7], x[1, 63], x[2] = float("nan"), -float("inf"), 0
    scale, zp = torch.tensor([0.03]), torch.tensor([-6], dtype=torch.int32)
    for after in ("rms_norm", "layer_norm", "gelu"):
        for static in (False, True):
            q, scales = aligned(torch.zeros(4, 64, dtype=torch.int8), 64, 0), torch.zeros(4)
            pointers = (at(scale), at(zp)) if static else (None, None)
            status = device.quantize_rows_after(
                at(x), 0, *i64(64, 4, 64), STAGES[after], None, None, None, *i64(0), ctypes.c_float(1e-5),
                *pointers, at(q), *i64(64), at(scales),
            )  # fmt: skip
            assert status == 0 and scales[:2].isnan().all() and scales[2:].isfinite().all()
            rest = -6 if static else 0
            assert (q[:3] == rest).all() and q[3].unique().numel() > 20
            assert not static or (scales[2:] == scale).all()


def test_what_the_staged_quantiser_refuses(device: ctypes.CDLL) -> None:
    x, q, scale = (
        aligned(torch.zeros(2, 64, dtype=d), 64, 0) for d in (torch.float32, torch.int8, torch.float32)
    )

    def status(
        k: int = 64, stride: int = 64, kind: int = 1, x_at: int = 0, gate: Tensor | None = None
    ) -> int:
        begin = ctypes.c_void_p(x.data_ptr() + x_at)
        stage = (*i64(stride, 2, k), kind, None, None, at(gate), *i64(64), ctypes.c_float(1e-5))
        return int(device.quantize_rows_after(begin, 0, *stage, None, None, at(q), *i64(64), at(scale)))

    assert status() == 0 and status(kind=3, gate=x) == 0
    for bad in (
        {"k": 63},
        {"k": 0},
        {"stride": 66},
        {"kind": 6},
        {"x_at": 4},
        {"kind": 3},
        {"gate": x},
        {"k": 16388},
    ):
        assert status(**bad) == -1, bad  # type: ignore[arg-type]


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

"""Our own CUDA code run on the CPU, thread by thread: quantiser, packing, and the epilogue's arithmetic.

The kernels' sources are compiled by the host compiler against a header that gives blocks, warps, barriers and
intrinsics their meaning. It shows wrong indexing, missing barriers' results and wrong arithmetic; it says
nothing about speed, and CUTLASS's main loops are not in it.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from tautorch.reference.common import apply_activation
from tautorch.reference.layouts import encode, unpack_positions
from tautorch.reference.quantize_rows import STAGES, stage
from tautorch.reference.quantizer import quantize_rows, quantize_static

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.int32: 4}
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


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


# ---- few rows ---------------------------------------------------------------------------------------------


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


# Around 8, 16 and 32 rows, 16 and 32 outputs; K around a step of 64 and a turn of the warps (512), and
# more turns than there are stages.
FEW = [(1, 1, 1), (7, 17, 63), (9, 31, 65), (8, 16, 512), (16, 33, 577), (33, 40, 130), (2, 5, 3700)]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kernel", ["stream_8", "stream_16", "stream_32"])
@pytest.mark.parametrize("m,n,k", FEW)
def test_few_int8_rows(device: ctypes.CDLL, kernel: str, m: int, n: int, k: int, late: bool) -> None:
    device.copies_are_late(int(late))
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    want = x.long() @ weight.long().T
    assert torch.equal(product(device, kernel, x, weight, torch.int32, {}).long(), want)
    if not late:
        return
    case = {"x_scale": torch.rand(m), "w_scale": torch.rand(n), "bias": torch.randn(n) * 1000}
    case["x_zero_point"] = torch.tensor([-7], dtype=torch.int32)
    centred = (x.long() + 7) @ weight.long().T
    floats = ((centred.float() * case["x_scale"][:, None]) * case["w_scale"] + case["bias"]).relu()
    same(product(device, kernel, x, weight, torch.bfloat16, case), floats.bfloat16())
    case["x_scale"] = case["x_scale"][:1]
    case |= {"out_scale": torch.tensor([0.4 * k]), "out_zero_point": torch.tensor([-9], dtype=torch.int32)}
    floats = ((centred.float() * case["x_scale"]) * case["w_scale"] + case["bias"]).relu()
    q = (torch.round(floats * (torch.ones(1) / case["out_scale"])) - 9).clamp(-128, 127).to(torch.int8)
    assert torch.equal(product(device, kernel, x, weight, torch.int8, case), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["weight_only_8", "weight_only_16", "weight_only_32"])
@pytest.mark.parametrize("m,n,k", FEW)
def test_few_float_rows(device: ctypes.CDLL, kernel: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    device.copies_are_late(1)
    x = torch.randint(-8, 9, (m, k)).to(dtype)  # sums are exact in any order
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    case = {"w_scale": torch.rand(n), "bias": torch.randn(n) * 100}
    want = ((x.double() @ weight.double().T).float() * case["w_scale"] + case["bias"]).relu()
    assert torch.equal(product(device, kernel, x, weight, torch.float32, case), want)
    x[-1, -1] = float("nan")
    got = product(device, kernel, x, weight, dtype, case)
    assert got[-1].isnan().all() and torch.equal(got[:-1], want[:-1].to(dtype))


def test_every_weight_is_exact_as_a_float(device: ctypes.CDLL) -> None:
    weight = torch.arange(-128, 128).to(torch.int8).reshape(16, 16)
    for dtype in (torch.bfloat16, torch.float16):
        got = product(
            device,
            "weight_only_8",
            torch.eye(16).to(dtype),
            weight,
            torch.float32,
            {"w_scale": torch.ones(16)},
        )
        assert torch.equal(got, weight.T.float().relu())


# ---- 2:4 --------------------------------------------------------------------------------------------------


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


# Around the tiles (128 outputs by 64 rows, 256 by 128), steps of 64 and 5 stages of K, groups of 64 outputs.
TILES = [(1, 1, 1), (65, 129, 64), (63, 64, 65), (64, 70, 460), (129, 257, 130)]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kernel", ["sp24_128x64", "sp24_256x128"])
@pytest.mark.parametrize("m,n,k", TILES)
def test_two_of_four(device: ctypes.CDLL, kernel: str, m: int, n: int, k: int, late: bool) -> None:
    device.copies_are_late(int(late))
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = sparse_weight(n, k)
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    units = room_for(device.units_bytes(*i64(n, k), 1))
    assert device.pack_sparse(at(values), at(places), *i64(n, values.shape[1]), at(units)) == 0
    want = x.long() @ weight.long().T
    assert torch.equal(product(device, kernel, x, weight, torch.int32, {}, units).long(), want)
    if late:
        case = {"x_scale": torch.rand(m), "w_scale": torch.rand(n), "bias": torch.randn(n) * 1000}
        case["x_zero_point"] = torch.tensor([5], dtype=torch.int32)
        acc = ((x.long() - 5) @ weight.long().T).float()
        floats = ((acc * case["x_scale"][:, None]) * case["w_scale"] + case["bias"]).relu()
        same(product(device, kernel, x, weight, torch.bfloat16, case, units), floats.bfloat16())


def float_units(device: ctypes.CDLL, weight: Tensor) -> Tensor:
    """A float weight in units, its stored zeros too."""
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    units = room_for(device.float_units_bytes(*i64(*weight.shape)))
    status = device.pack_sparse_float(
        at(values), at(places), *i64(weight.shape[0], values.shape[1]), at(units)
    )
    assert status == 0
    return units


# Around the tiles and groups as above; steps of 32 of K.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sp24_float_128x64", "sp24_float_256x128"])
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (65, 129, 32), (63, 64, 33), (64, 70, 230), (129, 257, 65)])
def test_two_of_four_floats(
    device: ctypes.CDLL, kernel: str, dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    weight = (sparse_weight(n, k) % 64).to(dtype)
    units = float_units(device, weight)
    x = torch.randint(-8, 9, (m, k)).to(dtype)  # sums are exact in any order
    sums = (x.double() @ weight.double().T).float()
    for late in (1, 0):
        device.copies_are_late(late)
        assert torch.equal(product(device, kernel, x, weight, torch.float32, {}, units), sums.relu())
    bias = torch.randn(n) * 100
    x[-1, -1] = float("nan")  # NaN lies behind every row, and reaches none
    got = product(device, kernel, x, weight, dtype, {"bias": bias}, units)
    assert torch.equal(got[:-1], (sums[:-1] + bias).relu().to(dtype))
    # Where the last input is kept, as a 0 too, and nowhere else.
    places = encode(weight, weight != 0, "2:4")[2]
    assert places is not None
    last = -(-k // 4) * 2  # values of the last group that begins before K
    spoiled = (unpack_positions(places)[:, last - 2 : last] == (k - 1) % 4).any(1)
    assert torch.equal(got[-1].isnan(), spoiled)


def test_float_places_lie_as_torch_puts_them(device: ctypes.CDLL) -> None:
    """torch reorders the places of 16-bit weights for the same instruction, by CUTLASS's rule."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = (sparse_weight(64, 64).abs() % 64).bfloat16()
    kept = torch.arange(64) % 4 < 2
    weight = torch.where(weight == 0, 1, weight) * kept[torch.rand(64, 16, 4).argsort(2).reshape(64, 64)]
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    units = float_units(device, weight).reshape(2, -1)
    ours = units[:, 2048:].contiguous().view(torch.int32).reshape(2, 32, 2)  # [step][lane][word]
    dense, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(dense, values)
    # [step of 32][32 rows][lane]: columns of 16 lie interleaved by 2
    theirs = meta.reshape(-1).view(torch.int32).reshape(2, 2, 32)
    assert torch.equal(ours.permute(0, 2, 1), theirs)
    lane = torch.arange(32)[:, None]
    fragments = units[0, :2048].contiguous().view(torch.bfloat16).reshape(4, 32, 4, 2)
    for tile, register in itertools.product(range(4), range(4)):
        row = 16 * tile + lane // 4 + register % 2 * 8
        column = 2 * (lane % 4) + register // 2 * 8 + torch.arange(2)
        assert torch.equal(fragments[tile, :, register], values[row, column])


def test_places_lie_as_torch_puts_them(device: ctypes.CDLL) -> None:
    """The same of int8, whose places one instruction takes from all lanes."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = torch.randint(1, 128, (64, 128), dtype=torch.int8)
    weight *= (torch.arange(4) < 2)[torch.rand(64, 32, 4).argsort(2).reshape(64, 128)]
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    units = room_for(device.units_bytes(*i64(64, 128), 1))
    assert device.pack_sparse(at(values), at(places), *i64(64, 64), at(units)) == 0
    ours = (
        units.reshape(2, -1)[:, 2048:].contiguous().view(torch.int32).reshape(2, 32, 4)
    )  # [step][lane][tile]
    dense, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(dense, values)
    # [step of 64][16 rows][lane]: columns of 32 lie interleaved by 2
    assert torch.equal(ours.permute(0, 2, 1), meta.reshape(-1).reshape(2, 4, 32))
    lane = torch.arange(32)[:, None]
    fragments = units[:2048].contiguous().view(torch.int8).reshape(4, 32, 4, 4)
    for tile, register in itertools.product(range(4), range(4)):
        row = 16 * tile + lane // 4 + register % 2 * 8
        column = 4 * (lane % 4) + register // 2 * 16 + torch.arange(4)
        assert torch.equal(fragments[tile, :, register], values[row, column])


@pytest.mark.parametrize("n,k", [(1, 1), (64, 128), (65, 130), (70, 460)])
def test_two_of_four_as_wgmma_reads_it(device: ctypes.CDLL, n: int, k: int) -> None:
    """Read back by the layout's description: rows of values, steps of 128 with 16 bytes of places a row."""
    weight = sparse_weight(n, k)
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    kept = values.shape[1]
    room = torch.full((device.wgmma_bytes(*i64(n, 2 * kept)) + 128,), 99, dtype=torch.uint8)
    packed = room[(-room.data_ptr()) % 128 :]
    assert device.pack_wgmma(at(values), at(places), *i64(n, kept), at(packed)) == 0
    ld, steps, rows = -(-kept // 16) * 16, -(-k // 128), -(-n // 64) * 64
    got = packed[: n * ld].view(torch.int8).reshape(n, ld)
    assert torch.equal(got[:, :kept], values) and not got[:, kept:].any()
    start = -(-n * ld // 128) * 128
    byte = packed[start:][: steps * rows * 16].reshape(steps, rows, 16).permute(1, 0, 2).reshape(rows, -1)
    place = (byte[:, :, None] >> torch.tensor([0, 2, 4, 6])) & 3  # [rows, steps * 16, 4]: of 2 pairs
    assert torch.equal(byte[:n, : kept // 4], places)
    assert (byte[n:] == 0x44).all() and (byte[:, kept // 4 :] == 0x44).all()
    # Values at their places are the weight.
    dense = torch.zeros(n, steps * 128, dtype=torch.int8)
    columns = (4 * torch.arange(steps * 32).repeat_interleave(2) + place[:n].reshape(n, -1))[:, :ld]
    dense.scatter_(1, columns[:, :kept], got[:, :kept])
    assert torch.equal(dense[:, :k], weight) and not dense[:, k:].any()


# ---- convolution ------------------------------------------------------------------------------------------

SPARSE_CONVS = ["conv24_64x128", "conv24_128x64", "conv24_256x128"]

# batch, height, width, channels, outputs, then kh, kw, sh, sw, ph, pw, dh, dw
CONVS = [
    (1, 1, 1, 16, 1, 1, 1, 1, 1, 0, 0, 1, 1),
    (2, 5, 7, 16, 65, 3, 3, 1, 1, 1, 1, 1, 1),
    (3, 9, 6, 48, 70, 3, 2, 2, 1, 1, 0, 1, 1),
    (1, 12, 11, 80, 129, 1, 1, 2, 2, 0, 0, 1, 1),
    (2, 6, 5, 208, 70, 1, 1, 1, 1, 1, 0, 1, 1),
    (2, 7, 7, 32, 20, 3, 3, 1, 2, 3, 2, 2, 2),
]


CONV_CASES = [
    *itertools.product(("conv_64x128", "conv_128x64", "conv_128x128"), CONVS),
    *itertools.product(SPARSE_CONVS, [c for c in CONVS if c[5:7] == (1, 1)]),
]


@pytest.mark.parametrize("zero_point", [None, -11])
@pytest.mark.parametrize("kernel,sizes", CONV_CASES, ids=str)
def test_convolution(
    device: ctypes.CDLL, kernel: str, sizes: tuple[int, ...], zero_point: int | None
) -> None:
    device.copies_are_late(int(zero_point is None))
    (batch, height, width, channels, n), (kh, kw, sh, sw, ph, pw, dh, dw) = sizes[:5], sizes[5:]
    x = torch.randint(-128, 128, (batch, channels, height, width), dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, channels, kh, kw), dtype=torch.int8)
    is_sparse = kernel in SPARSE_CONVS
    if is_sparse:
        weight = sparse_weight(n, channels).reshape(weight.shape)
    centred = x.double() - (zero_point or 0)
    want = torch.nn.functional.conv2d(centred, weight.double(), None, (sh, sw), (ph, pw), (dh, dw))
    rows = weight.permute(0, 2, 3, 1).contiguous()
    k = rows[0].numel()
    units = room_for(device.units_bytes(*i64(n, k), int(is_sparse)))
    if is_sparse:
        values, _, places = encode(weight.reshape(n, k), weight.reshape(n, k) != 0, "2:4")
        status = device.pack_sparse(at(values), at(places), *i64(n, k // 2), at(units))
    else:
        status = device.pack_dense(at(rows), *i64(k, n, k), at(units))
    assert status == 0
    pixels = room_for(x.numel()).view(torch.int8).reshape(batch, height, width, channels)
    pixels.copy_(x.permute(0, 2, 3, 1))
    sums, outside = weight.sum((1, 2, 3), dtype=torch.int32), room_for(16)
    zp = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    scale, w_scale, bias = torch.rand(batch), torch.rand(n), torch.randn(n) * 1000

    def run(out: torch.dtype) -> Tensor:
        ldy = -(-n // 8) * 8
        size = batch * want.shape[2] * want.shape[3] * ldy
        y = room_for(size * out.itemsize).view(out).reshape(batch, want.shape[2], want.shape[3], ldy)
        status = device.conv(
            kernel.encode(), (ctypes.c_int64 * 5)(*sizes[:5]), (ctypes.c_int64 * 8)(*sizes[5:]), at(pixels),
            at(units), at(sums), at(scale), *i64(batch), at(w_scale), at(bias), at(zp), at(outside),
            DTYPES[out], at(y), *i64(ldy),
        )  # fmt: skip
        assert status == 0
        return y[..., :n].permute(0, 3, 1, 2)

    assert torch.equal(run(torch.int32).double(), want)
    floats = (want.float() * scale[:, None, None, None]) * w_scale[:, None, None] + bias[:, None, None]
    same(run(torch.bfloat16), floats.bfloat16())

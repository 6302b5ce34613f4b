"""sparse_linear's 2:4 kernels, int8 and float, and wgmma.sp's packing, run on the CPU."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from tautorch.reference.layouts import encode, unpack_positions

from .emulated import at, i64, product, room_for, same, sparse_weight

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

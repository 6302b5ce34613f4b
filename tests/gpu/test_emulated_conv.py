"""The convolutions on packed weights, dense and 2:4, run on the CPU."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from tautorch.reference.layouts import encode

from .emulated import DTYPES, at, i64, room_for, same, sparse_weight

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

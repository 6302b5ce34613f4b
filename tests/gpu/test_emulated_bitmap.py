"""sparse_linear's kernels for single int8 weights, on what Python packs for them, run on the CPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.ops import _sparse_bitmap_gpu as bitmap
from tautorch.reference.layouts import encode

from .emulated import aligned, product, same


@pytest.fixture(autouse=True)
def layouts(device: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's word on where the parts of a pack lie."""

    def layout(n: int, k: int) -> dict[str, int]:
        parts = (ctypes.c_int64 * 5)()
        device.bitmap_layout(ctypes.c_int64(n), ctypes.c_int64(k), parts)
        names = ("tiles", "steps", "offsets_off", "sums_off", "values_off")
        return dict(zip(names, parts, strict=True))

    monkeypatch.setattr(dispatch, "cuda", SimpleNamespace(sparse_linear_bitmap_layout=layout))


def packed(weight: Tensor, mask: Tensor, pattern: str = "unstructured") -> Tensor:
    values, crow, col = encode(weight, mask, pattern)
    assert crow is not None
    n, k = weight.shape
    made = bitmap.pack(*bitmap.entries(values, crow, col, n), (n, k))
    parts = dispatch.cuda.sparse_linear_bitmap_layout(n, k)
    sums = made[parts["sums_off"] :][: 4 * n].view(torch.int32)
    assert torch.equal(sums, (weight * mask).sum(1, dtype=torch.int32))
    return aligned(made[None], -(-made.numel() // 64) * 64, 0x5A)[0]  # what lies behind is not 0


# Around 8, 16 and 32 rows and 16 outputs; K around a step of 64 and a turn of the warps (512), and more turns
# than there are stages.
SIZES = [(1, 1, 1), (7, 17, 63), (9, 15, 65), (8, 16, 512), (16, 33, 577), (33, 18, 130), (2, 5, 3700)]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("kernel", ["bitmap_8", "bitmap_16", "bitmap_32"])
@pytest.mark.parametrize("m,n,k", SIZES)
def test_single_weights(device: ctypes.CDLL, kernel: str, m: int, n: int, k: int, late: bool) -> None:
    device.copies_are_late(int(late))
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    mask = torch.rand(n, k) < torch.rand(n, 1)  # rows of every density
    kept = weight * mask
    want = x.long() @ kept.long().T
    made = packed(weight, mask)
    assert torch.equal(product(device, kernel, x, kept, torch.int32, {}, made).long(), want)
    if not late:
        return
    case = {"x_scale": torch.rand(m), "w_scale": torch.rand(n), "bias": torch.randn(n) * 1000}
    case["x_zero_point"] = torch.tensor([-7], dtype=torch.int32)
    centred = (x.long() + 7) @ kept.long().T
    floats = ((centred.float() * case["x_scale"][:, None]) * case["w_scale"] + case["bias"]).relu()
    same(product(device, kernel, x, kept, torch.bfloat16, case, made), floats.bfloat16())
    case |= {"out_scale": torch.tensor([0.4 * k]), "out_zero_point": torch.tensor([-9], dtype=torch.int32)}
    q = (torch.round(floats * (torch.ones(1) / case["out_scale"])) - 9).clamp(-128, 127).to(torch.int8)
    assert torch.equal(product(device, kernel, x, kept, torch.int8, case, made), q)


@pytest.mark.parametrize("kept", ["none", "all", "one unit", "4x1"])
def test_extreme_masks(device: ctypes.CDLL, kept: str) -> None:
    """Units without values, full ones (the most a stage holds), blocks of 4 outputs, the last one short."""
    device.copies_are_late(1)
    n, k, pattern = 35, 200, "unstructured"
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    mask = torch.full((n, k), kept == "all")
    if kept == "one unit":
        mask[16:32, 64:128] = True
    if kept == "4x1":
        pattern, mask = kept, (torch.rand(9, k) < 0.3).repeat_interleave(4, 0)[:n]
    x = torch.randint(-128, 128, (3, k), dtype=torch.int8)
    got = product(device, "bitmap_8", x, weight * mask, torch.int32, {}, packed(weight, mask, pattern))
    assert torch.equal(got.long(), x.long() @ (weight * mask).long().T)


def test_every_way_to_keep_eight(device: ctypes.CDLL) -> None:
    """All 256 ways to keep 8 adjacent weights, in both places of 16, behind many numbers of values."""
    device.copies_are_late(0)
    ways = torch.arange(256).repeat(16) | torch.randint(256, (4096,)) << 8
    ways[2048:] = ways[2048:] >> 8 | (ways[2048:] & 255) << 8
    mask = (ways[:, None] >> torch.arange(16) & 1).bool().reshape(16, -1)  # 16 outputs, K 4096
    weight = torch.randint(1, 128, mask.shape, dtype=torch.int8)
    x = torch.randint(-128, 128, (1, mask.shape[1]), dtype=torch.int8)
    got = product(device, "bitmap_8", x, weight * mask, torch.int32, {}, packed(weight, mask))
    assert torch.equal(got.long(), x.long() @ (weight * mask).long().T)

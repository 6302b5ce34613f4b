"""int8_linear's kernels for few rows, int8 and weight-only, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from .emulated import product, same

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

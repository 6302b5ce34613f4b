"""Packed weights: they give the canonical ones back, and broken ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tautorch import _C, dispatch, ops
from tautorch.ops import packing
from tautorch.ops.int8_linear import pack, unpack
from tautorch.reference.layouts import encode
from tautorch.reference.quantizer import MAX_K, MAX_K_LOWEST
from tautorch.testing.values import LINEAR_SIZES, float_values, int8_values

KERNELS = [name for name, available in _C.isas().items() if available]


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense_packs_give_the_weight_back(kernel: str) -> None:
    for _, n, k in LINEAR_SIZES:
        weight = int8_values((n, k), low=-127)
        for weight_only in (False, True):
            packed = pack(weight, weight_only, kernel)
            assert packed.dtype == torch.uint8 and packed.dim() == 1
            info = packing.pack_info(packed)
            assert (info["n"], info["k"], info["kernel"]) == (n, k, kernel)
            assert torch.equal(unpack(packed), weight)
        factor = float_values((n, k))
        assert torch.equal(unpack(pack(factor, kernel=kernel)), factor)


def test_packing_does_not_care_for_strides() -> None:
    weight = int8_values((40, 33), low=-127)
    assert torch.equal(pack(weight.T.contiguous().T), pack(weight))


def test_broken_packs_are_refused() -> None:
    packed = pack(int8_values((40, 33), low=-127))
    x, scale = torch.ones(2, 33), torch.ones(40)
    assert ops.int8_linear(x, packed, scale).shape == (2, 40)

    def refused(broken: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ops.int8_linear(x, broken, scale)
        with pytest.raises(ValueError, match=message):
            unpack(broken)

    refused(packed[:10].clone(), "shorter than their header")
    refused(packed[:-1].clone(), "are cut short")
    refused(torch.zeros_like(packed), "have no header of this version")
    other = packed.clone()
    other[4] ^= 0x55  # the version
    refused(other, "have no header of this version")
    other = packed.clone()
    other[12] = 99  # the instruction set
    refused(other, "a kernel this build does not have")


def test_a_pack_of_another_shape_is_refused() -> None:
    packed = pack(int8_values((40, 33), low=-127))
    with pytest.raises(ValueError, match=r"int8_linear: x must be \[..., 33\]"):
        ops.int8_linear(torch.ones(2, 34), packed, torch.ones(40))
    with pytest.raises(ValueError, match=r"int8_linear: weight_scale must be \[40\]"):
        ops.int8_linear(torch.ones(2, 33), packed, torch.ones(41))


def test_large_packs_start_on_a_huge_page() -> None:
    for size in (1, (2 << 20) - 1):
        assert packing.pack_buffer(size).numel() == size
    for size in (2 << 20, (5 << 20) + 3):
        buffer = packing.pack_buffer(size)
        assert buffer.numel() == size and buffer.data_ptr() % (2 << 20) == 0


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
def test_minus_128_is_refused_where_int32_sums_could_overflow(kernel: str) -> None:
    assert 255 * 128 * MAX_K_LOWEST < 2**31 <= 255 * 128 * (MAX_K_LOWEST + 1)
    scale, point = torch.ones(1), torch.tensor([-128], dtype=torch.int32)
    static: dict[str, Any] = {"x_scale": scale, "x_zero_point": point, "out_dtype": torch.int32}

    def linear(k: int, fill: int) -> torch.Tensor:
        x = torch.full((1, k), 127, dtype=torch.int8)
        with dispatch.force("int8_linear", kernel):
            return ops.int8_linear(x, torch.full((1, k), fill, dtype=torch.int8), scale, **static)

    def conv(k: int, groups: int, fill: int) -> torch.Tensor:
        x = torch.full((1, groups * k, 1, 2), 127, dtype=torch.int8)
        weight = torch.full((groups, k, 1, 2), fill, dtype=torch.int8)
        with dispatch.force("int8_conv2d", kernel):
            return ops.int8_conv2d(x, weight, torch.ones(groups), groups=groups, **static)

    def sparse(k: int, fill: int) -> torch.Tensor:
        values, crow, col = encode(torch.full((1, k), fill, dtype=torch.int8), None, "unstructured", 1)
        x = torch.full((1, k), 127, dtype=torch.int8)
        with dispatch.force("sparse_linear", kernel):
            return ops.sparse_linear(
                x, values, crow, col, scale, pattern="unstructured", out_features=1, **static
            )

    assert linear(MAX_K_LOWEST, -128).item() == -255 * 128 * MAX_K_LOWEST
    assert linear(MAX_K, -127).item() == -255 * 127 * MAX_K
    half = MAX_K_LOWEST // 2
    assert conv(half, 1, -128).item() == -255 * 128 * 2 * half
    assert (conv(half, 2, -128) == -255 * 128 * 2 * half).all()  # each group by itself
    message = r"weight must be in \[-127, 127\] where K is above 65793, got -128 with K="
    with pytest.raises(ValueError, match=message + "65794; clamp it to -127 or split the layer"):
        linear(MAX_K_LOWEST + 1, -128)
    with pytest.raises(ValueError, match=message + "65794"):
        conv(half + 1, 1, -128)
    with pytest.raises(ValueError, match=message + "65794"):
        sparse(MAX_K_LOWEST + 1, -128)

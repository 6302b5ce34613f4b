"""Bytes, addresses and numbers that no caller should give the extension: refused, and nothing is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import _C, dispatch, ops
from tautorch.ops import packing, sparse_entries, tails
from tautorch.ops.int8_linear import pack, unpack
from tautorch.reference.layouts import encode
from tautorch.testing.values import int8_values

KERNELS = [name for name, available in _C.isas().items() if available]
N, K = 40, 33
SPARSE = (packing.SPARSE_I8, packing.SPARSE_F32, packing.PAIRS_I8)


def tail(mode: int = tails.DYNAMIC, **changes: int) -> dict[str, int]:
    """The tail of a plan without scales."""
    codes, _ = tails.tail(
        weight_scale=None, bias=None, mode=mode, x_scale=None, x_zero_point=None, activation="none"
    )
    return {**codes, **changes}


def sparse_pack(kernel: str, dtype: torch.dtype = torch.int8) -> Tensor:
    """A 4x1 pack of [N, K]."""
    weight = int8_values((N, K), low=-127).to(dtype)
    weight[:, ::2] = 0
    values, crow, col = encode(weight, None, "4x1", 1)
    return sparse_entries.pack(values, crow, col, "4x1", (N, K), kernel=kernel, op="sparse_linear")


def block_pack(kernel: str) -> Tensor:
    """A 16x16 pack of [N, K], in cells where the kernel has them."""
    weight = int8_values((N, K), low=-127)
    weight[:16, 16:] = 0
    return sparse_entries.pack(*encode(weight, None, "16x16", 1), "16x16", (N, K), kernel=kernel, op="test")


def pairs_pack(kernel: str) -> Tensor:
    """A 2:4 pack of [N, K], dense where the kernel has no other."""
    weight = int8_values((N, K), low=-127)
    weight[:, ::4] = weight[:, 3::4] = 0
    kind = packing.PAIRS_I8 if _C.pairs_pay(kernel, 512, 512) else packing.DENSE_I8
    return packing.dense_pack(kernel, kind, weight, 1, N, K, 1, (K, 1, 1))


def conv_pack(kernel: str) -> Tensor:
    """A dense pack of [N, K, 1, taps] in two groups, of three taps."""
    groups, taps = 2, 3
    w = int8_values((groups * N, K, taps), low=-127)
    return packing.dense_pack(kernel, packing.DENSE_I8, w, groups, N, K, taps, (K * taps, taps, 1))


def plan(packed: Tensor) -> bytes:
    """A plan of the operator the pack is for."""
    sparse = packing.pack_info(packed)["kind"] in SPARSE
    make = _C.sparse_linear_plan if sparse else _C.int8_linear_plan
    kind = packing.pack_info(packed)["kind"]
    mode = tails.NONE if kind in (packing.DENSE_F32, packing.DENSE_W8, packing.SPARSE_F32) else tails.DYNAMIC
    return make(packed.data_ptr(), packed.numel(), K, tail(mode))


def run_or_refuse(packed: Tensor) -> bool:
    """Run a pack with x of K inputs, or say that it was refused."""
    try:
        info, made = packing.pack_info(packed), plan(packed)
    except ValueError as error:
        assert "packed weights" in str(error)
        return True
    x, out = torch.randn(3, K), torch.empty(3, int(info["n"]))
    sparse = info["kind"] in SPARSE
    run = _C.sparse_linear_run if sparse else _C.int8_linear_run
    run(made, x.data_ptr(), 0, 3, K, out.data_ptr(), 0)
    return False


HEADER = 160  # bytes
ISA, SIZE_N = 3, 10  # 32-bit words of it
PACKS: dict[str, Callable[[str], Tensor]] = {
    "dense_i8": lambda kernel: pack(int8_values((N, K), low=-127), kernel=kernel),
    "dense_w8": lambda kernel: pack(int8_values((N, K), low=-127), True, kernel),
    "dense_f32": lambda kernel: pack(torch.randn(N, K), kernel=kernel),
    "sparse_i8": sparse_pack,
    "sparse_f32": lambda kernel: sparse_pack(kernel, torch.float32),
    "blocks_i8": block_pack,
    "pairs_i8": pairs_pack,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", PACKS)
def test_tampered_headers_are_refused(kind: str, kernel: str) -> None:
    packed = PACKS[kind](kernel)
    words = packed[:HEADER].view(torch.int32)
    for word in range(words.numel()):
        for value in (-1, 1, 7, 2**31 - 1, int(words[word]) + 1, int(words[word]) + 64):
            if int(words[word]) == value:
                continue
            broken = packed.clone()
            broken[:HEADER].view(torch.int32)[word] = value
            # The header of another instruction set or of another n may be whole too: then it runs in bounds.
            refused = run_or_refuse(broken)
            assert refused or word in (ISA, SIZE_N)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["sparse_i8", "sparse_f32"])
def test_tampered_lists_are_refused(kind: str, kernel: str) -> None:
    packed = PACKS[kind](kernel)
    info = packing.pack_info(packed)
    for name, width in (("start_offset", 4), ("index_offset", 2)):
        at = int(info[name])
        for byte in (at + width - 1, at + width, at + 2 * width - 1):
            broken = packed.clone()
            broken[byte] = 0xFF
            with pytest.raises(ValueError, match="inputs they do not have"):
                plan(broken)


@pytest.mark.parametrize("kind", PACKS)
def test_whatever_passes_runs_within_bounds(kind: str) -> None:
    """Under `make sanitize` this finds reads that the checks should have ruled out."""
    draw = random.Random(5)
    passed = 0
    for _ in range(300):
        packed = PACKS[kind](draw.choice(KERNELS))
        for _ in range(draw.choice((1, 2))):
            packed[draw.randrange(packed.numel())] = draw.randrange(256)
        passed += not run_or_refuse(packed)
    assert 0 < passed < 300


def test_misaligned_packs_are_refused() -> None:
    packed = PACKS["dense_i8"]("scalar")
    moved = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    moved[1:] = packed
    with pytest.raises(ValueError, match="multiple of 8 bytes; clone them"):
        plan(moved[1:])


def test_packs_of_another_shape_are_not_unpacked() -> None:
    with pytest.raises(ValueError, match="unpack: packed weights are of another shape"):
        unpack(conv_pack("scalar"))
    with pytest.raises(ValueError, match="unpack: packed weight must hold"):
        ops.geometry.unpack(conv_pack("scalar"), (2 * N, K, 3, 3))
    with pytest.raises(ValueError, match="unpack: packed weights are sparse"):
        unpack(sparse_pack("scalar"))


def test_low_rank_packs_must_be_what_they_are_said_to_be() -> None:
    rank, out = 5, 7
    down, up = (pack(torch.randn(shape)) for shape in ((rank, K), (out, rank)))
    x = torch.randn(2, K)
    call = torch.ops.tautorch.lowrank_linear
    assert call(x, down, up, None, None, None, out, rank).shape == (2, out)
    with pytest.raises(ValueError, match="packed down must hold"):
        call(x, down, up, None, None, None, out, rank + 1)
    with pytest.raises(ValueError, match="packed up must hold"):
        call(x, down, up, None, None, None, out - 1, rank)


def test_scales_and_bias_must_fit_the_pack() -> None:
    packed, few = PACKS["dense_i8"]("scalar"), torch.ones(N - 1)
    for name in ("weight_scale", "bias"):
        vectors: dict[str, Any] = {"weight_scale": None, "bias": None, name: few}
        codes, _keep = tails.tail(
            **vectors, mode=tails.DYNAMIC, x_scale=None, x_zero_point=None, activation="none"
        )
        with pytest.raises(ValueError, match=f"{name} must have {N} values, .* got {N - 1}"):
            _C.int8_linear_plan(packed.data_ptr(), packed.numel(), K, codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": 5}, "activation must be a known code, got 5"),
        ({"activation": -1}, "activation must be a known code, got -1"),
        ({"mode": 4}, "mode must be a known code, got 4"),
        ({"mode": tails.NONE}, "of another kind than the activations"),
        ({"mode": tails.STATIC}, "x_scale must be given, got none"),
        ({"mode": tails.GIVEN, "x_scales": 1}, "x_scale must be given, got none"),
    ],
)
def test_impossible_tails_are_refused(changes: dict[str, int], message: str) -> None:
    packed = PACKS["dense_i8"]("scalar")
    with pytest.raises(ValueError, match=message):
        _C.int8_linear_plan(packed.data_ptr(), packed.numel(), K, tail(**changes))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
def test_scales_without_an_inverse_are_refused(value: float) -> None:
    w, s, scale = int8_values((N, K), low=-127), torch.ones(N), torch.tensor([value])
    with pytest.raises(ValueError, match="int8_linear: x_scale must be positive and finite"):
        ops.int8_linear(torch.ones(2, K), w, s, x_scale=scale)
    with pytest.raises(ValueError, match="int8_linear: out_scale must be positive and finite"):
        ops.int8_linear(torch.ones(2, K), w, s, out_scale=scale)


@pytest.mark.parametrize("value", [-129, 128, 2**31 - 1, -(2**31)])
def test_zero_points_out_of_range_are_refused(value: int) -> None:
    w, s, point = int8_values((N, K), low=-127), torch.ones(N), torch.tensor([value], dtype=torch.int32)
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"int8_linear: x_zero_point must be in \[-128, 127\], got"):
        ops.int8_linear(torch.ones(2, K), w, s, x_scale=one, x_zero_point=point)
    with pytest.raises(ValueError, match=r"int8_linear: out_zero_point must be in \[-128, 127\], got"):
        ops.int8_linear(torch.ones(2, K), w, s, out_scale=one, out_zero_point=point)


def test_plans_run_by_their_own_operator_and_dtypes_only() -> None:
    packed, x, out = PACKS["dense_i8"]("scalar"), torch.randn(3, K), torch.empty(3, N)
    own = plan(packed)

    def run(function: Any, plan_: bytes, x_code: int = 0, rows: int = 3, out_code: int = 0) -> None:
        function(plan_, x.data_ptr(), x_code, rows, K, out.data_ptr(), out_code)

    run(_C.int8_linear_run, own)
    for other in (_C.sparse_linear_run, _C.lowrank_linear_run):
        with pytest.raises(TypeError, match="no plan of this function"):
            run(other, own)
    with pytest.raises(TypeError, match="no plan of this function"):
        run(_C.int8_linear_run, own[:-1])
    for x_code in (-1, 3, 4, 99):
        with pytest.raises(ValueError, match=f"not for x of dtype code {x_code}"):
            run(_C.int8_linear_run, own, x_code=x_code)
    for out_code in (-1, 5):
        with pytest.raises(ValueError, match=f"not for out of dtype code {out_code}"):
            run(_C.int8_linear_run, own, out_code=out_code)
    with pytest.raises(ValueError, match="rows must not be negative"):
        run(_C.int8_linear_run, own, rows=-1)
    weight_only = PACKS["dense_w8"]("scalar")  # has no int32 accumulators
    with pytest.raises(ValueError, match="not for out of dtype code 4"):
        run(_C.int8_linear_run, plan(weight_only), out_code=4)


def test_a_plan_of_row_scales_runs_as_many_rows_only() -> None:
    packed, scales = PACKS["dense_i8"]("scalar"), torch.ones(3)
    codes, _keep = tails.tail(
        weight_scale=None, bias=None, mode=tails.GIVEN, x_scale=scales, x_zero_point=None, activation="none"
    )
    made = _C.int8_linear_plan(packed.data_ptr(), packed.numel(), K, codes)
    x, out = torch.zeros(4, K, dtype=torch.int8), torch.empty(4, N)
    _C.int8_linear_run(made, x.data_ptr(), 3, 3, K, out.data_ptr(), 0)
    with pytest.raises(ValueError, match="is for 3 scales of x, got 4"):
        _C.int8_linear_run(made, x.data_ptr(), 3, 4, K, out.data_ptr(), 0)


@pytest.mark.parametrize("change", range(1, 9))
def test_impossible_geometries_are_refused(change: int) -> None:
    packed = conv_pack("scalar")
    good = [2 * K, 1, 3, 1, 1, 0, 0, 1, 1]
    make = _C.int8_conv2d_plan
    assert make(packed.data_ptr(), packed.numel(), tuple(good), tail())
    for value in (-1, 2**31, *([0] if change not in (5, 6) else [])):
        geometry = tuple(value if i == change else g for i, g in enumerate(good))
        with pytest.raises(ValueError, match="geometry is out of range"):
            make(packed.data_ptr(), packed.numel(), geometry, tail())


def test_images_smaller_than_the_filter_are_refused() -> None:
    packed = conv_pack("scalar")
    # With stride 2 a plain division would round (2 - 3) / 2 up to 0, and find one output.
    made = _C.int8_conv2d_plan(packed.data_ptr(), packed.numel(), (2 * K, 1, 3, 1, 2, 0, 0, 1, 1), tail())
    for width in (2, 0, -1):
        with pytest.raises(ValueError, match="at least as large as the filter"):
            _C.int8_conv2d_run(made, 0, 0, 1, 1, width, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, 0), (2**40, 2**40, 1, 1), (1, 2**62, 1, 1)],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int, int]) -> None:
    for kind in (packing.DENSE_I8, packing.DENSE_F32, packing.DENSE_W8):
        with pytest.raises(ValueError, match="sizes are out of range"):
            _C.dense_pack_bytes("scalar", kind, *sizes)
    for kind in (-1, packing.SPARSE_I8, 7, packing.DEPTHWISE_I8):
        with pytest.raises(ValueError, match=r"no dense kind|sizes"):
            _C.dense_pack_bytes("scalar", kind, 1, 2, 2, 1)
    index = torch.tensor([0, 3], dtype=torch.int16)
    for start, gs, n, k in (
        ([0, 2, 1], 1, 2, 5),  # starts descend
        ([0, 1, 2], 1, 3, 5),  # and are too few
        ([0, 1, 2], 2, 2, 5),  # no such group
        ([0, 1, 2], 1, 2, 65537),  # too many inputs
        ([0, 1, 2], 1, 2, 3),  # input 3 of 3
    ):
        with pytest.raises(ValueError, match=r"start must ascend|sizes are out of range"):
            at = torch.tensor(start, dtype=torch.int32)
            _C.sparse_pack_bytes(
                "scalar", packing.SPARSE_I8, gs, 1, n, k, 1, 2, at.data_ptr(), index.data_ptr(), 0
            )
    twice = torch.tensor([3, 3], dtype=torch.int16)
    at = torch.tensor([0, 2, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="inputs of each group must ascend"):
        _C.sparse_pack_bytes(
            "scalar", packing.SPARSE_I8, 1, 1, 2, 5, 1, 2, at.data_ptr(), twice.data_ptr(), 0
        )
    with pytest.raises(ValueError, match="form must be 0"):
        _C.sparse_pack_bytes(
            "scalar", packing.SPARSE_I8, 1, 1, 2, 5, 1, 2, at.data_ptr(), index.data_ptr(), 6
        )
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        _C.peak_i8("scalar", 0)
    with pytest.raises(ValueError, match="unknown kernel 'none'"):
        _C.peak_f32("none", 1)
    assert _C.peak_f32("scalar", 3) > 0


@pytest.mark.parametrize("name", ["weight_scale", "bias", "x_scale", "x_zero_point", "out_scale"])
def test_tensors_elsewhere_are_refused(name: str) -> None:
    """A kernel reads them at their addresses, which mean nothing here."""
    tensors = {
        "weight_scale": torch.ones(N),
        "bias": torch.ones(N),
        "x_scale": torch.ones(1),
        "x_zero_point": torch.zeros(1, dtype=torch.int32),
        "out_scale": torch.ones(1),
    }
    tensors[name] = tensors[name].to("meta")
    scale, bias = tensors.pop("weight_scale"), tensors.pop("bias")
    with pytest.raises(ValueError, match=f"int8_linear: {name} must be on cpu like x, got meta"):
        ops.int8_linear(torch.ones(2, K), int8_values((N, K), low=-127), scale, bias, **tensors)


def test_a_pack_of_another_convolution_is_refused() -> None:
    """Float packs have no scale whose length would tell."""
    weight = torch.randn(64, 4, 3, 3)
    layout = encode(weight, None, "unstructured", 1)
    packed = sparse_entries.pack(*layout, "unstructured", (64, 4, 3, 3), kernel="scalar", op="test")
    x = torch.randn(1, 4, 5, 5)
    with dispatch.force("sparse_conv2d", "scalar"):
        for shape, groups in (((8, 4, 3, 3), 1), ((128, 4, 3, 3), 1), ((64, 2, 3, 3), 2), ((64, 4, 3, 3), 2)):
            image = x if shape[1] * groups == 4 else torch.randn(1, shape[1] * groups, 5, 5)
            with pytest.raises(ValueError, match=r"must (hold|have)"):
                ops.sparse_conv2d(
                    image, packed, None, None, None, pattern="unstructured", weight_shape=shape, groups=groups
                )


def test_strided_packs_are_refused() -> None:
    packed = PACKS["dense_i8"]("scalar")
    wide = torch.zeros(packed.numel(), 2, dtype=torch.uint8)
    wide[:, 0] = packed
    for broken in (wide[:, 0], packed[:1].expand(packed.numel()), wide):
        with pytest.raises(ValueError, match="must be contiguous"):
            packing.pack_info(broken)

"""`encode` and `decode`: the same bits, the smallest method, and nothing but CodingError for other bytes."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tautorch.coding import CodingError, decode, encode, methods_of
from tautorch.coding.channel import Reader, Writer

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
)
SHAPES = ((), (0,), (1,), (7,), (0, 4), (1, 1), (3, 200), (200, 3), (33, 17), (4, 3, 3, 3), (2, 0, 5))


def same(a: Tensor, b: Tensor) -> bool:
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)


def round_trip(tensor: Tensor) -> str:
    data = encode(tensor)
    assert same(decode(data, tensor.dtype, tensor.shape), tensor)
    return methods_of(data)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_bits_of_any_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """NaN payloads, infinities and negative zeros are bits as others are; sparse and few-valued ones too."""
    generator = torch.Generator().manual_seed(len(shape))
    full = random_bits(dtype, shape, generator)
    round_trip(full)
    kept = torch.rand(shape, generator=generator) < 0.2
    round_trip(torch.where(kept, full, torch.zeros((), dtype=dtype)))
    if full.numel():
        round_trip(full.reshape(-1)[torch.randint(0, min(5, full.numel()), shape, generator=generator)])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    distinct=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
    stripes=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_clustered_and_pruned_matrices(
    rows: int, columns: int, distinct: int, density: float, stripes: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    codebook = generator.normal(size=distinct).astype(np.float32)
    weight = codebook[generator.integers(0, distinct, (rows, columns))]
    chance = np.full((rows, columns), density)
    if stripes:
        chance[:, ::3] = 0
    round_trip(torch.from_numpy(np.where(generator.random((rows, columns)) < chance, weight, np.float32(0))))


def test_negative_zero_is_not_zero() -> None:
    weight = torch.zeros(40, 40)
    weight[::2] = -0.0
    assert same(decode(encode(weight), weight.dtype, weight.shape), weight)


def test_strides_do_not_matter() -> None:
    weight = torch.randn(30, 40).t()[::2]
    assert encode(weight) == encode(weight.contiguous())


def entropy_bytes(*counts: int) -> float:
    total = sum(counts)
    return sum(-n * math.log2(n / total) for n in counts if n) / 8


def test_a_clustered_pruned_matrix_takes_its_entropy() -> None:
    """Even positions and values: nothing can beat the entropy, and the coder is within 2 % and 120 bytes."""
    generator = np.random.default_rng(3)
    kept = generator.random((200, 300)) < 0.08
    index = generator.integers(0, 16, kept.shape)
    weight = np.where(kept, np.linspace(-1, 1, 16, dtype=np.float32)[index], np.float32(0))
    data = encode(torch.from_numpy(weight))
    n = int(kept.sum())
    limit = entropy_bytes(n, kept.size - n) + n * 4 / 8
    assert methods_of(data) == "palette"
    assert limit * 0.98 < len(data) - 64 < limit * 1.02 + 120  # 64 bytes: the palette itself


def test_structure_of_a_mask_is_used() -> None:
    """Dead inputs and neighbours that go together: far below the entropy of the density alone."""
    generator = np.random.default_rng(4)
    fields = generator.random((300, 49)) < 0.1
    kept = np.repeat(fields, 16, axis=1)
    kept[:, 600:] = False
    weight = np.where(kept, np.float32(1), np.float32(0))
    n = int(kept.sum())
    assert len(encode(torch.from_numpy(weight))) < 0.4 * entropy_bytes(n, kept.size - n)


def test_signs_of_neighbours_are_used() -> None:
    generator = np.random.default_rng(5)
    sign = np.repeat(generator.choice([-1.0, 1.0], (100, 20)), 20, axis=1)
    size = generator.integers(1, 9, sign.shape)
    smooth = encode(torch.from_numpy((sign * size).astype(np.float32)))
    rough = encode(torch.from_numpy((generator.choice([-1.0, 1.0], sign.shape) * size).astype(np.float32)))
    saved = sign.size / 8 - sign.size * entropy_bytes(1, 19) * 8 / 20 / 8  # one sign in 20 is a surprise
    assert len(rough) - len(smooth) > 0.8 * saved


@pytest.mark.parametrize(
    ("tensor", "method", "ratio"),
    [
        (torch.randn(256, 256), "bytes", 1.15),
        (torch.randn(256, 256).bfloat16(), "bytes", 1.4),
        ((torch.randn(256, 256) * 32).clamp(-127, 127).to(torch.int8), None, 1.1),
        (torch.arange(0, 5000, 3, dtype=torch.int32), "differences", 50),
        (torch.nn.functional.dropout(torch.randn(256, 256), 0.9), "sparse", 5),
        (torch.zeros(1000, 1000), "palette", 100_000),
    ],
)
def test_method_and_ratio(tensor: Tensor, method: str | None, ratio: float) -> None:
    data = encode(tensor)
    assert method is None or methods_of(data) == method
    assert tensor.nbytes / len(data) > ratio


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), [1.0]])
def test_what_cannot_be_encoded(tensor: object) -> None:
    with pytest.raises(TypeError, match="encode: tensor must be"):
        encode(tensor)  # type: ignore[arg-type]


def samples() -> list[Tensor]:
    generator = np.random.default_rng(6)
    kept = generator.random((20, 30)) < 0.3
    clustered = np.where(kept, generator.integers(1, 7, kept.shape), 0).astype(np.float32)
    floats = np.where(kept, generator.normal(size=kept.shape), 0).astype(np.float32)
    return [
        torch.from_numpy(clustered),
        torch.from_numpy(floats),
        torch.from_numpy(generator.normal(size=600).astype(np.float16)),
        torch.arange(100),
    ]


@settings(max_examples=120, deadline=None)
@given(which=st.integers(0, 3), at=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_bytes_are_an_error_or_another_tensor(which: int, at: int, value: int, cut: bool) -> None:
    tensor = samples()[which]
    data = bytearray(encode(tensor))
    at %= len(data)
    if cut:
        data = data[:at]
    else:
        data[at] = value
    try:
        found = decode(bytes(data), tensor.dtype, tensor.shape)
    except CodingError:
        return
    assert found.shape == tensor.shape and found.dtype == tensor.dtype


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), dtype=st.sampled_from(DTYPES))
def test_any_bytes_are_an_error_or_a_tensor(data: bytes, dtype: torch.dtype) -> None:
    with suppress(CodingError):
        assert decode(data, dtype, (9, 10)).shape == (9, 10)


def test_data_left_over_is_an_error() -> None:
    writer = Writer()
    writer.number(0, 4)
    writer.raw(bytes(9), 9)
    with pytest.raises(CodingError, match="more data"):
        decode(writer.finish(), torch.float32, (2,))


def test_a_bool_is_0_or_1() -> None:
    writer = Writer()
    writer.number(0, 4)
    writer.raw(b"\2", 1)
    with pytest.raises(CodingError, match="a bool must be 0 or 1"):
        decode(writer.finish(), torch.bool, (1,))


def test_numbers_beyond_their_limit() -> None:
    writer = Writer()
    writer.number(300, 300)
    with pytest.raises(CodingError, match=r"in \[0, 299\], got 300"):
        Reader(writer.finish()).number(0, 299)
    with pytest.raises(ValueError, match=r"in \[0, 3\], got 4"):
        writer.number(4, 3)

"""A tensor as bytes and back, bit for bit, by the method that makes it smallest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tautorch.coding import scan
from tautorch.coding.channel import Bytes, Channel, CodingError, Reader, Scale, Writer
from tautorch.coding.positions import pass_positions

Words = NDArray[np.unsignedinteger]

#: A method's number in the format is its place here.
METHODS = ("raw", "bytes", "differences", "palette", "sparse")
_UNSIGNED: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MAX_PALETTE = 4096
_INTEGERS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class _Form:
    """What both directions know of a tensor: its dtype, and the matrix [rows, columns] it is seen as."""

    dtype: torch.dtype
    rows: int
    columns: int

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Sequence[int]) -> _Form:
        size = math.prod(shape)
        rows = shape[0] if len(shape) > 1 and size else 1
        return cls(dtype, rows, size // rows)

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def word(self) -> type[np.unsignedinteger]:
        return _UNSIGNED[self.dtype.itemsize]


def encode(tensor: Tensor) -> bytes:
    """The bytes of a dense tensor of any dtype of up to 8 bytes a value; `decode` gives the very same bits.

    Tried, and the smallest kept: raw; entropy-coded byte planes (of float weights the exponents gain); planes
    of differences (sorted indices); a palette of the distinct values with coded indices (clustered, int8);
    and, where there are zeros, positions and values apart (pruned). Raises TypeError for other tensors.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"encode: tensor must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype.itemsize not in _UNSIGNED:
        raise TypeError(
            f"encode: tensor must be dense, with data and up to 8 bytes a value, got "
            f"{'meta' if tensor.is_meta else tensor.layout} {tensor.dtype}"
        )
    form = _Form.of(tensor.dtype, tensor.shape)
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    words = plain.view(torch.uint8).numpy().view(form.word) if form.size else np.zeros(0, form.word)
    written = []
    for method in _candidates(words, form):
        channel = Writer()
        channel.number(METHODS.index(method), len(METHODS) - 1)
        _PASS[method](channel, words, form)
        written.append(channel.finish())
    return min(written, key=len)


def decode(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor that `encode` was given. Raises CodingError (a ValueError) for bytes that it never wrote.

    The shape bounds the work and memory: check it before decoding what somebody else wrote.
    """
    form = _Form.of(dtype, shape)
    channel = Reader(bytes(data))
    method = METHODS[channel.number(0, len(METHODS) - 1)]
    words = _PASS[method](channel, np.zeros(0, form.word), form)
    channel.finish()
    if dtype == torch.bool and len(words) and words.max() > 1:
        raise CodingError("a bool must be 0 or 1")
    plain = torch.from_numpy(np.ascontiguousarray(words).view(np.uint8).copy())
    return plain.view(dtype).reshape(tuple(shape)) if form.size else torch.empty(tuple(shape), dtype=dtype)


def methods_of(data: bytes) -> str:
    """The name of the method that coded `data`."""
    return METHODS[Reader(bytes(data)).number(0, len(METHODS) - 1)]


def _candidates(words: Words, form: _Form) -> list[str]:
    """The methods worth trying."""
    found = ["raw", "bytes"]
    if form.dtype in _INTEGERS:
        found.append("differences")
    if form.size and palette(words) is not None:
        found.append("palette")
    elif form.size and np.count_nonzero(words) < 0.95 * form.size:
        found.append("sparse")
    return found


def palette(words: Words) -> Words | None:
    """The distinct values where there are few enough to be worth a table, otherwise None."""
    few = min(_MAX_PALETTE, 1 + len(words) // 4)
    if len(np.unique(words[: 4 * _MAX_PALETTE])) > few:
        return None
    distinct: Words = np.unique(words)
    return distinct if len(distinct) <= few else None


def _pass_raw(channel: Channel, words: Words, form: _Form) -> Words:
    size = form.size * form.dtype.itemsize
    return np.frombuffer(channel.raw(words.tobytes(), size), form.word)


def _pass_bytes(channel: Channel, words: Words, form: _Form) -> Words:
    """Each byte of the values on its own: as it is, or by its frequencies."""
    return _pass_planes(channel, words, form.size, form.word)


def _pass_planes(channel: Channel, words: Words, count: int, word: type[np.unsignedinteger]) -> Words:
    width = np.dtype(word).itemsize
    planes = words.astype(word).view(np.uint8).reshape(-1, width)
    out = np.zeros((count, width), np.uint8)
    for place in range(width):
        plane = np.ascontiguousarray(planes[:, place])
        weighed = Scale()
        if channel.writes:
            weighed.symbols(plane.astype(np.int32), count, 256)
        if channel.number(int(weighed.weight < count), 1):
            out[:, place] = channel.symbols(plane.astype(np.int32), count, 256)
        else:
            out[:, place] = np.frombuffer(channel.raw(plane.tobytes(), count), np.uint8)
    return out.reshape(-1).view(word)


def _pass_differences(channel: Channel, words: Words, form: _Form) -> Words:
    steps = np.diff(words, prepend=words.dtype.type(0)) if len(words) else words
    found = _pass_planes(channel, steps, form.size, form.word)
    total: Words = np.cumsum(found, dtype=form.word)
    return total


def _pass_sparse(channel: Channel, words: Words, form: _Form) -> Words:
    """Positions of what is not zero, and those values by their bytes."""
    mask = _pass_zeros(channel, words, form)
    kept = _pass_planes(channel, words[words != 0], int(mask.sum()), form.word)
    out = np.zeros(form.size, form.word)
    out[mask.reshape(-1) == 1] = kept
    return out


def _pass_zeros(channel: Channel, words: Words, form: _Form) -> Bytes:
    shape = (form.rows, form.columns)
    return pass_positions(
        channel, (words != 0).astype(np.uint8).reshape(shape) if channel.writes else np.zeros(shape, np.uint8)
    )


def _pass_palette(channel: Channel, words: Words, form: _Form) -> Words:
    """The distinct values in numeric order; positions of zeros if there are any; then which value where.

    Which half of the palette a value is in (its sign, more or less) goes by its neighbours where that is
    smaller; the rest by frequencies in its half.
    """
    distinct = np.zeros(0, form.word)
    if channel.writes:
        distinct = _ordered(np.unique(words), form.dtype)
    zeros = channel.number(int((distinct == 0).any()), 1)
    distinct = distinct[distinct != 0]
    count = channel.number(len(distinct), _MAX_PALETTE)
    size = count * form.dtype.itemsize
    distinct = np.frombuffer(channel.raw(distinct.tobytes(), size), form.word)
    shape = (form.rows, form.columns)
    mask = _pass_zeros(channel, words, form) if zeros else np.ones(shape, np.uint8)
    there = mask.reshape(-1) == 1
    kept = int(there.sum())
    if kept and not count:
        raise CodingError("a palette without values has some to place")
    indices = np.zeros(kept, np.int32)
    if channel.writes:
        order = np.argsort(distinct, kind="stable")
        indices = order[np.searchsorted(distinct[order], words[there])].astype(np.int32)
    indices = _pass_indices(channel, indices, count, mask)
    out = np.zeros(form.size, form.word)
    out[there] = distinct[indices] if kept else 0
    return out


def _pass_indices(channel: Channel, indices: NDArray[np.int32], count: int, mask: Bytes) -> NDArray[np.int32]:
    half = count // 2
    upper = (indices >= half).astype(np.uint8)
    options: scan.Options | None = None
    if channel.writes and half and len(indices):
        options = _halves_worth(indices, upper, half, count, mask)
    if not channel.number(int(options is not None), 1):
        return channel.symbols(indices, len(indices), max(count, 1))
    options = scan.pass_options(channel, options or scan.Options())
    lines = scan.turned(_spread(upper, mask), options)
    found = scan.pass_halves(channel, lines, scan.turned(mask, options), options)
    upper = (found.T if options.columns else found)[mask == 1]
    out = np.zeros(len(upper), np.int32)
    for side, start, end in ((0, 0, half), (1, half, count)):
        part = indices[upper == side] - start
        if end == start and part.size:
            raise CodingError("half a palette without values has some to place")
        out[upper == side] = start + channel.symbols(part, part.size, max(end - start, 1))
    return out


def _halves_worth(
    indices: NDArray[np.int32], upper: Bytes, half: int, count: int, mask: Bytes
) -> scan.Options | None:
    """The options by which halves are cheaper told from neighbours, None if they are not."""
    best = scan.best_halves_options(_spread(upper, mask), mask)
    if best is None:
        return None
    whole, parts = Scale(), Scale()
    whole.symbols(indices, len(indices), count)
    for part, size in ((indices[upper == 0], half), (indices[upper == 1] - half, count - half)):
        parts.symbols(part, len(part), size)
    return best[0] if best[1] + parts.weight < whole.weight else None


def _spread(bits: Bytes, mask: Bytes) -> Bytes:
    """Bits of the places where mask is 1, as a matrix."""
    out = np.zeros_like(mask)
    out[mask == 1] = bits
    return out


def _ordered(words: Words, dtype: torch.dtype) -> Words:
    """Distinct bit patterns in the order of their values; NaN last."""
    values = torch.from_numpy(words.view(np.uint8).copy()).view(dtype).double().numpy()
    return words[np.argsort(values, kind="stable")]


_PASS: dict[str, Callable[[Channel, Words, _Form], Words]] = {
    "raw": _pass_raw,
    "bytes": _pass_bytes,
    "differences": _pass_differences,
    "palette": _pass_palette,
    "sparse": _pass_sparse,
}

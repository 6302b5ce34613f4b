"""Two-way channels: a format is described once, and run to write, to read or to weigh.

A method of the format passes every value through its channel and goes on with what comes back: `Writer`
stores the value and returns it, `Reader` ignores what it is given and returns what is stored, `Scale` counts
bytes. So the two directions cannot disagree. A stored tensor is the length of its plain bytes, those bytes
(numbers, tables, raw data), and the words of one range coder (library `constriction`).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]

_PRECISION = 24  # bits of the coder's probabilities
_FINE = 1 << 16  # the largest weight of a fine table of frequencies, 255 that of a coarse one


class CodingError(ValueError):
    """Bytes that no encoder wrote."""


def require_constriction(op: str) -> ModuleType:
    """The entropy coder's library; ImportError naming the extra that has it."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            f'{op}: entropy coding needs the library "constriction"; pip install "tautorch[coding]"'
        ) from error
    module: ModuleType = constriction
    return module


class Channel:
    """What the methods of the format call; see the module's docstring."""

    writes = True

    def number(self, value: int, limit: int) -> int:
        """A whole number in [0, limit]."""
        raise NotImplementedError

    def raw(self, data: bytes, size: int) -> bytes:
        """`size` bytes as they are."""
        raise NotImplementedError

    def bits(self, chance: Floats, bits: Bytes) -> Bytes:
        """Bits (0 or 1), each with its own chance of being 1, in (0, 1)."""
        raise NotImplementedError

    def frequencies(self, counts: Counts) -> list[int]:
        """A table of frequencies for these counts of the symbols, at the precision that is cheaper."""
        alphabet, fine = len(counts), 0
        table = [0] * alphabet
        if self.writes:
            tables = [_scaled(counts, top) for top in (255, _FINE)]
            fine = int(np.argmin([_bytes_of(counts, t) + sum(map(_varint_size, t)) for t in tables]))
            table = tables[fine]
        top = (255, _FINE)[self.number(fine, 1)]
        at = 0
        while at < alphabet:
            table[at] = self.number(table[at], top)
            if table[at] == 0:  # and how many more zeros
                run = next((n for n, value in enumerate(table[at + 1 :]) if value), alphabet - at - 1)
                at += self.number(run, alphabet - at - 1)
            at += 1
        if not any(table):
            raise CodingError("a table of frequencies is all zero")
        return table

    def symbols(self, symbols: Ints, count: int, alphabet: int) -> Ints:
        """`count` symbols of [0, alphabet), by their frequencies."""
        if count == 0 or alphabet == 1:
            return np.zeros(count, np.int32)
        counts = np.bincount(symbols, minlength=alphabet) if self.writes else np.zeros(alphabet, np.int64)
        return self._symbols(symbols, count, self.frequencies(counts))

    def _symbols(self, symbols: Ints, count: int, table: list[int]) -> Ints:
        raise NotImplementedError


class Writer(Channel):
    """Stores; `finish` gives the bytes."""

    def __init__(self) -> None:
        self._stream = require_constriction("encode").stream
        self._coder = self._stream.queue.RangeEncoder()
        self._plain = bytearray()
        self._bernoulli = self._stream.model.Bernoulli(perfect=False)

    def number(self, value: int, limit: int) -> int:
        if not 0 <= value <= limit:
            raise ValueError(f"encode: a number must be in [0, {limit}], got {value}")
        self._plain += varint(value)
        return value

    def raw(self, data: bytes, size: int) -> bytes:
        self._plain += data
        return data

    def bits(self, chance: Floats, bits: Bytes) -> Bytes:
        if bits.size:
            self._coder.encode(bits.astype(np.int32), self._bernoulli, chance)
        return bits

    def _symbols(self, symbols: Ints, count: int, table: list[int]) -> Ints:
        self._coder.encode(np.ascontiguousarray(symbols, np.int32), _categorical(self._stream, table))
        return symbols

    def finish(self) -> bytes:
        """Everything stored."""
        words: bytes = self._coder.get_compressed().astype("<u4").tobytes()
        return varint(len(self._plain)) + bytes(self._plain) + words


class Reader(Channel):
    """Reads what a `Writer` stored; CodingError where no writer could have stored it."""

    writes = False

    def __init__(self, data: bytes) -> None:
        self._stream = require_constriction("decode").stream
        size, start = read_varint(data, 0)
        if size > len(data) - start or (len(data) - start - size) % 4:
            raise CodingError(f"{len(data)} bytes do not hold {size} plain bytes and whole words")
        self._plain: bytes = data[start : start + size]
        self._at = 0
        words = np.frombuffer(data, "<u4", offset=start + size).astype(np.uint32)
        self._coder = self._stream.queue.RangeDecoder(words)
        self._bernoulli = self._stream.model.Bernoulli(perfect=False)

    def number(self, value: int, limit: int) -> int:
        value, self._at = read_varint(self._plain, self._at)
        if value > limit:
            raise CodingError(f"a number must be in [0, {limit}], got {value}")
        return value

    def raw(self, data: bytes, size: int) -> bytes:
        if size > len(self._plain) - self._at:
            raise CodingError(f"{size} bytes are wanted where {len(self._plain) - self._at} are left")
        self._at += size
        return self._plain[self._at - size : self._at]

    def bits(self, chance: Floats, bits: Bytes) -> Bytes:
        found = np.zeros(0, np.uint8)
        if chance.size:
            found = self._decoded(self._bernoulli, chance).astype(np.uint8)
        return found

    def _symbols(self, symbols: Ints, count: int, table: list[int]) -> Ints:
        return self._decoded(_categorical(self._stream, table), count)

    def _decoded(self, model: Any, amount: Any) -> Ints:
        try:
            found: Ints = self._coder.decode(model, amount)
        except AssertionError as error:  # how the library reports a state that no encoder reaches
            raise CodingError(f"the coded words are invalid: {error}") from error
        return found

    def finish(self) -> None:
        """CodingError unless everything was read."""
        if self._at != len(self._plain) or not self._coder.maybe_exhausted():
            raise CodingError("there is more data than the tensor needs")


class Scale(Channel):
    """Weighs what a `Writer` would store, in bytes, without the work of storing it."""

    def __init__(self) -> None:
        self.weight = 0.0

    def number(self, value: int, limit: int) -> int:
        self.weight += _varint_size(value)
        return value

    def raw(self, data: bytes, size: int) -> bytes:
        self.weight += size
        return data

    def bits(self, chance: Floats, bits: Bytes) -> Bytes:
        self.weight -= float(np.log2(np.where(bits, chance, 1 - chance)).sum()) / 8
        return bits

    def _symbols(self, symbols: Ints, count: int, table: list[int]) -> Ints:
        self.weight += _bytes_of(np.bincount(symbols, minlength=len(table)), table)
        return symbols

    def counted(self, counts: Counts) -> None:
        """As `symbols`, where only their counts are known."""
        if counts.any():
            self.weight += _bytes_of(counts, self.frequencies(counts))


def _categorical(stream: Any, table: list[int]) -> Any:
    return stream.model.Categorical(np.array(table, np.float64), perfect=False)


def _scaled(counts: Counts, top: int) -> list[int]:
    """Counts in [0, top]; one that was there stays there."""
    most = max(int(counts.max()), 1)
    if most <= top:
        return [int(n) for n in counts]
    return [max(1, int(n) * top // most) if n else 0 for n in counts]


def _bytes_of(counts: Counts, table: list[int]) -> float:
    """What symbols of these counts take when coded by these frequencies."""
    frequencies = np.array(table, np.float64)
    share = np.maximum(frequencies / frequencies.sum(), 2.0**-_PRECISION)
    return -float((counts * np.log2(share)).sum()) / 8


def varint(value: int) -> bytes:
    """Little-endian base 128."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value below 2^63, the position after it)."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            raise CodingError("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise CodingError("a number has more than 63 bits")


def _varint_size(value: int) -> int:
    return max(1, math.ceil(value.bit_length() / 7))

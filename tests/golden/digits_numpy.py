"""Float rows by int8 weights as digits (csrc/kernels/common/product_w8.h), a second time, in numpy alone."""

from __future__ import annotations

import numpy as np

from .quantizer_numpy import F32, Float, Int

SPREAD = F32(0.36)


def fma(a: Float, b: Float, c: Float) -> Float:
    """a * b + c of fp32 with one rounding, where the product has at most 53 bits."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    # To odd: a double that is not exact and ends in 0 would round again as if it were.
    even = (total.view(np.int64) & 1 == 0) & (error != 0)
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(even, odd, total).astype(F32)


def spread(row: Float, most: float) -> tuple[F32, F32]:
    """Largest and sum of the |x| up to ``most``; the sum runs in 16 lanes, which are then halved."""
    size = np.abs(row)
    size = np.where(size > most, F32(0), size)
    lanes = np.zeros(16, F32)
    for block in np.pad(size, (0, -len(size) % 16)).reshape(-1, 16):
        lanes = lanes + block
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return size.max(), lanes[0]


def digits(row: Float, least: float, largest: F32, count: int, bits: int, exponent: int) -> tuple[Int, Int]:
    """The digits [count, K], lowest first, and the inputs that stay apart."""
    size = np.abs(row)
    inside = (size >= least) & (size <= largest) & (np.arange(len(row)) < len(row) // 4 * 4)
    q = np.where(inside, np.rint(np.ldexp(row.astype(np.float64), bits - exponent)), 0).astype(np.int64)
    found = []
    for _ in range(count):
        low = (q + 128) % 256 - 128
        found.append(low)
        q = (q - low) // 256
    assert not q.any()
    return np.stack(found), np.flatnonzero(~inside & (row != 0))


def row_as_digits(row: Float, significant: int) -> tuple[Int, Int, F32]:
    """Digits, inputs apart, and the unit of one row; a row that stays float is an error here."""
    k = len(row)
    largest, total = spread(row, np.inf)
    if significant == 24:
        most = SPREAD / np.sqrt(F32(4 * k))
        for _ in range(5):
            if largest <= most * total:
                break
            largest, total = spread(row, most * total)
        assert largest <= most * total
    for count in (2, 3) if significant < 24 else (3,):
        exponent = int(np.frexp(largest)[1]) if largest > 0 else 0
        bits = 8 * count - 1
        reach = {2: 32639, 3: 8355711}[count]
        if largest * 2.0 ** (bits - exponent) > reach:
            bits -= 1
        unit = F32(2.0 ** (exponent - bits))
        least = F32(2) / F32(k) * largest if significant == 24 else unit * 2.0 ** (significant - 1)
        found, apart = digits(row, float(least), largest, count, bits, exponent)
        if len(apart) <= (k // 16 if count == 2 else k // 8 + 3):
            return found, apart, unit
    raise AssertionError("this row stays float")


def product(x: Float, weight: Int, significant: int) -> Float:
    """[M, K] floats of ``significant`` bits times [N, K]."""
    out = []
    for row in x:
        found, apart, unit = row_as_digits(row, significant)
        sums = (found @ weight.T).astype(F32)
        y = sums[-1]
        for lower in sums[-2::-1]:
            y = fma(y, np.broadcast_to(F32(256), y.shape), lower)
        rest = np.zeros_like(y)
        for i in apart:
            rest = fma(np.broadcast_to(row[i], y.shape), weight[:, i].astype(F32), rest)
        out.append(y * unit + rest)
    return np.stack(out)

"""Layers to run, and what numpy makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.capi import library as t
from tests.capi.library import layer_of


class Problem:
    """A dense layer and what numpy makes of it."""

    def __init__(self, m: int, n: int, k: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((m, k), np.float32)
        self.x8 = rng.integers(-128, 128, (m, k), np.int8)
        self.w = rng.integers(-127, 128, (n, k), np.int8)
        self.wf = rng.standard_normal((n, k), np.float32)
        self.scale = rng.random(n, np.float32) * np.float32(0.01)
        self.bias = rng.standard_normal(n, np.float32)
        self.m, self.n, self.k = m, n, k

    def layer(self, packed: np.ndarray, /, **fields: Any) -> t.Layer:
        return layer_of(packed, self.n, self.k, **fields)

    def out(self, dtype: Any = np.float32) -> np.ndarray:
        return np.full((self.m, self.n), 99, dtype)


def entries(mask: np.ndarray, w: np.ndarray, group: int) -> tuple[t.Sparse, list[np.ndarray]]:
    """The lists of a mask [groups, k] over w [n, k], and what keeps them alive."""
    n, k = w.shape
    padded = np.zeros((len(mask) * group, k), w.dtype)
    padded[:n] = w
    start = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.uint32)
    rows, index = np.nonzero(mask)
    values = np.ascontiguousarray(padded.reshape(len(mask), group, k)[rows, :, index])
    index = index.astype(np.uint16)
    keep = [start, index, values]
    return t.Sparse(n, k, group, len(index), *(a.ctypes.data for a in keep)), keep

"""``libtautorch.so`` through ctypes: the declarations of ``include/tautorch.h``."""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any

import numpy as np

INT8, FLOAT, INT8_FLOAT_X = range(3)
FLOAT32, BFLOAT16, FLOAT16, INT8_X, INT32 = range(5)
NONE, RELU = range(2)
OK, INVALID = range(2)

RANGE_FN = c.CFUNCTYPE(None, c.c_int64, c.c_int64, c.c_void_p)
PARALLEL_FOR = c.CFUNCTYPE(c.c_int32, c.c_int64, c.c_int64, c.c_int64, RANGE_FN, c.c_void_p)
NUM_THREADS = c.CFUNCTYPE(c.c_int32, c.POINTER(c.c_uint32))


class Layer(c.Structure):
    _fields_ = (
        ("packed", c.c_void_p),
        ("packed_bytes", c.c_size_t),
        ("inputs", c.c_int64),
        ("outputs", c.c_int64),
        ("weight_scale", c.c_void_p),
        ("bias", c.c_void_p),
        ("activation", c.c_int32),
        ("x_dtype", c.c_int32),
        ("x_stride", c.c_int64),
        ("y_dtype", c.c_int32),
        ("y_stride", c.c_int64),
        ("x_scale", c.c_float),
        ("x_zero_point", c.c_int32),
        ("y_scale", c.c_float),
        ("y_zero_point", c.c_int32),
    )


class Sparse(c.Structure):
    _fields_ = (
        ("outputs", c.c_int64),
        ("inputs", c.c_int64),
        ("group", c.c_int32),
        ("entries", c.c_int64),
        ("start", c.c_void_p),
        ("index", c.c_void_p),
        ("values", c.c_void_p),
    )


class Plan(c.Structure):
    _fields_ = (("opaque", c.c_uint64 * 64),)


class Refused(Exception):
    """TT_INVALID, with the library's message."""


class Library:
    """Calls that raise. Arrays are passed as they are and must be contiguous."""

    def __init__(self, path: Path) -> None:
        self.c = c.CDLL(str(path))
        for name in ("tt_version", "tt_last_error", "tt_kernel_name", "tt_plan_kernel"):
            getattr(self.c, name).restype = c.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.c, name)(*arguments)
        if status != OK:
            assert status == INVALID, status
            raise Refused(self.c.tt_last_error().decode())

    def kernels(self) -> list[str]:
        names: list[str] = []
        while (name := self.c.tt_kernel_name(len(names))) is not None:
            names.append(name.decode())
        return names

    def supported(self) -> list[str]:
        return [name for name in self.kernels() if self.c.tt_kernel_runs(name.encode())]

    def pack(self, kernel: str | None, kind: int, weight: np.ndarray) -> np.ndarray:
        n, k = weight.shape
        head = (name_of(kernel), kind, c.c_int64(n), c.c_int64(k))
        bytes_ = c.c_size_t()
        self.call("tt_dense_pack_size", *head, c.byref(bytes_))
        packed = aligned(bytes_.value)
        self.call("tt_dense_pack", *head, at(weight), at(packed), bytes_)
        return packed

    def pack_sparse(self, kernel: str | None, kind: int, weight: Sparse) -> np.ndarray:
        bytes_ = c.c_size_t()
        self.call("tt_sparse_pack_size", name_of(kernel), kind, c.byref(weight), c.byref(bytes_))
        packed = aligned(bytes_.value)
        self.call("tt_sparse_pack", name_of(kernel), kind, c.byref(weight), at(packed), bytes_)
        return packed

    def plan(self, layer: Layer) -> Plan:
        plan = Plan()
        plan.keep = layer  # type: ignore[attr-defined]
        self.call("tt_linear_plan", c.byref(layer), c.byref(plan))
        return plan

    def run(self, plan: Plan, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        self.call("tt_run", c.byref(plan), at(x), c.c_int64(len(x)), at(y))
        return y


def at(array: np.ndarray | None) -> c.c_void_p:
    return c.c_void_p(None if array is None else array.ctypes.data)


def name_of(kernel: str | None) -> bytes | None:
    return None if kernel is None else kernel.encode()


def aligned(count: int) -> np.ndarray:
    """uint8 [count] that starts on 64 bytes."""
    raw = np.zeros(count + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:count]


def layer_of(packed: np.ndarray, n: int, k: int, /, **fields: Any) -> Layer:
    """Arrays among the fields become their addresses; the layer keeps them alive."""
    layer = Layer(packed.ctypes.data, packed.nbytes, k, n)
    layer.keep = (packed, fields)  # type: ignore[attr-defined]
    for name, value in fields.items():
        setattr(layer, name, value.ctypes.data if isinstance(value, np.ndarray) else value)
    return layer

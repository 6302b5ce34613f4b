"""Every refusal of the C interface: layers, weights, packs, plans and runs."""

from __future__ import annotations

import ctypes as c
from typing import Any

import numpy as np
import pytest
from tests.capi import library as t
from tests.capi.library import Library, Refused, at
from tests.capi.problem import Problem, entries


def test_damaged_plans(lib: Library) -> None:
    """A plan of which any byte changed is refused; behind what a plan takes of its 512, none matters."""
    p = Problem(2, 8, 6)
    packed = lib.pack(None, t.INT8, p.w)
    plan = lib.plan(p.layer(packed))
    expected, raw = lib.run(plan, p.x, p.out()), (c.c_uint8 * c.sizeof(plan)).from_buffer(plan)
    refused = []
    for place in range(len(raw)):
        raw[place] ^= 0x41
        try:
            assert np.array_equal(lib.run(plan, p.x, p.out()), expected)
            assert lib.c.tt_plan_kernel(c.byref(plan)) is not None
        except Refused:
            assert lib.c.tt_plan_kernel(c.byref(plan)) is None
            refused.append(place)
        raw[place] ^= 0x41
    assert refused == list(range(len(refused))) and len(refused) > 200
    swapped = t.Plan()  # words that were exchanged
    c.memmove(c.byref(swapped), c.byref(plan), c.sizeof(plan))
    swapped.opaque[2], swapped.opaque[3] = plan.opaque[3], plan.opaque[2]
    with pytest.raises(Refused, match="plan must be"):
        lib.run(swapped, p.x, p.out())


BAD_LAYERS = [
    ({"outputs": 5}, "outputs must be 8 as packed, got 5"),
    ({"outputs": 9, "weight_scale": np.ones(9, np.float32)}, "outputs must be 8 as packed, got 9"),
    ({"inputs": 5}, "another shape or kind"),
    ({"packed": None}, "packed must be given, got NULL"),
    ({"packed_bytes": 100}, "shorter than|cut short"),
    ({"activation": 9}, "activation must be a known code, got 9"),
    ({"x_dtype": 7}, "x_dtype must be TT_FLOAT32"),
    ({"x_dtype": -1}, "x_dtype must be TT_FLOAT32"),
    ({"y_dtype": 5}, "y_dtype must be one of tt_dtype, got 5"),
    ({"x_dtype": t.INT8_X}, "x_scale must be given for TT_INT8 x, got 0"),
    ({"x_dtype": t.INT8_X, "x_scale": -1.0}, "x_scale must be positive and finite"),
    ({"x_dtype": t.INT8_X, "x_scale": float("nan")}, "x_scale must be positive and finite"),
    ({"x_scale": float("inf")}, "x_scale must be positive and finite"),
    ({"x_scale": 1e-45}, "x_scale must be positive and finite"),
    ({"x_zero_point": 3}, "x_zero_point must be 0 without x_scale, got 3"),
    ({"x_scale": 1.0, "x_zero_point": 128}, r"x_zero_point must be in \[-128, 127\], got 128"),
    ({"y_dtype": t.INT8_X}, "y_scale must be given for TT_INT8 y"),
    ({"y_scale": 1.0}, "y_scale must be 0 but for TT_INT8 y"),
    ({"y_dtype": t.INT8_X, "y_scale": -2.0}, "y_scale must be positive and finite"),
    ({"y_dtype": t.INT8_X, "y_scale": 1.0, "y_zero_point": -129}, "y_zero_point must be in"),
    ({"x_stride": 5}, "x_stride must be 0 or at least 6, got 5"),
    ({"y_stride": -8}, "y_stride must be 0 or at least 8, got -8"),
    ({"bias": np.array([0, np.nan] * 4, np.float32)}, "bias must be finite, got nan at 1"),
    ({"weight_scale": np.full(8, np.inf, np.float32)}, "weight_scale must be finite, got inf at 0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_LAYERS)
def test_bad_layers(lib: Library, fields: dict[str, Any], message: str) -> None:
    p = Problem(2, 8, 6)
    packed = lib.pack(None, t.INT8, p.w)
    with pytest.raises(Refused, match=message):
        lib.plan(p.layer(packed, **fields))


def test_float_weights_refuse_integers(lib: Library) -> None:
    p = Problem(2, 8, 6)
    packed = lib.pack(None, t.FLOAT, p.wf)
    for fields in ({"x_dtype": t.INT8_X, "x_scale": 1.0}, {"x_scale": 1.0}, {"y_dtype": t.INT32}):
        with pytest.raises(Refused, match="float products take float x"):
            lib.plan(p.layer(packed, **fields))


def test_bad_packing(lib: Library) -> None:
    w, n, k = np.zeros((8, 6), np.int8), c.c_int64(8), c.c_int64(6)
    size, packed = c.c_size_t(), t.aligned(8192)

    def refuse(message: str, *arguments: Any) -> None:
        with pytest.raises(Refused, match=message):
            lib.call(*arguments)

    for absent in (name for name in lib.kernels() if name not in lib.supported()):
        refuse("this CPU cannot run", "tt_dense_pack_size", absent.encode(), t.INT8, n, k, c.byref(size))
    refuse("unknown kernel 'sse9'", "tt_dense_pack_size", b"sse9", t.INT8, n, k, c.byref(size))
    refuse("bytes must be given", "tt_dense_pack_size", None, t.INT8, n, k, None)
    for kind in (-1, 3):
        refuse("kind must be one of", "tt_dense_pack_size", None, kind, n, k, c.byref(size))
    for rows, cols in ((-1, 6), (8, -1), (2**62, 2**62)):
        refuse(
            "out of range",
            "tt_dense_pack_size",
            None,
            t.INT8,
            c.c_int64(rows),
            c.c_int64(cols),
            c.byref(size),
        )
    refuse("at most 66311", "tt_dense_pack_size", None, t.INT8, n, c.c_int64(66312), c.byref(size))
    lib.call("tt_dense_pack_size", None, t.INT8, n, k, c.byref(size))
    head = ("tt_dense_pack", None, t.INT8, n, k)
    refuse("weight must be given", *head, None, at(packed), size)
    refuse("packed must be given", *head, at(w), None, size)
    refuse("multiple of 8 bytes", *head, at(w), at(packed[4:]), size)
    refuse(f"bytes must be at least {size.value}", *head, at(w), at(packed), c.c_size_t(size.value - 64))
    bad = np.full((8, 6), np.nan, np.float32)
    refuse(
        "weight must be finite", "tt_dense_pack", None, t.FLOAT, n, k, at(bad), at(packed), c.c_size_t(8192)
    )
    low = np.full((1, 66000), -128, np.int8)
    with pytest.raises(Refused, match=r"weight must be in \[-127, 127\]"):
        lib.pack(None, t.INT8, low)


def test_bad_sparse_weights(lib: Library) -> None:
    mask = np.ones((2, 6), bool)

    def refuse(message: str, **fields: Any) -> None:
        sparse, _keep = entries(mask, np.ones((8, 6), np.int8), 4)
        for name, value in fields.items():
            setattr(sparse, name, value.ctypes.data if isinstance(value, np.ndarray) else value)
        with pytest.raises(Refused, match=message):
            lib.pack_sparse(None, t.INT8, sparse)

    refuse("group must be 1 or 4, got 3", group=3)
    refuse("out of range", outputs=-4)
    refuse("sizes are out of range", inputs=65537)
    refuse("the last start must be the number of entries, 11, got 12", entries=11)
    refuse("start must be given", start=None)
    refuse("index must be given", index=None)
    refuse("values must be given", values=None)
    refuse("start must ascend", start=np.array([0, 20, 12], np.uint32))
    refuse("inputs of each group must ascend", index=np.zeros(12, np.uint16))
    refuse("inputs of each group must ascend", index=np.array([*range(6), *range(1, 7)], np.uint16))
    sparse, _keep = entries(mask, np.ones((8, 6), np.int8), 4)
    size = c.c_size_t()
    with pytest.raises(Refused, match="kind must be TT_WEIGHTS_INT8 or TT_WEIGHTS_FLOAT"):
        lib.call("tt_sparse_pack_size", None, t.INT8_FLOAT_X, c.byref(sparse), c.byref(size))
    with pytest.raises(Refused, match="weight must be given"):
        lib.call("tt_sparse_pack_size", None, t.INT8, None, c.byref(size))


def test_damaged_packs(lib: Library) -> None:
    """Any byte of a header changed is a refusal, or a pack that still runs within its bounds."""
    p = Problem(2, 8, 6)
    whole = lib.pack(None, t.INT8, p.w)
    for place in range(160):
        packed = t.aligned(whole.nbytes)
        packed[:] = whole
        packed[place] ^= 0x41
        with pytest.raises(Refused, match="packed weights"):
            lib.plan(p.layer(packed))


def test_bad_runs(lib: Library) -> None:
    p = Problem(2, 8, 6)
    packed = lib.pack(None, t.INT8, p.w)
    plan, y = lib.plan(p.layer(packed)), p.out()
    head = ("tt_run", c.byref(plan))
    for arguments, message in (
        ((None, c.c_int64(2), at(y)), "x must be given"),
        ((at(p.x), c.c_int64(2), None), "y must be given"),
        ((at(p.x), c.c_int64(-1), at(y)), "rows must not be negative, got -1"),
        ((c.c_void_p(p.x.ctypes.data + 2), c.c_int64(1), at(y)), "x must start at a multiple of 4 bytes"),
        ((at(p.x), c.c_int64(1), c.c_void_p(y.ctypes.data + 1)), "y must start at a multiple of 4 bytes"),
    ):
        with pytest.raises(Refused, match=message):
            lib.call(*head, *arguments)
    with pytest.raises(Refused, match="plan must be given"):
        lib.call("tt_run", None, at(p.x), c.c_int64(2), at(y))

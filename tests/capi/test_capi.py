"""The C interface: values against numpy, every refusal, threads, and what the library exports."""

from __future__ import annotations

import ctypes as c
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.capi import library as t
from tests.capi.library import Library, Refused, at, layer_of
from tests.native.building import HERE, ROOT, library, run

INCLUDE = ROOT / "include"


@pytest.fixture(scope="module")
def path() -> Path:
    return library("libtautorch.so")


@pytest.fixture(scope="module")
def lib(path: Path) -> Library:
    return Library(path)


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q int64 and fp32 scales of float rows: one IEEE division each, rint to even."""
    amax = np.abs(x).max(1, keepdims=True)
    return np.rint(x * (np.float32(127) / amax)).astype(np.int64), amax / np.float32(127)


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


SIZES = [(1, 1, 1), (1, 70, 33), (5, 17, 64), (13, 129, 257), (200, 40, 96)]


@pytest.fixture(params=SIZES, ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(*request.param)


def test_dense_int8(lib: Library, problem: Problem) -> None:
    p = problem
    for kernel in lib.supported():
        packed = lib.pack(kernel, t.INT8, p.w)
        q, scale = quantised(p.x)
        acc = q @ p.w.astype(np.int64).T
        plan = lib.plan(p.layer(packed, y_dtype=t.INT32))
        assert lib.c.tt_plan_kernel(c.byref(plan)).decode() == kernel
        assert np.array_equal(lib.run(plan, p.x, p.out(np.int32)), acc)
        plan = lib.plan(p.layer(packed, weight_scale=p.scale, bias=p.bias, activation=t.RELU))
        y = np.maximum(acc * scale.astype(np.float64) * p.scale + p.bias, 0)
        assert np.allclose(lib.run(plan, p.x, p.out()), y, rtol=1e-6, atol=1e-6 * np.abs(acc).max())


def test_int8_in_and_out(lib: Library, problem: Problem) -> None:
    p = problem
    zero, acc = -7, (p.x8.astype(np.int64) + 7) @ p.w.astype(np.int64).T
    for kernel in lib.supported():
        packed = lib.pack(kernel, t.INT8, p.w)
        given = {"x_dtype": t.INT8_X, "x_scale": 0.5, "x_zero_point": zero}
        plan = lib.plan(p.layer(packed, y_dtype=t.INT32, **given))
        assert np.array_equal(lib.run(plan, p.x8, p.out(np.int32)), acc)
        # Powers of two: every product is exact, and only rint rounds.
        step = 2.0 ** int(np.ceil(np.log2(np.abs(acc).max() + 1)) - 8)
        fields = {"y_dtype": t.INT8_X, "y_scale": step, "y_zero_point": 3, **given}
        y = np.clip(np.rint(acc * 0.5 / step) + 3, -128, 127)
        assert np.array_equal(lib.run(lib.plan(p.layer(packed, **fields)), p.x8, p.out(np.int8)), y)


def test_a_static_scale(lib: Library, problem: Problem) -> None:
    p = problem
    q = np.clip(np.rint(p.x * (np.float32(1) / np.float32(0.03))) + 5, -128, 127).astype(np.int64)
    for kernel in lib.supported():
        plan = lib.plan(p.layer(lib.pack(kernel, t.INT8, p.w), x_scale=0.03, x_zero_point=5, y_dtype=t.INT32))
        assert np.array_equal(lib.run(plan, p.x, p.out(np.int32)), (q - 5) @ p.w.astype(np.int64).T)


@pytest.mark.parametrize("kind", [t.FLOAT, t.INT8_FLOAT_X])
def test_float_products(lib: Library, problem: Problem, kind: int) -> None:
    p = problem
    w = p.wf if kind == t.FLOAT else p.w
    scale = None if kind == t.FLOAT else p.scale
    exact = p.x.astype(np.float64) @ w.T.astype(np.float64) * (1 if scale is None else scale) + p.bias
    size = np.abs(p.x).astype(np.float64) @ np.abs(w.T) * (1 if scale is None else scale) + 1
    for kernel in lib.supported():
        fields: dict[str, Any] = (
            {"bias": p.bias} if scale is None else {"bias": p.bias, "weight_scale": scale}
        )
        y = lib.run(lib.plan(p.layer(lib.pack(kernel, kind, w), **fields)), p.x, p.out())
        assert (np.abs(y - exact) <= (16 + p.k / 8) * 2.0**-23 * size).all()


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


@pytest.mark.parametrize("group", [1, 4])
def test_sparse(lib: Library, problem: Problem, group: int) -> None:
    p = problem
    mask = np.random.default_rng(1).random((-(-p.n // group), p.k)) < 0.3
    dense = mask.repeat(group, 0)[: p.n]
    acc = quantised(p.x)[0] @ (p.w * dense).astype(np.int64).T
    exact = p.x.astype(np.float64) @ (p.wf * dense).T.astype(np.float64)
    size = np.abs(p.x).astype(np.float64) @ np.abs(p.wf * dense).T + 1
    for kernel in lib.supported():
        sparse, _keep = entries(mask, p.w, group)
        plan = lib.plan(p.layer(packed := lib.pack_sparse(kernel, t.INT8, sparse), y_dtype=t.INT32))
        assert np.array_equal(lib.run(plan, p.x, p.out(np.int32)), acc)
        sparse, _keep = entries(mask, p.wf, group)
        plan = lib.plan(p.layer(packed := lib.pack_sparse(kernel, t.FLOAT, sparse)))
        assert (np.abs(lib.run(plan, p.x, p.out()) - exact) <= (16 + p.k / 8) * 2.0**-23 * size).all()
        assert packed.nbytes % 64 == 0


@pytest.mark.parametrize("rank", [1, 24])
def test_lowrank(lib: Library, problem: Problem, rank: int) -> None:
    p = problem
    rng = np.random.default_rng(2)
    down, up = rng.standard_normal((rank, p.k), np.float32), rng.standard_normal((p.n, rank), np.float32)
    for kernel in lib.supported():
        d, u = lib.pack(kernel, t.FLOAT, down), lib.pack(kernel, t.FLOAT, up)
        plan = t.Plan()
        layer = p.layer(d, bias=p.bias)
        lib.call("tt_lowrank_plan", c.byref(layer), at(u), c.c_size_t(u.nbytes), None, c.byref(plan))
        exact = p.x.astype(np.float64) @ down.T @ up.T + p.bias
        size = np.abs(p.x) @ np.abs(down).T @ np.abs(up).T + 1
        assert (
            np.abs(lib.run(plan, p.x, p.out()) - exact) <= (32 + (p.k + rank) / 8) * 2.0**-23 * size
        ).all()
        d8, u8 = (np.clip(np.rint(w * 30), -127, 127).astype(np.int8) for w in (down, up))
        d, u = lib.pack(kernel, t.INT8, d8), lib.pack(kernel, t.INT8, u8)
        down_scale = np.full(rank, 1 / 30, np.float32)
        layer = p.layer(d, weight_scale=p.scale)
        lib.call(
            "tt_lowrank_plan", c.byref(layer), at(u), c.c_size_t(u.nbytes), at(down_scale), c.byref(plan)
        )
        q, scale = quantised(p.x)
        inner = (q @ d8.astype(np.int64).T).astype(np.float32) * scale * down_scale
        live = np.abs(inner).max(1) > 0
        q, scale = quantised(inner[live])
        y = lib.run(plan, p.x, p.out())[live]
        assert np.allclose(y, q @ u8.astype(np.int64).T * (scale * p.scale), rtol=1e-5, atol=1e-5)


def test_strides_and_no_rows(lib: Library) -> None:
    p = Problem(3, 20, 10)
    packed = lib.pack(None, t.INT8, p.w)
    wide, y = np.zeros((3, 16), np.float32), np.full((3, 25), 7, np.int32)
    wide[:, :10] = p.x
    plan = lib.plan(p.layer(packed, x_stride=16, y_stride=25, y_dtype=t.INT32))
    lib.run(plan, wide, y)
    assert np.array_equal(y[:, :20], quantised(p.x)[0] @ p.w.astype(np.int64).T) and (y[:, 20:] == 7).all()
    lib.call("tt_run", c.byref(plan), None, c.c_int64(0), None)


def test_plans_may_be_copied(lib: Library) -> None:
    p = Problem(4, 30, 20)
    fields = {"x_dtype": t.INT8_X, "x_scale": 0.25}
    packed = lib.pack(None, t.INT8, p.w)
    plan, copy = lib.plan(p.layer(packed, **fields)), t.Plan()
    c.memmove(c.byref(copy), c.byref(plan), c.sizeof(plan))
    c.memset(c.byref(plan), 0, c.sizeof(plan))
    y = lib.run(copy, p.x8, p.out())
    assert np.array_equal(y, (p.x8.astype(np.int64) @ p.w.astype(np.int64).T * 0.25).astype(np.float32))
    with pytest.raises(Refused, match="plan must be as tt_linear_plan or tt_lowrank_plan made it"):
        lib.run(plan, p.x8, p.out())
    assert lib.c.tt_plan_kernel(c.byref(plan)) is None and lib.c.tt_plan_kernel(None) is None


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


# ---- refusals ----


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


# ---- threads ----


@pytest.fixture
def threads(lib: Library) -> Any:
    yield lambda n: lib.call("tt_set_threads", c.c_int32(n))
    lib.call("tt_set_threads", c.c_int32(1))


def test_threads_change_no_bit(lib: Library, threads: Any) -> None:
    p = Problem(64, 512, 512)
    sparse, _keep = entries(np.random.default_rng(1).random((128, 512)) < 0.3, p.w, 4)
    packs = [
        lib.pack(None, t.INT8, p.w),
        lib.pack(None, t.FLOAT, p.wf),
        lib.pack_sparse(None, t.INT8, sparse),
    ]
    plans = [lib.plan(p.layer(packed, bias=p.bias)) for packed in packs]
    alone = [lib.run(plan, p.x, p.out()) for plan in plans]
    for n in (2, 4, 1):
        threads(n)
        for plan, expected in zip(plans, alone, strict=True):
            for _ in range(20):
                assert np.array_equal(lib.run(plan, p.x, p.out()), expected)
    for n in (0, -1, 1025):
        with pytest.raises(Refused, match=r"n must be in \[1, 1024\]"):
            threads(n)


def test_one_plan_from_many_threads(lib: Library, threads: Any) -> None:
    threads(2)
    p = Problem(40, 300, 200)
    packed = lib.pack(None, t.INT8, p.w)
    plan = lib.plan(p.layer(packed))
    expected, wrong = lib.run(plan, p.x, p.out()), []

    def work() -> None:
        for _ in range(30):
            if not np.array_equal(lib.run(plan, p.x, p.out()), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong and not any(worker.is_alive() for worker in workers)


def test_a_pool_of_the_host(lib: Library, threads: Any) -> None:
    ranges: list[tuple[int, int]] = []

    @t.PARALLEL_FOR
    def parallel_for(begin: int, end: int, grain: int, fn: Any, context: int) -> int:
        for i in reversed(range(begin, end)):
            ranges.append((i, end))
            fn(i, i + 1, context)
        return 0

    @t.NUM_THREADS
    def num_threads(count: Any) -> int:
        count[0] = 3
        return 0

    @t.PARALLEL_FOR
    def broken(*arguments: Any) -> int:
        return 5

    p = Problem(64, 512, 512)
    packed = lib.pack(None, t.INT8, p.w)
    plan = lib.plan(p.layer(packed))
    expected = lib.run(plan, p.x, p.out())
    lib.call("tt_set_thread_pool", parallel_for, num_threads)
    assert np.array_equal(lib.run(plan, p.x, p.out()), expected)
    assert ranges and max(end for _, end in ranges) >= 2
    lib.call("tt_set_thread_pool", broken, num_threads)
    assert lib.c.tt_run(c.byref(plan), at(p.x), c.c_int64(64), at(p.out())) == 3
    assert b"code 5" in lib.c.tt_last_error()
    lib.call("tt_set_thread_pool", None, None)
    assert np.array_equal(lib.run(plan, p.x, p.out()), expected)
    with pytest.raises(Refused, match="both functions must be given"):
        lib.call("tt_set_thread_pool", parallel_for, None)


# ---- the library ----


def test_exports_and_name(lib: Library, path: Path) -> None:
    header = (INCLUDE / "tautorch.h").read_text()
    declared = set(re.findall(r"TT_API [\w *]*?(tt_\w+)\(", header))
    assert len(declared) == 15
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None and lib.c.tt_version().decode() == version[1]
    abi = re.search(r"TT_ABI_VERSION (\d+)", header)
    assert abi is not None and lib.c.tt_abi_version() == int(abi[1])
    assert os.readlink(path) == f"libtautorch.so.{abi[1]}"
    assert {name for name in declared if hasattr(lib.c, name)} == declared
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    symbols = run("nm", "-D", "--defined-only", path).split("\n")
    assert {line.split()[-1] for line in symbols if line} == declared


@pytest.mark.parametrize(("compiler", "standard"), [("cc", "c99"), ("c++", "c++11")])
def test_the_header_is_plain(tmp_path: Path, compiler: str, standard: str) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    suffix = ".c" if compiler == "cc" else ".cpp"
    source = tmp_path / f"one{suffix}"
    source.write_text('#include "tautorch.h"\nint main(void) { return tt_abi_version() - TT_ABI_VERSION; }\n')
    flags = (f"-std={standard}", "-Wall", "-Wextra", "-pedantic", "-Werror")
    run(compiler, *flags, f"-I{INCLUDE}", "-c", source, "-o", tmp_path / "one.o")


def test_an_installed_library_is_found(path: Path, tmp_path: Path) -> None:
    """pkg-config's and CMake's files name what is there."""
    prefix = tmp_path / "prefix"
    for part in ("include", "lib"):
        (prefix / part).mkdir(parents=True)
    run("cmake", "--install", HERE, "--component", "c", "--prefix", prefix)
    source = tmp_path / "one.c"
    source.write_text('#include "tautorch.h"\nint main(void) { return tt_abi_version() - TT_ABI_VERSION; }\n')
    text = (prefix / "lib/pkgconfig/tautorch.pc").read_text()
    assert "-ltautorch" in text
    if shutil.which("pkg-config"):
        env = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
        found = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "tautorch"],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        run("cc", source, *found.stdout.split(), "-o", tmp_path / "one")
        done = subprocess.run([tmp_path / "one"], env={"LD_LIBRARY_PATH": str(prefix / "lib")}, check=False)
        assert done.returncode == 0
    config = (prefix / "lib/cmake/tautorch/tautorch-targets.cmake").read_text()
    assert "tautorch::tautorch_shared" in config and "tautorch::tautorch_static" in config

"""Threads of the C interface: its own, the caller's, and a pool of the host."""

from __future__ import annotations

import ctypes as c
import threading
from typing import Any

import numpy as np
import pytest
from tests.capi import library as t
from tests.capi.library import Library, Refused, at
from tests.capi.problem import Problem, entries


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

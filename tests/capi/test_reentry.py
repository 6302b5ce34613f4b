"""Pools that have a waiting thread do other work, and calls after a thread's destructors."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.capi import library as t
from tests.capi.library import Library, layer_of
from tests.native.building import GIVEN, ROOT, library, run


class Request:
    """Rows that several threads prepare before they share out the outputs: two joins."""

    def __init__(self, lib: Library, seed: int, m: int, n: int, k: int) -> None:
        rng = np.random.default_rng(seed)
        self.lib, self.x = lib, rng.standard_normal((m, k), np.float32)
        weight = rng.integers(-127, 128, (n, k), np.int8)
        self.plan = lib.plan(layer_of(lib.pack(None, t.INT8, weight), n, k))
        self.shape = (m, n)

    def result(self) -> np.ndarray:
        return self.lib.run(self.plan, self.x, np.full(self.shape, 99, np.float32))


@t.NUM_THREADS
def _four(count: Any) -> int:
    count[0] = 4
    return 0


@pytest.fixture
def use_pool(lib: Library) -> Iterator[Callable[[Any], None]]:
    kept = []

    def use(parallel_for: Any) -> None:
        kept.append(parallel_for)
        lib.call("tt_set_thread_pool", parallel_for, _four)

    yield use
    lib.call("tt_set_thread_pool", None, None)


SIZES = [(16, 128, 8192), (4, 256, 16384), (16, 256, 16384), (64, 512, 512)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_a_waiting_thread_may_run_another_request(
    lib: Library, use_pool: Callable[[Any], None], size: tuple[int, int, int], last: bool
) -> None:
    outer, inner = Request(lib, 1, *size), Request(lib, 2, *size)
    expected = outer.result(), inner.result()
    stolen: list[np.ndarray] = []
    depth = 0

    @t.PARALLEL_FOR
    def parallel_for(begin: int, end: int, grain: int, fn: Any, context: int) -> int:
        nonlocal depth
        depth += 1
        tasks = [*range(begin, end)]
        for i in tasks[:-1] if last else []:
            fn(i, i + 1, context)
        if depth == 1:
            stolen.append(inner.result())
        for i in tasks[-1:] if last else tasks:
            fn(i, i + 1, context)
        depth -= 1
        return 0

    use_pool(parallel_for)
    assert np.array_equal(outer.result(), expected[0])
    assert stolen and all(np.array_equal(y, expected[1]) for y in stolen)


def test_a_waiting_thread_may_run_another_requests_tasks(
    lib: Library, use_pool: Callable[[Any], None]
) -> None:
    outer, inner = Request(lib, 1, 16, 128, 8192), Request(lib, 2, 256, 512, 512)
    expected = outer.result(), inner.result()
    owner = threading.get_ident()
    waiting: queue.Queue[tuple[Any, int, int, threading.Event]] = queue.Queue()
    found: list[np.ndarray] = []
    taken = 0

    @t.PARALLEL_FOR
    def parallel_for(begin: int, end: int, grain: int, fn: Any, context: int) -> int:
        nonlocal taken
        if threading.get_ident() != owner:  # all of it is left to the thread that waits for `outer`
            done = [threading.Event() for _ in range(begin, end)]
            for i, event in enumerate(done, begin):
                waiting.put((lambda i=i: fn(i, i + 1, context), i, end, event))
            return 0 if all(event.wait(60) for event in done) else 1
        for i in range(begin, end):
            fn(i, i + 1, context)
            for _ in range(2):
                try:
                    work, _, _, event = waiting.get(timeout=0.05 if taken else 5.0)
                except queue.Empty:
                    break
                work()
                event.set()
                taken += 1
        return 0

    other = threading.Thread(target=lambda: found.append(inner.result()))
    use_pool(parallel_for)
    other.start()
    got = outer.result()
    while other.is_alive():
        try:
            work, _, _, event = waiting.get(timeout=0.01)
        except queue.Empty:
            continue
        work()
        event.set()
    other.join(60)
    assert taken and np.array_equal(got, expected[0]) and np.array_equal(found[0], expected[1])


@pytest.mark.skipif(GIVEN is not None, reason="the program is linked to a plain library")
def test_a_call_after_the_threads_destructors(tmp_path: Path) -> None:
    if not shutil.which("cc"):
        pytest.skip("cc is not installed")
    folder, program = library("libtautorch.so").parent, tmp_path / "late"
    source = Path(__file__).with_name("late.c")
    run("cc", "-std=c11", f"-I{ROOT / 'include'}", source, f"-L{folder}", "-ltautorch",
        f"-Wl,-rpath,{folder}", "-o", program)  # fmt: skip
    assert run(program).split("\n")[0] == "status 0, same 1, spoiled 0"

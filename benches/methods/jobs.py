"""Cached, seeded functions that depend on each other, run by a few worker processes with one thread each.

A job's result is a file named by a hash of its function, its settings and the results it needs: what has been
computed once is found again, whatever else was asked for in between, and a killed run goes on where it was. A
change of code shows in no hash: raise the `version` among the settings, or run with `--fresh`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]
"""Numbers, strings, tensors, and lists and dicts of them: what `torch.load(weights_only=True)` reads."""


@dataclass(frozen=True)
class Job:
    """`run(**settings, **results of needs) -> Result`, a function at the top of a module.

    An `exclusive` job measures time: it runs in this process, alone, after all the others.
    """

    name: str
    run: Callable[..., Result]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Job] = field(default_factory=dict)
    exclusive: bool = False

    @cached_property
    def key(self) -> str:
        """20 hexadecimal digits of everything that decides the result."""
        parts = {
            "run": self.run.__qualname__,
            "settings": dict(self.settings),
            "needs": {name: job.key for name, job in self.needs.items()},
            "torch": torch.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def file(self, cache: Path) -> Path:
        """Where the result is kept."""
        return cache / f"{self.name}-{self.key}.pt"


@dataclass
class Outcome:
    """What became of a list of jobs: results by key, one line for each that failed, seconds of work in
    all."""

    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    computed: int = 0


def closure(jobs: Iterable[Job]) -> list[Job]:
    """The jobs and all they need, each once, needs first."""
    found: dict[str, Job] = {}

    def visit(job: Job) -> None:
        if job.key not in found:
            for needed in job.needs.values():
                visit(needed)
            found[job.key] = job

    for job in jobs:
        visit(job)
    return list(found.values())


def run_all(
    jobs: Iterable[Job],
    cache: Path,
    *,
    workers: int = 2,
    fresh: bool = False,
    cached: bool = False,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Compute what the cache lacks; a failed job takes along those that need it, and no others.

    `fresh` computes everything, `cached` nothing: the outcome then lacks what was not there.
    """
    cache.mkdir(parents=True, exist_ok=True)
    waiting = closure(jobs)
    total, outcome = len(waiting), Outcome()
    if not fresh:
        for job in waiting:
            kept = _read(job.file(cache))
            if kept is not None:
                outcome.results[job.key] = kept["result"]
                outcome.seconds += kept["seconds"]
        waiting = [job for job in waiting if job.key not in outcome.results]
    say(f"{total - len(waiting)} of {total} results are in {cache}")

    if cached:
        return outcome

    def done(job: Job, value: tuple[Result, float] | str) -> None:
        outcome.computed += 1
        if isinstance(value, str):
            outcome.failed[job.key] = f"{job.name}: {value.strip().splitlines()[-1]}"
            say(f"FAILED {job.name} {dict(job.settings)}\n{value}")
            return
        outcome.results[job.key], seconds = value
        outcome.seconds += seconds
        ready = len(outcome.results)
        say(f"[{ready}/{total}] {job.name} {_numbers(outcome.results[job.key])} ({seconds:.1f} s)")

    if any(not job.exclusive for job in waiting):
        _run_in_workers(waiting, cache, workers, outcome, done)
    for job in waiting:
        if job.exclusive and not _blocked(job, outcome):
            done(job, _work(job, cache))
    return outcome


def _run_in_workers(
    waiting: list[Job],
    cache: Path,
    workers: int,
    outcome: Outcome,
    done: Callable[[Job, tuple[Result, float] | str], None],
) -> None:
    # Forked children of a process that has used torch's threads hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    left, running = [job for job in waiting if not job.exclusive], dict[Future[Any], Job]()
    try:
        while left or running:
            for job in list(left):
                if _blocked(job, outcome):
                    left.remove(job)
                elif len(running) < workers and all(n.key in outcome.results for n in job.needs.values()):
                    left.remove(job)
                    running[pool.submit(_work, job, cache)] = job
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                error = future.exception()
                done(running.pop(future), future.result() if error is None else f"{error!r}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _blocked(job: Job, outcome: Outcome) -> bool:
    """Whether something it needs has failed; it has then failed too."""
    for needed in job.needs.values():
        if needed.key in outcome.failed:
            outcome.failed[job.key] = outcome.failed[needed.key]
            return True
    return False


def _one_thread() -> None:
    torch.set_num_threads(1)


def _work(job: Job, cache: Path) -> tuple[Result, float] | str:
    """Run one job and keep its result; what went wrong, as text, if something did."""
    try:
        needs = {name: _needed(needed, cache) for name, needed in job.needs.items()}
        start = time.process_time()
        result = job.run(**job.settings, **needs)
        seconds = time.process_time() - start
        _write(job.file(cache), {"result": result, "seconds": seconds})
        return result, seconds
    except Exception:
        return traceback.format_exc()


def _needed(job: Job, cache: Path) -> Result:
    kept = _read(job.file(cache))
    if kept is None:
        raise FileNotFoundError(f"{job.file(cache)} went away while it was needed; run again")
    return kept["result"]  # type: ignore[no-any-return]


def _read(path: Path) -> dict[str, Any] | None:
    """What was kept there; None for a file that is not there or not whole, which is then made again."""
    try:
        kept = torch.load(path, weights_only=True)
        return kept if {"result", "seconds"} <= kept.keys() else None
    except Exception:
        return None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """In one step: a reader sees the whole file or none."""
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(dict(value), part)
    part.replace(path)


def _numbers(result: Result) -> str:
    """The plain numbers of a result, for the log."""
    return " ".join(
        f"{name}={value:.5g}" for name, value in result.items() if isinstance(value, (int, float))
    )

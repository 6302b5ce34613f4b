"""Cached jobs: computed once, found again, made anew when they must be, and no harm from one that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benches.methods.jobs import Job, Result, closure, run_all


def first(seed: int, log: str) -> Result:
    _note(log, f"first {seed}")
    return {"value": 10 * seed, "state": {"weight": torch.arange(3) + seed}}


def second(seed: int, log: str, extra: int, taken: Result) -> Result:
    _note(log, f"second {seed}")
    return {"value": taken["value"] + extra, "sum": int(taken["state"]["weight"].sum())}


def broken(seed: int, log: str) -> Result:
    _note(log, f"broken {seed}")
    raise ValueError(f"no luck with {seed}")


def threads(log: str) -> Result:
    return {"threads": torch.get_num_threads()}


def _note(log: str, line: str) -> None:
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def lines(log: Path) -> list[str]:
    return sorted(log.read_text(encoding="utf-8").split("\n")[:-1]) if log.exists() else []


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def pair(log: Path, seed: int, extra: int = 5, **options: Any) -> Job:
    """A job that needs another; in this process, so that no test waits for workers to start."""
    needed = Job("first", first, {"seed": seed, "log": str(log)}, exclusive=True)
    settings = {"seed": seed, "log": str(log), "extra": extra}
    return Job("second", second, settings, {"taken": needed}, exclusive=True, **options)


def run(jobs: list[Job], folder: Path, **options: Any) -> Any:
    return run_all(jobs, folder / "cache", say=lambda line: None, **options)


def test_a_result_is_computed_once_and_found_again(tmp_path: Path, log: Path) -> None:
    job = pair(log, 2)
    once = run([job, job], tmp_path)
    again = run([pair(log, 2)], tmp_path)
    assert once.results[job.key] == again.results[job.key] == {"value": 25, "sum": 9}
    assert lines(log) == ["first 2", "second 2"]
    assert (once.computed, again.computed) == (2, 0)
    assert again.seconds == pytest.approx(once.seconds)


def test_another_setting_or_seed_is_another_result(tmp_path: Path, log: Path) -> None:
    jobs = [pair(log, 2), pair(log, 2, extra=6), pair(log, 3)]
    outcome = run(jobs, tmp_path)
    assert [outcome.results[job.key]["value"] for job in jobs] == [25, 26, 35]
    # What they need is shared.
    assert lines(log) == ["first 2", "first 3", "second 2", "second 2", "second 3"]


def test_a_change_in_what_is_needed_changes_the_key(log: Path) -> None:
    def over(extra: int) -> Job:
        return Job("over", second, {"seed": 0, "log": "", "extra": 0}, {"taken": pair(log, 2, extra)})

    assert over(5).key == over(5).key != over(6).key


def test_fresh_computes_anew(tmp_path: Path, log: Path) -> None:
    run([pair(log, 1)], tmp_path)
    assert run([pair(log, 1)], tmp_path, fresh=True).computed == 2
    assert lines(log) == ["first 1", "first 1", "second 1", "second 1"]


def test_cached_computes_nothing(tmp_path: Path, log: Path) -> None:
    run([pair(log, 1)], tmp_path)
    outcome = run([pair(log, 1), pair(log, 2)], tmp_path, cached=True)
    assert set(outcome.results) == {job.key for job in closure([pair(log, 1)])}
    assert lines(log) == ["first 1", "second 1"]


def test_a_file_that_is_cut_short_is_made_again(tmp_path: Path, log: Path) -> None:
    job = pair(log, 2)
    run([job], tmp_path)
    file = job.file(tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:100])
    assert run([job], tmp_path).results[job.key]["value"] == 25
    assert lines(log) == ["first 2", "second 2", "second 2"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_failure_takes_along_what_needs_it_and_nothing_else(tmp_path: Path, log: Path) -> None:
    bad = Job("bad", broken, {"seed": 1, "log": str(log)}, exclusive=True)
    above = Job("above", second, {"seed": 1, "log": str(log), "extra": 0}, {"taken": bad}, exclusive=True)
    good = pair(log, 4)
    said: list[str] = []
    outcome = run_all([above, good], tmp_path / "cache", say=said.append)
    assert outcome.failed[bad.key] == outcome.failed[above.key] == "bad: ValueError: no luck with 1"
    assert outcome.results[good.key]["value"] == 45
    assert any("FAILED bad" in line and "Traceback" in line for line in said)
    # What failed is tried again, what did not is not.
    run([above, good], tmp_path)
    assert lines(log) == ["broken 1", "broken 1", "first 4", "second 4"]


def test_closure_puts_needs_first_and_each_once(log: Path) -> None:
    job = pair(log, 2)
    found = closure([job, job, pair(log, 2, extra=6)])
    assert [item.name for item in found] == ["first", "second", "second"]


def test_workers_have_one_thread_and_read_what_others_wrote(tmp_path: Path, log: Path) -> None:
    needed = Job("first", first, {"seed": 1, "log": str(log)})
    settings = {"seed": 1, "log": str(log), "extra": 1}
    job = Job("second", second, settings, {"taken": needed})
    alone = Job("threads", threads, {"log": ""})
    outcome = run([job, alone], tmp_path, workers=1)
    assert not outcome.failed
    assert outcome.results[job.key] == {"value": 11, "sum": 6}
    assert outcome.results[alone.key] == {"threads": 1}

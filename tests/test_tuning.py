"""Tiles by measurement: tables, their precedence, their files, and when measuring happens."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tautorch
from tautorch import tuning

KEY = ("op", 64, 8, 8)
NAME = "A GPU"


@dataclass(frozen=True)
class Tile:
    block_m: int
    splits: int


RULE, SLOW, FAST, UNABLE = Tile(16, 1), Tile(32, 3), Tile(64, 1), Tile(128, 1)


class Stand:
    """A device on which FAST is fast and UNABLE does not run."""

    def __init__(self) -> None:
        self.ran: list[Tile] = []
        self.x: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 0)

    def run(self, tile: Tile) -> None:
        if tile == UNABLE:
            raise RuntimeError("out of shared memory")
        self.ran.append(tile)

    def choose(self, key: tuple[object, ...] = KEY) -> Tile:
        return tuning.choose(
            self.x, key, lambda: RULE, lambda: [SLOW, FAST, UNABLE], lambda v: tuning.tile(Tile, v), self.run
        )


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stand]:
    s = Stand()

    def times(calls: list[Any]) -> list[float]:
        spans = []
        for call in calls:
            call()
            spans.append(1.0 if s.ran[-1] == FAST else 2.0)
        return spans

    monkeypatch.setenv("TAUTORCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_device_name", lambda index: NAME)
    monkeypatch.setattr(tuning, "_time", times)
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "_tables", {})
    monkeypatch.setattr(tuning, "shipped_file", lambda device: tmp_path / "shipped.json")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    yield s


def ship(tile: Any, measured: bool) -> None:
    text = "|".join(map(str, (NAME, *KEY)))
    data = {"version": tuning.VERSION, "measured": measured, "choices": {text: tile}}
    tuning.shipped_file(NAME).write_text(json.dumps(data))


def forget() -> None:
    """As a new process starts."""
    tuning._found.clear()
    tuning._tables.clear()


def test_without_a_table_the_rule_decides_and_nothing_runs(stand: Stand) -> None:
    assert stand.choose() == RULE and not stand.ran and not tuning.cache_file().exists()


def test_measuring_finds_the_fastest_and_keeps_it(stand: Stand) -> None:
    with tuning.measuring():
        assert stand.choose() == FAST
    count = len(stand.ran)
    assert count and UNABLE not in stand.ran
    assert stand.choose() == FAST
    forget()
    with tuning.measuring():
        assert stand.choose() == FAST
    assert len(stand.ran) == count, "what is in the file is not measured again"
    assert [p.name for p in tuning.cache_file().parent.iterdir()] == [tuning.cache_file().name]


def test_choices_of_several_keys_share_the_file(stand: Stand) -> None:
    with tuning.measuring():
        stand.choose()
        tuning._tables.clear()  # another process wrote the file meanwhile
        stand.choose(("other", 1))
    assert len(json.loads(tuning.cache_file().read_text())["choices"]) == 2


def test_a_shipped_default_counts_until_something_was_measured(stand: Stand) -> None:
    ship(astuple(SLOW), measured=False)
    assert stand.choose() == SLOW
    with tuning.measuring():
        assert stand.choose() == FAST
    assert stand.choose() == FAST


def test_a_shipped_measurement_is_not_repeated(stand: Stand) -> None:
    ship(astuple(SLOW), measured=True)
    with tuning.measuring():
        assert stand.choose() == SLOW and not stand.ran


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 0, "choices": {}}', "\x00\xff"])
def test_a_bad_file_is_one_line_and_replaced_by_what_is_measured(stand: Stand, text: str) -> None:
    path = tuning.cache_file()
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="is not used"):
        assert stand.choose() == RULE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stand.choose(("again",))
        with tuning.measuring():
            stand.choose()
        forget()
        assert stand.choose() == FAST


@pytest.mark.parametrize(
    "tile",
    [[3, 1], [16], [16, 1, 1], ["16", 1], [0, 1], [8, 1], [512, 1], [4096, 1], [16, 65], None, 7, [True, 1]],
)
def test_a_bad_tile_is_not_used(stand: Stand, tile: Any) -> None:
    ship(tile, measured=True)
    assert stand.choose() == RULE


def test_a_tile_that_does_not_run_here_gives_way_to_the_rules(stand: Stand) -> None:
    def launch() -> Tile:
        def run(tile: Tile) -> Tile:
            stand.run(tile)
            return tile

        return tuning.launch(stand.x, KEY, lambda: RULE, lambda: [FAST], lambda v: tuning.tile(Tile, v), run)

    ship(astuple(UNABLE), measured=True)
    with pytest.warns(UserWarning, match="does not run here .*out of shared memory"):
        assert launch() == RULE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch() == RULE, "it is not tried again"
    assert stand.ran == [RULE, RULE]
    stand.run = lambda tile: (_ for _ in ()).throw(RuntimeError("broken"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):  # the rule's own failure is an error
        launch()


def test_a_folder_that_cannot_be_written_does_not_stop_a_call(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAUTORCH_CACHE", str(tmp_path / "file"))
    with tuning.measuring(), pytest.warns(UserWarning, match="cannot be written"):
        assert stand.choose() == FAST


def test_a_write_that_fails_leaves_no_file_behind(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tuning.os, "replace", no)
    with tuning.measuring(), pytest.warns(UserWarning, match="disk full"):
        assert stand.choose() == FAST
    assert not list(tuning.cache_file().parent.iterdir())
    assert stand.choose() == FAST


def test_processes_that_write_take_turns(stand: Stand) -> None:
    script = (
        "import sys, pathlib; from tautorch import tuning; p = pathlib.Path(sys.argv[1])\n"
        "for i in range(20): tuning._write(p, f'{sys.argv[2]}{i}', [16])"
    )
    path = tuning.cache_file()
    both = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in "ab"]
    assert [p.wait(120) for p in both] == [0, 0]
    assert len(json.loads(path.read_text())["choices"]) == 40


def test_no_room_to_measure_in_is_the_rule_and_not_kept(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(calls: list[Any]) -> list[float]:
        raise torch.cuda.OutOfMemoryError("256 MiB")

    monkeypatch.setattr(tuning, "_time", full)
    with tuning.measuring():
        assert stand.choose() == RULE
    assert not tuning.cache_file().exists()


def test_nothing_is_measured_in_a_capture_or_on_the_cpu(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tuning.measuring():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert stand.choose() == RULE
        stand.x = SimpleNamespace(is_cuda=False)
        assert stand.choose() == RULE
    assert not stand.ran


def test_warmup_measures_and_nothing_else_does() -> None:
    seen = []

    class Look(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuning._measuring)
            return x

    model = Look()
    model(torch.zeros(1))
    tautorch.warmup(model, torch.zeros(1))
    model(torch.zeros(1))
    assert seen == [False, True, False]


@pytest.mark.parametrize("m,bucket", [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_buckets_of_rows(m: int, bucket: int) -> None:
    assert tuning.rows_of(m) == bucket


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAUTORCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tuning.cache_file() == Path("/x/tautorch/gpu-tiles-1.json")


def test_the_shipped_table_holds_the_rules_choices() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from benches.gpu import tiles

    from tautorch.triton_kernels import _lowrank_tiles, sparse_linear

    data = json.loads(tuning.shipped_file("NVIDIA H200").read_text())
    parse = {"lowrank_linear": _lowrank_tiles.parse}
    for key, tile in data["choices"].items():
        op = key.split("|")[1]
        parse.get(op, lambda v: tuning.tile(sparse_linear.Config, v))(tile)  # type: ignore[arg-type]
    if not data["measured"]:
        rule = {f"NVIDIA H200|{key}": tile for key, tile in tiles.by_rule().items()}
        assert data["choices"] == json.loads(json.dumps(rule)), "run benches/gpu/tiles.py"

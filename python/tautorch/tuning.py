"""Tiles chosen by measurement, once per operator, shape and device, and remembered in a file.

A choice is looked up in the user's cache file, then in the table that ships for the device, then it is the
kernels' own rule. Measuring happens nowhere but inside ``measuring()``, which ``tautorch.warmup`` enters: no
call pays for it unasked. The file is ``gpu-tiles-1.json`` in ``$TAUTORCH_CACHE``, else in
``$XDG_CACHE_HOME/tautorch`` or ``~/.cache/tautorch``; the number is the format's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

VERSION = 1
SAMPLES = 7
T = TypeVar("T")
R = TypeVar("R")

_measuring = False
_tables: dict[Path, dict[str, Any]] = {}
_found: dict[tuple[Any, ...], Any] = {}  # (tile or None, measured) by device and key


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Inside, a choice that was not measured on this device is."""
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


def cache_file() -> Path:
    """Where measured choices are kept."""
    folder = os.environ.get("TAUTORCH_CACHE")
    if folder:
        return Path(folder) / f"gpu-tiles-{VERSION}.json"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tautorch" / f"gpu-tiles-{VERSION}.json"


def shipped_file(device: str) -> Path:
    """The table that ships for a device; there may be none."""
    return Path(__file__).parent / "triton_kernels" / "tiles" / f"{device.lower().replace(' ', '-')}.json"


def rows_of(m: int) -> int:
    """The bucket of a number of rows: 16 or the power of two above, so that few shapes are measured."""
    return max(16, 1 << max(0, m - 1).bit_length())


def _read(path: Path) -> dict[str, Any]:
    """A table: ``choices`` by key, ``measured``. A bad file costs one line, until a write replaces it."""
    if path not in _tables:
        table: dict[str, Any] = {"choices": {}, "measured": True}
        try:
            data = json.loads(path.read_text())
            if data["version"] != VERSION or not isinstance(data["choices"], dict):
                raise ValueError(f"version {data['version']}")
            table = {"choices": data["choices"], "measured": data["measured"] is True}
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"tautorch: {path} is not used ({error!r}); delete it", stacklevel=2)
        _tables[path] = table
    return _tables[path]


def _write(path: Path, key: str, choice: Any) -> None:
    """Add a choice to the file, whole or not at all; processes that do at the same time take turns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            _replace(path, {**_read_again(path)["choices"], key: choice})
    except OSError as error:
        _tables[path] = {"choices": {**_read_again(path)["choices"], key: choice}, "measured": True}
        warnings.warn(f"tautorch: {path} cannot be written ({error}); tiles are not kept", stacklevel=2)


def _read_again(path: Path) -> dict[str, Any]:
    """The table with what others have written since."""
    _tables.pop(path, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was first read; it is replaced now
        return _read(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is; the folder itself is locked, so no file is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, choices: dict[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"version": VERSION, "measured": True, "choices": choices}, file, indent=0)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _tables[path] = {"choices": choices, "measured": True}


def choose(
    x: Tensor,
    key: Sequence[object],
    rule: Callable[[], T],
    candidates: Callable[[], Sequence[T]],
    parse: Callable[[Any], T],
    run: Callable[[T], object],
) -> T:
    """The tile for ``key`` on the device of ``x``.

    Args:
        key: operator, bucket of rows, sizes and whatever else decides what is fast.
        rule: the choice without a measurement; ``x`` on the CPU (the interpreter) gets it.
        candidates: what is tried when measuring; the rule's choice is tried too.
        parse: a choice, a dataclass, from the values of its fields as JSON; raises for what is none.
        run: launch once with a choice.
    """
    if not x.is_cuda:
        return rule()
    device = _device_name(x.get_device())
    full = (device, *key)
    if full not in _found:
        _found[full] = _look_up("|".join(str(part) for part in full), device, parse)
    found, is_measured = _found[full]
    if found is not None and (is_measured or not _measuring):
        return found  # type: ignore[no-any-return]
    if not _measuring or torch.cuda.is_current_stream_capturing():
        return rule()
    try:
        with torch.cuda.device(x.get_device()):  # whose stream the events go to
            best = _fastest([rule(), *candidates()], run)
    except torch.cuda.OutOfMemoryError:  # no room to flush L2 with; not remembered
        return rule()
    _found[full] = best, True
    _write(cache_file(), "|".join(str(part) for part in full), astuple(best))  # type: ignore[call-overload]
    return best


def launch(
    x: Tensor,
    key: Sequence[object],
    rule: Callable[[], T],
    candidates: Callable[[], Sequence[T]],
    parse: Callable[[Any], T],
    run: Callable[[T], R],
) -> R:
    """``run`` with what ``choose`` says, or, where that does not run here, with the rule's choice.

    A table's tile may be of another version of the compiler, or too large for a device of that name.
    """
    chosen = choose(x, key, rule, candidates, parse, run)
    try:
        return run(chosen)
    except Exception as error:
        usual = rule()
        if chosen == usual:
            raise
        full = (_device_name(x.get_device()), *key)
        _found[full] = None, False
        text = "|".join(str(part) for part in full)
        warnings.warn(
            f"tautorch: the tile kept for {text} does not run here ({error!r:.200}); the rule's does. "
            f"Delete {cache_file()}",
            stacklevel=2,
        )
        return run(usual)


def _look_up(text: str, device: str, parse: Callable[[Any], T]) -> tuple[T | None, bool]:
    """The choice that a table has for a key, and whether it was measured."""
    for path in (cache_file(), shipped_file(device)):
        table = _read(path)
        if text in table["choices"]:
            with contextlib.suppress(TypeError, ValueError):
                return parse(table["choices"][text]), table["measured"]
    return None, False


@functools.lru_cache(maxsize=64)
def _device_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


# Least and largest value of a tile's field, and whether it may be other than a power of two.
_RANGES = {
    "block_m": (16, 256, False),
    "block_n": (16, 256, False),
    "block_k": (16, 256, False),
    "chunk": (1, 16, False),
    "num_warps": (1, 16, False),
    "num_stages": (1, 8, True),
    "splits": (1, 64, True),
    "group_m": (1, 64, True),
}


def tile(kind: type[T], values: Any) -> T:
    """A dataclass of integers from its values; ValueError where one is out of its field's range."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name, value in zip(names, values, strict=True):
        low, high, any_number = _RANGES[name]
        if type(value) is not int or not low <= value <= high or not (any_number or value.bit_count() == 1):
            raise ValueError(f"{name} {value!r}")
    return kind(*values)


def _fastest(choices: list[T], run: Callable[[T], object]) -> T:
    """By the median of cold runs in turn; a choice that this device cannot run is passed over."""
    able: list[T] = []
    for choice in choices:
        if choice in able:
            continue
        with contextlib.suppress(Exception):  # too much shared memory, or the compiler gave up
            run(choice)
            able.append(choice)
    if len(able) < 2:
        return able[0] if able else choices[0]
    times = _time([lambda choice=choice: run(choice) for choice in able])  # type: ignore[misc]
    return able[min(range(len(able)), key=times.__getitem__)]


def _time(calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each call, L2 flushed before it: the median of ``SAMPLES``, taken in turns."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    events = []
    for i in range(SAMPLES):
        for call in calls:
            flush.fill_(i)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize()
    spans = [float(begin.elapsed_time(end)) for begin, end in events]
    return [sorted(spans[i :: len(calls)])[SAMPLES // 2] for i in range(len(calls))]

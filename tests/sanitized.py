"""Run pytest with a sanitized build of the extension in place of the installed one; `make sanitize` calls it.

usage: python tests/sanitized.py FOLDER [pytest arguments]

One process for each core, with a share of the tests. Not pytest-xdist: the address sanitizer ends a process,
and xdist keeps to itself what it says of the reason.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME, SHARE = "tautorch._C", "TAUTORCH_SHARE"


class Share:
    """Of the tests that are collected, number `first` and every `step`-th after it."""

    def __init__(self, first: int, step: int) -> None:
        self.first, self.step = first, step

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.first :: self.step]


def run(folder: str, arguments: list[str], share: Share) -> int:
    # The tag keeps a module of another Python version out.
    path = next(Path(folder).glob(f"_C.{sys.implementation.cache_tag}*.so"))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return int(pytest.main(arguments, plugins=[share]))


def main() -> int:
    folder, *arguments = sys.argv[1:]
    if SHARE in os.environ:
        first, step = os.environ[SHARE].split("/")
        return run(folder, arguments, Share(int(first), int(step)))
    count = min(8, os.cpu_count() or 1)
    running = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, SHARE: f"{i}/{count}"})
        for i in range(count)
    ]
    codes = [process.wait() for process in running]
    none = int(pytest.ExitCode.NO_TESTS_COLLECTED)  # few tests leave some without a share
    return max((abs(code) for code in codes if code != none), default=none)


if __name__ == "__main__":
    sys.exit(main())

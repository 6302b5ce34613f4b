"""Run pytest with a sanitized build of the extension in place of the installed one; `make sanitize` calls it.

usage: python tests/sanitized.py FOLDER [pytest arguments]
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "tautorch._C"


def main() -> int:
    folder, *arguments = sys.argv[1:]
    # The tag keeps a module of another Python version out.
    path = next(Path(folder).glob(f"_C.{sys.implementation.cache_tag}*.so"))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())

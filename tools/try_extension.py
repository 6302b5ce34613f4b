"""Runs the extension at this path without torch or numpy: every kernel of this CPU, against plain integers.

python try_extension.py [_C.cpython-311-aarch64-linux-gnu.so]     # the installed package's where left out
"""

from __future__ import annotations

import array
import importlib.util
import platform
import random
import sys
from pathlib import Path
from types import ModuleType

DENSE_I8, GIVEN, INT8, INT32 = 0, 2, 3, 4
TAIL = (
    "weight_scale", "weight_scales", "bias", "biases", "activation", "out_scale", "out_zero_point", "mode",
    "x_scale", "x_scales", "x_zero_point",
)  # fmt: skip


def load(path: str) -> ModuleType:
    """The module tautorch._C of this file."""
    spec = importlib.util.spec_from_file_location("tautorch._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed() -> str:
    """The extension of the installed package, found without importing it."""
    package = importlib.util.find_spec("tautorch")
    assert package is not None and package.submodule_search_locations is not None
    folders = [Path(folder) for folder in package.submodule_search_locations]
    return str(next(path for folder in folders for path in folder.glob("_C.*.so")))


def address(values: array.array[int] | array.array[float]) -> int:
    return values.buffer_info()[0]


def check(extension: ModuleType, kernel: str, m: int, n: int, k: int) -> None:
    """int32 accumulators of int8 rows and weights."""
    w = array.array("b", (random.randint(-127, 127) for _ in range(n * k)))
    x = array.array("b", (random.randint(-128, 127) for _ in range(m * k)))
    size = extension.dense_pack_bytes(kernel, DENSE_I8, 1, n, k, 1)
    packed, one, y = array.array("d", bytes(size + 8)), array.array("f", [1.0]), array.array("i", [7] * m * n)
    extension.dense_pack(kernel, DENSE_I8, 1, n, k, 1, address(w), k, 1, 0, address(packed))
    tail = {**dict.fromkeys(TAIL, 0), "mode": GIVEN, "x_scale": address(one), "x_scales": 1}
    plan = extension.int8_linear_plan(address(packed), size, k, tail)
    extension.int8_linear_run(plan, address(x), INT8, m, k, address(y), INT32)
    expected = [
        sum(x[i * k + t] * w[j * k + t] for t in range(k)) for i in range(m) for j in range(n)
    ]  # fmt: skip
    assert y.tolist() == expected, f"{kernel} is wrong at {m} x {n} x {k}"
    assert extension.last_used("int8_linear") == kernel


def main() -> None:
    """The command."""
    extension = load(sys.argv[1] if len(sys.argv) > 1 else installed())
    random.seed(0)
    names = [name for name, available in extension.isas().items() if available]
    for name in names:
        for sizes in ((1, 1, 1), (1, 65, 70), (9, 33, 129)):
            check(extension, name, *sizes)
    print(f"{platform.machine()}, Python {platform.python_version()}: {', '.join(names)} are exact")


if __name__ == "__main__":
    main()

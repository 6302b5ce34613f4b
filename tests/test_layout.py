"""One operator is one row of files with one name, and the arrows between the parts point one way.

Both are read off the tree (file names, `ast`, `#include` lines), so that a new operator or module is checked
by being there.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tautorch

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "tautorch"

OPERATORS = sorted(p.name for p in (CSRC / "kernels").iterdir() if p.is_dir() and p.name != "common")

ROW = (
    "csrc/kernels/{op}/{op}.h",
    "csrc/kernels/{op}/{op}.cpp",
    "csrc/bindings/{op}.cpp",
    "python/tautorch/ops/{op}.py",
    "python/tautorch/reference/{op}.py",
    "python/tautorch/nn/{op}.py",
    "benches/bench_{op}.py",
)

# What these folders hold beside the operators. A file that is in neither is misnamed.
SHARED = {
    "csrc/bindings": {"module_cpu", "module_cuda", "pack", "plan", "recall", "eager"}
    | {f"module_cuda_{op}" for op in ("int8_linear", "sparse_linear", "int8_conv2d", "sparse_conv2d")},
    "python/tautorch/ops": {
        "__init__",
        "caches",
        "geometry",
        "gradients",
        "library",
        "packing",
        "quantize_rows",
        "sparse_entries",
        "tails",
    },
    "python/tautorch/reference": {"__init__", "common", "layouts", "quantize_rows", "quantizer"},
    "python/tautorch/triton_kernels": {"__init__"},
    "python/tautorch/nn": {
        "__init__",
        "packed",
        "eager",
        "tail",
        "linear",
        "convolution",
        "sparse",
        "factors",
        "layer",
        "lowrank",
    },
}

ARCHITECTURES = {"scalar", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx"}
ARCHITECTURES |= {"neon", "neon_dotprod", "neon_i8mm"}
ARCHITECTURES |= {"sm80", "sm90", "sm90a", "sm100a", "sm120"}

# Who may know whom: a part, and the parts it may import. A part is the first name after `tautorch.`.
HELPERS = {"_version", "_batches", "_layers", "_gram", "capture", "distributed", "ownership", "timing"}
METHODS = {"distill", "prune", "quantize", "factorize", "students"}
MODULES = {"nn", "ops", "dispatch"} | HELPERS
CONVERT = {"convert", "fuse"} | MODULES
ARROWS: dict[str, set[str]] = {
    "reference": set(),
    "tuning": set(),
    "triton_kernels": {"tuning"},
    "_version": set(),
    "distributed": set(),
    "_batches": {"distributed"},
    "_layers": set(),
    "_shards": set(),
    "layerwise": {"_batches", "_layers", "_shards", "distributed"},
    "_gram": {"_batches", "_layers", "distributed"},
    "timing": set(),
    "coding": set(),
    "ownership": {"_layers"},
    "capture": {"_batches"},
    "dispatch": {"_C", "_cuda"},
    "ops": {"dispatch", "reference", "triton_kernels", "tuning", "_C", "_cuda"},
    "nn": {
        "_layers",
        "ops",
        "dispatch",
        "reference",
        "_C",
        "_cuda",
    },  # forward calls the binding in plain eager inference
    "fuse": MODULES,
    "convert": MODULES,
    "explain": MODULES | {"tuning"},
    **dict.fromkeys(METHODS, MODULES | METHODS | {"reference"}),  # the numbers that layers compute
    "storage": CONVERT | METHODS | {"reference", "coding"},
    "compress": CONVERT | METHODS | {"storage"},
    "demo": CONVERT | METHODS | {"storage", "compress"},
    "testing": {"reference", "timing", "_C"},
    "bench": MODULES | METHODS | {"reference", "testing", "_C"},
    "__main__": {"cli"},
    "cli": CONVERT | METHODS | {"storage", "compress", "demo", "bench"},
}


def camel(op: str) -> str:
    """int8_linear -> Int8Linear, lowrank_linear -> LowRankLinear."""
    return "".join({"lowrank": "LowRank"}.get(word, word.capitalize()) for word in op.split("_"))


def test_there_are_operators() -> None:
    assert "int8_linear" in OPERATORS


@pytest.mark.parametrize("op", OPERATORS)
def test_row_is_whole(op: str) -> None:
    missing = [name.format(op=op) for name in ROW if not (ROOT / name.format(op=op)).is_file()]
    if not list((ROOT / "tests").rglob(f"test_{op}.py")):
        missing.append(f"tests/**/test_{op}.py")
    assert not missing


@pytest.mark.parametrize("folder", SHARED)
def test_folder_holds_operators_only(folder: str) -> None:
    stems = {p.stem for p in (ROOT / folder).iterdir() if p.suffix in {".py", ".cpp"}}
    odd = {s for s in stems - SHARED[folder] - set(OPERATORS) if not s.startswith("_")}
    assert not odd, f"{folder}: {sorted(odd)} belong to no operator"


def test_kernel_files_carry_their_operators_name() -> None:
    for op in OPERATORS:
        for path in (CSRC / "kernels" / op).iterdir():
            assert path.stem == op or path.stem.startswith(f"{op}_"), path
    for path in (CSRC / "kernels").rglob("*"):
        suffix = re.search(r"_((?:avx|neon|sm\d|amx|sse)\w*)$", path.stem)
        assert suffix is None or suffix[1] in ARCHITECTURES, (
            f"{path.name}: {suffix and suffix[1]} is not known"
        )


@pytest.mark.parametrize("op", OPERATORS)
def test_names_agree(op: str) -> None:
    public = getattr(tautorch.ops, op)
    truth = getattr(__import__(f"tautorch.reference.{op}", fromlist=[op]), op)
    assert (
        inspect.signature(public, eval_str=False).parameters.keys()
        == inspect.signature(truth).parameters.keys()
    )
    module = getattr(tautorch.nn, camel(op))
    assert module.__name__ == camel(op) and module.op == op and tautorch.nn.MODULES[camel(op)] is module
    assert hasattr(torch.ops.tautorch, op)


# ---- arrows, Python ----


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, path: Path) -> list[str]:
    """The full names an import statement brings in, `from a import b` as a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module_name(path).split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    return []


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for name in imported(node, path):
            yield name, node


def part_of(name: str) -> str | None:
    """tautorch.nn.packed -> nn, tautorch.convert_report -> convert.

    None for the package itself (its version, a public name) and for other people's modules.
    """
    words = name.split(".")
    if words[0] != "tautorch" or len(words) == 1:
        return None
    word = words[1]
    if word in ("_C", "_cuda"):
        return word
    if not (PACKAGE / word).is_dir() and not (PACKAGE / f"{word}.py").exists():
        return None
    return next((part for part in ARROWS if word.startswith(f"{part}_")), word)


PYTHON = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON, ids=module_name)
def test_python_arrows(path: Path) -> None:
    part = part_of(module_name(path))
    if part in (None, "testing"):  # the package's __init__ re-exports; testing serves tests and benches alone
        return
    assert part in ARROWS, f"{part} is new: say in ARROWS what it may import"
    for name, node in imports(path):
        target = part_of(name)
        if name.split(".")[0] == "tautorch":
            assert target is not None, (
                f"line {node.lineno}: {name}: import from the part, not from the package"
            )
            assert target == part or target in ARROWS[part], (
                f"line {node.lineno}: {part} may not import {target}"
            )
        assert name.split(".")[0] not in {"tests", "benches", "examples"}, (
            f"{name} is not part of the product"
        )


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def inside(tree: ast.Module, kind: Callable[[ast.AST], bool]) -> set[ast.AST]:
    """The nodes in the bodies of the nodes of a kind."""
    return {inner for node in ast.walk(tree) if kind(node) for part in node.body for inner in ast.walk(part)}


def modules_of(name: str) -> set[str]:
    """The package's modules that importing this name runs: the module and the packages around it."""
    words = name.split(".")
    prefixes = {".".join(words[:n]) for n in range(2, len(words) + 1)}
    return prefixes & MODULE_NAMES


MODULE_NAMES = {module_name(path) for path in PYTHON}


@pytest.fixture(scope="module")
def reach() -> dict[str, set[str]]:
    """What importing each module runs of the package, transitively."""
    graph: dict[str, set[str]] = {}
    for path in PYTHON:
        tree = ast.parse(path.read_text())
        now = set(ast.walk(tree)) - inside(tree, is_function) - inside(tree, is_typing)
        me = module_name(path)
        targets = {m for node in now for name in imported(node, path) for m in modules_of(name)}
        graph[me] = targets - modules_of(me)  # the packages around a module run before it in any case
    graph.pop("tautorch")
    grown = True
    while grown:
        grown = False
        for name, targets in graph.items():
            more = set().union(*(graph.get(t, set()) for t in targets)) - targets
            if more:
                graph[name] = targets | more
                grown = True
    return graph


@pytest.mark.parametrize("path", PYTHON, ids=module_name)
def test_no_import_in_a_function_hides_a_cycle(path: Path, reach: dict[str, set[str]]) -> None:
    """An import may be late because what it loads is heavy, not because it would import this module back."""
    me = module_name(path)
    tree = ast.parse(path.read_text())
    for node in inside(tree, is_function):
        for name in imported(node, path):
            for target in modules_of(name) - modules_of(me):
                assert me not in reach[target], f"line {node.lineno}: {target} imports {me}"


def test_package_init_only_reexports() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert all(isinstance(node, allowed) for node in body), "tautorch/__init__.py holds more than re-exports"


def test_arrows_have_no_cycle_below_the_top() -> None:
    """The table itself is a hierarchy, but for the methods, which are one layer."""
    seen: set[str] = {"_C", "_cuda"}
    left = {part: targets - METHODS - {part} for part, targets in ARROWS.items()}
    while ready := {part for part, targets in left.items() if targets <= seen}:
        seen |= ready
        left = {part: targets for part, targets in left.items() if part not in ready}
    assert not left


def benches() -> list[Path]:
    return sorted((ROOT / "benches").rglob("bench_*.py"))


def test_benches_use_the_public_api() -> None:
    for path in benches():
        for name, _ in imports(path):
            words = name.split(".")
            assert words[0] != "tests", path.name
            private = words[0] == "tautorch" and any(word.startswith("_") for word in words[1:])
            # Peak, micro-kernel and fork-join are measured at the binding.
            assert not private or words[1] == "_C", f"{path.name}: {name}"


# ---- arrows, C++ ----

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"})
FRAMEWORK = re.compile(r"^(?:torch|ATen|c10|caffe2|pybind11|Python\.h|numpy|triton)\b")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_arrows(path: Path) -> None:
    layer, *_ = path.relative_to(CSRC).parts
    reach = {
        "core": ("core/",),
        "kernels": ("core/", "kernels/"),
        "checks": ("core/", "kernels/", "checks/"),
        "capi": ("core/", "kernels/", "checks/", "capi/", "tautorch.h"),
        "bindings": ("core/", "kernels/", "checks/", "bindings/"),
    }[layer]
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        if re.match(r"(?:cutlass|cute)/", name):
            assert path.suffix in {".cu", ".cuh"}, f"only CUDA files include {name}"
        elif quote == '"':
            assert (CSRC / name).exists() or (ROOT / "include" / name).exists(), (
                f"{name}: write includes from csrc/"
            )
            assert name.startswith(reach), f"{layer} may not include {name}"
        elif layer != "bindings":
            assert not FRAMEWORK.match(name), f"{layer} knows no framework, but includes {name}"
        else:
            assert not re.match(r"(?:torch|ATen|c10|caffe2)\b", name), (
                f"building needs no torch, but includes {name}"
            )

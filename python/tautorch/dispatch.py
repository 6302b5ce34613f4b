"""The kernel table: which kernels an operator has, which of them can run a problem, and which one did.

A choice is data: rows of (op, name, device, supports). ``choose`` takes the first row that supports the
problem, best first; ``force`` (or ``TAUTORCH_FORCE=int8_linear:avx2,...``) takes the named one or fails.
An automatic choice never leaves the tensor's device.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _C

try:
    from . import _cuda as _built_cuda
except ImportError:  # a CPU build
    cuda: Any = None  #: the CUDA extension, or None
else:
    cuda = _built_cuda

OPS = (
    "int8_linear",
    "sparse_linear",
    "lowrank_linear",
    "int8_conv2d",
    "sparse_conv2d",
    "lowrank_conv2d",
)


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to do.

    ``n`` and ``k`` are the rows and columns of the weight's matrix, ``details`` what only some operators
    have (``pattern``, ``groups``, ``weight_only``, ...).
    """

    op: str
    device: str = "cpu"
    n: int = 0
    k: int = 0
    details: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """A row of the table. ``supports`` returns None, or in one sentence why not."""

    op: str
    name: str
    device: str
    supports: Callable[[Problem], str | None]


_table: list[Kernel] = []
_forced: dict[str, str] = {}
# Changes whenever a choice made earlier may no longer hold; modules compare it at every call.
epoch = 0


def register(kernel: Kernel) -> None:
    """Add a row. Rows registered earlier are preferred."""
    _table.append(kernel)


def kernels(op: str | None = None) -> list[Kernel]:
    """The rows of ``op``, or of all operators, best first."""
    if op is not None and op not in OPS:
        raise ValueError(f"kernels: op must be one of {', '.join(OPS)}, got {op!r}")
    return [k for k in _table if op is None or k.op == op]


def refusals(problem: Problem) -> dict[str, str | None]:
    """For each kernel of the problem's operator and device: None, or the reason it cannot run it."""
    return {k.name: k.supports(problem) for k in kernels(problem.op) if k.device == problem.device}


def choose(problem: Problem) -> str:
    """Name of the kernel to run.

    Raises:
        ValueError: the forced kernel cannot run the problem, or none can; with every reason.
    """
    rows = [k for k in kernels(problem.op) if k.device == problem.device]
    forced = _forced.get(problem.op)
    if forced is not None:
        for row in rows:
            if row.name == forced:
                reason = row.supports(problem)
                if reason is None:
                    return forced
                raise ValueError(f"{problem.op}: kernel {forced!r} is forced, but {reason}")
        raise ValueError(
            f"{problem.op}: kernel {forced!r} is forced, but there is none of that name for "
            f"{problem.device}; there are {', '.join(r.name for r in rows) or 'none'}"
        )
    reasons = []
    for row in rows:
        if row.name == "reference":  # never chosen silently
            continue
        reason = row.supports(problem)
        if reason is None:
            return row.name
        reasons.append(f"{row.name}: {reason}")
    raise ValueError(
        f"{problem.op}: no kernel for {problem.device}: {'; '.join(reasons) or 'none is built for it'}"
    )


class _Force(contextlib.AbstractContextManager[None]):
    def __init__(self, op: str, previous: str | None) -> None:
        self._op, self._previous = op, previous

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        _set_forced(self._op, self._previous)


def ask_again() -> None:
    """Have every module ask for its kernel anew."""
    global epoch
    epoch += 1


def _set_forced(op: str, name: str | None) -> None:
    if name is None:
        _forced.pop(op, None)
    else:
        _forced[op] = name
    ask_again()


def force(op: str, name: str | None) -> contextlib.AbstractContextManager[None]:
    """Run ``op`` by kernel ``name`` from now on; None lifts it. As a context manager: for its duration.

    Raises:
        ValueError: there is no such operator or kernel. That the kernel cannot run on this machine or on a
            given problem is said when it is asked to.
    """
    names = [k.name for k in kernels(op)]
    if name is not None and name not in names:
        raise ValueError(f"force: {op} has kernels {', '.join(names)}; got {name!r}")
    previous = _forced.get(op)
    _set_forced(op, name)
    return _Force(op, previous)


def forced(op: str) -> str | None:
    """The kernel ``op`` is forced to, or None."""
    return _forced.get(op)


_last_python: dict[str, tuple[str, int]] = {}


def note_used(op: str, name: str) -> None:
    """Record that a kernel outside the CPU extension ran."""
    _last_python[op] = (name, 0)


def last_used(op: str) -> str | None:
    """Name of the kernel that ran ``op`` last in this process, or None."""
    if op not in OPS:
        raise ValueError(f"last_used: op must be one of {', '.join(OPS)}, got {op!r}")
    if op in _last_python:
        return _last_python[op][0]
    return _C.last_used(op)


def clear_last_python(op: str) -> None:
    """The CPU extension is about to run ``op``: what it records counts again."""
    _last_python.pop(op, None)


# ---- CPU rows -------------------------------------------------------------------------------------------

# Kernels with the forms of AVX-512; "amx" has its own dense int8 products and is "avx512vnni" in all else.
AVX512 = ("amx", "avx512vnni")

_CPU_NEEDS = {
    "amx": "AMX-INT8 that the operating system lets this process use",
    "avx512vnni": "AVX-512 with VNNI",
    "avxvnni": "AVX-VNNI",
    "avx2": "AVX2, FMA and F16C",
    "neon_i8mm": "int8 matrix products (FEAT_I8MM)",
    "neon_dotprod": "dot products (FEAT_DotProd)",
}


def _cpu_row(op: str, name: str, available: bool) -> Kernel:
    def supports(problem: Problem) -> str | None:
        if not available:
            return f"this CPU has no {_CPU_NEEDS.get(name, name)}"
        return None

    return Kernel(op, name, "cpu", supports)


for _op in OPS:
    for _name, _available in _C.isas().items():
        register(_cpu_row(_op, _name, _available))
    register(Kernel(_op, "reference", "cpu", lambda problem: None))
    register(Kernel(_op, "reference", "cuda", lambda problem: None if _gpu(problem) else _NO_GPU))


# ---- GPU rows -------------------------------------------------------------------------------------------

_NO_GPU = "no CUDA device is visible"
MIN_DRIVER = 13000  # CUDA 13, driver 580: what the wheel's CUDA runtime is made for


def _gpu(problem: Problem) -> tuple[int, int] | None:
    """Compute capability (90 for 9.0) and multiprocessors of the problem's device, or the current one."""
    capability, count = problem.details.get("capability"), problem.details.get("multiprocessors")
    if isinstance(capability, int) and isinstance(count, int):
        return capability, count
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return p.major * 10 + p.minor, p.multi_processor_count


def _text(reason: object) -> str | None:
    return None if reason is None else str(reason)


_F32, _BF16, _INT8 = 0, 1, 3  # DType in csrc/kernels/common/dtype.h; bf16 is asked about where x is not known


def _extension(problem: Problem) -> tuple[int, int] | str:
    """Capability and multiprocessors for the CUDA extension's kernels, or why none of them can run here."""
    gpu = _gpu(problem)
    if gpu is None:
        return _NO_GPU
    if cuda is None:
        return "this build has no CUDA kernels; reinstall with TAUTORCH_CUDA=on and nvcc on PATH"
    driver = cuda.driver_version()
    if driver == 0:
        return "no CUDA driver is installed"
    if driver < MIN_DRIVER:
        version = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"it needs a driver for CUDA 13 (580 or newer), this one is for {version}"
    return gpu


def _number(problem: Problem, name: str, otherwise: int = 1) -> int:
    value = problem.details.get(name, otherwise)
    return value if isinstance(value, int) else otherwise


def _int8_linear_row(name: str) -> Kernel:
    def supports(problem: Problem) -> str | None:
        gpu = _extension(problem)
        if isinstance(gpu, str):
            return gpu
        weight_only = bool(problem.details.get("weight_only"))
        x_dtype = _number(problem, "x_dtype", _BF16)
        asked = (_number(problem, "rows"), problem.n, problem.k, weight_only, x_dtype)
        if name != "cuda":
            return _text(cuda.int8_linear_supports(name, gpu[0], *asked))
        if cuda.int8_linear_choose(*gpu, *asked) is not None:
            return None
        # Of the kernels for such a layer the last serves the most devices, so its reason says the most.
        last = [k for k in cuda.int8_linear_kernels() if weight_only == k.startswith("weight_only")][-1]
        reason = _text(cuda.int8_linear_supports(last, gpu[0], *asked))
        return (
            reason or "it reads the weights once for up to 32 float rows; above, Triton's product is for it"
        )

    return Kernel("int8_linear", name, "cuda", supports)


def _sparse_linear_row(name: str) -> Kernel:
    def supports(problem: Problem) -> str | None:
        gpu = _extension(problem)
        if isinstance(gpu, str):
            return gpu
        details = problem.details
        bitmap = details.get("pattern") in ("unstructured", "4x1")
        if name != "cuda" and bitmap != name.startswith("bitmap"):
            return f"it is for pattern {'unstructured or 4x1' if name.startswith('bitmap') else '2:4'}"
        if bitmap:
            return _bitmap_supports(name, problem, gpu[0])
        if details.get("pattern") != "2:4":
            return "it is for patterns 2:4, unstructured and 4x1"
        if details.get("weight_only"):
            return "its 2:4 products are of int8 with int8 and of float values with floats"
        floats = details.get("weight_dtype") != "int8"
        x_dtype = _number(problem, "x_dtype", _BF16) if floats else _INT8
        if x_dtype == _F32:
            return "its 2:4 float products are of bfloat16 and float16 x; convert x, or use int8 values"
        asked = (_number(problem, "rows"), problem.n, problem.k, x_dtype)
        if name == "cuda":
            if cuda.sparse_linear_choose(*gpu, *asked) is not None:
                return None
            # Of the kernels for such values the last serves the most devices.
            names = [k for k in cuda.sparse_linear_kernels() if not k.startswith("bitmap")]
            name_asked = [k for k in names if floats == ("float" in k)][-1]
        else:
            name_asked = name
        return _text(cuda.sparse_linear_supports(name_asked, gpu[0], *asked))

    return Kernel("sparse_linear", name, "cuda", supports)


def _bitmap_supports(name: str, problem: Problem, capability: int) -> str | None:
    if problem.details.get("weight_only") or problem.details.get("weight_dtype") != "int8":
        return "its products of single weights are of int8 with int8"
    rows = _number(problem, "rows")
    kernel = cuda.sparse_linear_bitmap(rows) if name == "cuda" else name
    return _text(cuda.sparse_linear_supports(kernel, capability, rows, problem.n, problem.k, _INT8))


def _int8_conv2d_row(name: str) -> Kernel:
    def supports(problem: Problem) -> str | None:
        gpu = _extension(problem)
        if isinstance(gpu, str):
            return gpu
        if problem.details.get("weight_only"):
            return "it quantises its input, which a weight-only layer must not"
        taps = max(_number(problem, "taps"), 1)
        shape = (_number(problem, "groups"), problem.k // taps, problem.n, taps)
        return _text(cuda.int8_conv2d_supports(gpu[0], *shape))

    return Kernel("int8_conv2d", name, "cuda", supports)


def _sparse_conv2d_row(name: str) -> Kernel:
    def supports(problem: Problem) -> str | None:
        gpu = _extension(problem)
        if isinstance(gpu, str):
            return gpu
        details = problem.details
        pattern = details.get("pattern")
        if pattern is None:
            return "it is for pattern 2:4 of 1x1 layers"
        if pattern != "2:4":
            return f"{pattern} convolutions have no GPU kernel; prune 1x1 layers to 2:4"
        if not details.get("int8") or details.get("weight_only"):
            return "its 2:4 products are of int8 with int8"
        taps = max(_number(problem, "taps"), 1)
        shape = (_number(problem, "groups"), problem.k // taps, problem.n, taps)
        return _text(cuda.sparse_conv2d_supports(gpu[0], *shape))

    return Kernel("sparse_conv2d", name, "cuda", supports)


def _triton_supports(problem: Problem) -> str | None:
    gpu = _gpu(problem)
    if gpu is None:
        return _NO_GPU
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if gpu[0] < 80:
        return f"it needs compute capability 8.0, this device has {gpu[0] // 10}.{gpu[0] % 10}"
    d = problem.details
    float_values = d.get("weight_dtype") == "float32" or d.get("int8") is False
    floating = d.get("weight_only") or (float_values and "residual" not in d)
    if gpu[0] == 103 and not floating:
        return "compute capability 10.3 has almost no int8 throughput; keep the layer in bf16"
    return None


def _triton_row(op: str, refuse: Callable[[Problem], str | None]) -> Kernel:
    return Kernel(op, "triton", "cuda", lambda problem: _triton_supports(problem) or refuse(problem))


def _refuse_lowrank(problem: Problem) -> str | None:
    residual = problem.details.get("residual")
    if residual not in (None, "int8"):
        return f"a {residual} residual has no GPU kernel; use residual='int8' or none"
    return _refuse_rows(problem)


def _refuse_sparse(problem: Problem) -> str | None:
    pattern = problem.details.get("pattern")
    if pattern in ("16x16", "32x32", "64x64"):
        return _refuse_rows(problem)
    if pattern == "2:4":
        return "Triton has no instruction for 2:4"
    if pattern is None:
        return "it is for patterns 16x16, 32x32 and 64x64"
    return f"{pattern} weights are not for Triton; prune in blocks of 16x16, 32x32 or 64x64"


def _refuse_conv(problem: Problem) -> str | None:
    if problem.details.get("weight_only"):
        return "it quantises its input, which a weight-only layer must not"
    if problem.details.get("groups", 1) != 1:
        return "groups have no GPU kernel yet; keep the float layer"
    return _refuse_rows(problem)


def _refuse_lowrank_conv(problem: Problem) -> str | None:
    if problem.details.get("groups", 1) != 1:
        return "groups have no GPU kernel yet; keep the factors as two layers"
    return _refuse_rows(problem)


# MAX_ROWS of triton_kernels, which import Triton.
MAX_TRITON_ROWS = 2**31 - 256


def _refuse_rows(problem: Problem) -> str | None:
    rows = _number(problem, "rows")
    if rows > MAX_TRITON_ROWS:
        return f"it counts at most {MAX_TRITON_ROWS} rows, these are {rows}; split the batch"
    return None


# "cuda" picks a kernel by shape; forcing picks one of those that follow. Nothing else in the table does.
register(_int8_linear_row("cuda"))
register(_sparse_linear_row("cuda"))
register(_int8_conv2d_row("cuda"))
register(_sparse_conv2d_row("cuda"))
register(_triton_row("int8_linear", _refuse_rows))
register(_triton_row("lowrank_linear", _refuse_lowrank))
register(_triton_row("sparse_linear", _refuse_sparse))
register(_triton_row("int8_conv2d", _refuse_conv))
register(_triton_row("lowrank_conv2d", _refuse_lowrank_conv))
if cuda is not None:
    for _row, _names in (
        (_int8_linear_row, cuda.int8_linear_kernels()),
        (_sparse_linear_row, cuda.sparse_linear_kernels()),
        (_int8_conv2d_row, cuda.int8_conv2d_kernels()),
        (_sparse_conv2d_row, cuda.sparse_conv2d_kernels()),
    ):
        for _name in _names:
            register(_row(_name))


def _force_from_environment() -> None:
    for item in filter(None, os.environ.get("TAUTORCH_FORCE", "").split(",")):
        op, _, name = item.partition(":")
        try:
            force(op.strip(), name.strip())
        except ValueError as error:
            raise ValueError(
                f"TAUTORCH_FORCE must be like int8_linear:scalar, with commas between several, got {item!r}: "
                f"{error}"
            ) from None


_force_from_environment()


# ---- threads --------------------------------------------------------------------------------------------


def _use_torch_threads() -> bool:
    """Hand torch's own pool to the kernels; False where this torch does not offer it (before 2.10)."""
    folder = pathlib.Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            lib = ctypes.CDLL(str(folder / name))
            try:
                symbols = [lib.torch_parallel_for, lib.torch_get_num_threads]
            except AttributeError:
                return False
            run, count = (ctypes.cast(s, ctypes.c_void_p).value or 0 for s in symbols)
            _C.set_thread_pool(run, count)
            return True
    return False


threaded = _use_torch_threads()

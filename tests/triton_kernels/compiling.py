"""Compiling a Triton kernel for a GPU that is not there, and running a file of tests in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Bytes of shared memory one block may have, by compute capability (CUDA C++ Programming Guide).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int8": "*i8", "int32": "*i32"}
CAPABILITIES = sorted(SHARED_LIMIT)


def run_in_the_interpreter(name: str, at_least: int) -> None:
    """Run a file of this folder with TRITON_INTERPRET=1, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    done = subprocess.run(
        command,
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed.group(1)) >= at_least, done.stdout[-2000:]


def compile_kernel(
    kernel: Any, capability: int, types: dict[str, str], values: dict[str, Any], **options: Any
) -> Any:
    """Compile with pointers and strides multiples of 16; what is in ``values`` is a compile-time constant."""
    signature = {name: "constexpr" if name in values else types[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in values]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in values.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})


def check_resources(compiled: Any, capability: int, tmp_path: Path) -> None:
    """Shared memory within the device's limit and no register spilled to local memory."""
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = (int(v) for v in found.groups())
    assert registers <= 255 and stack == 0 and local == 0, usage

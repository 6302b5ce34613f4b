"""sparse_linear's Triton kernel without a GPU: right in the interpreter, compiled for sm_80, 89 and 90."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
torch = pytest.importorskip("torch")

from tests.triton_kernels.compiling import (  # noqa: E402
    CAPABILITIES,
    POINTER,
    check_resources,
    compile_kernel,
    run_in_the_interpreter,
)

from tautorch.triton_kernels import sparse_linear as tk  # noqa: E402
from tautorch.triton_kernels._device import ACTIVATIONS  # noqa: E402


def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_sparse_linear.py", 50)


def compile_tile(
    capability: int,
    x: str,
    values: str,
    block: int,
    config: tk.Config,
    out: str = "bfloat16",
    activation: str = "gelu",
) -> Any:
    kernel = tk._block_sparse
    int8 = x == "int8"
    constants: dict[str, Any] = {
        "INT8": int8,
        "SCALE_PER_ROW": int8,
        "HAS_W_SCALE": values == "int8",
        "HAS_BIAS": True,
        "HAS_ZERO_POINT": int8,
        "HAS_OUT_ZERO_POINT": out == "int8",
        "ACTIVATION": ACTIVATIONS[activation],
        "RAW": out == "int32",
        "REQUANTIZE": out == "int8",
        "B": block,
        "CHUNK": config.chunk,
        "BLOCK_M": config.block_m,
        "GROUP_M": config.group_m,
    }
    constants |= {} if out == "int8" else {"out_scale_ptr": None, "out_zero_point_ptr": None}
    constants |= {} if int8 else {"x_scale_ptr": None, "zero_point_ptr": None, "sums_ptr": None}
    constants |= {} if values == "int8" else {"w_scale_ptr": None}
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "i32" for name in kernel.arg_names if name in "MNK" or name.startswith("stride_")}
    types |= {"x_ptr": POINTER[x], "values_ptr": POINTER[values], "y_ptr": POINTER[out]}
    types |= {"crow_ptr": "*i32", "col_ptr": "*i16", "zero_point_ptr": "*i32", "sums_ptr": "*i32"}
    types["out_zero_point_ptr"] = "*i32"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_kernel(kernel, capability, types, constants, **options)


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("block", tk.BLOCKS)
@pytest.mark.parametrize(
    "x,values",
    [("int8", "int8"), ("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float32", "float32")],
)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_compiles(
    capability: int, x: str, values: str, block: int, rows: int, tmp_path: Path
) -> None:
    config = tk.choose(rows, block, getattr(torch, x).itemsize)
    compiled = compile_tile(capability, x, values, block, config)
    check_resources(compiled, capability, tmp_path)
    ptx = compiled.asm["ptx"]
    kind = {"int8": r"s32\.s8\.s8", "bfloat16": r"f32\.bf16\.bf16"}.get(x)
    if kind is None:
        assert "mma" not in ptx, "fp32 must not be rounded to tf32"
        return
    assert re.search(r"mma\S*" + kind, ptx)
    # Rows of a block are adjacent: 16 bytes at a time, straight to shared memory.
    assert re.search(r"cp\.async\.c[ga]\.shared\.global \[[^,]*, \[[^,]*, (0x10|16)", ptx), "loads are narrow"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "out,activation", [("int32", "none"), ("float32", "relu"), ("float16", "silu"), ("int8", "gelu_tanh")]
)
def test_every_epilogue_compiles(capability: int, out: str, activation: str, tmp_path: Path) -> None:
    compiled = compile_tile(capability, "int8", "int8", 32, tk.choose(4096, 32, 1), out, activation)
    check_resources(compiled, capability, tmp_path)

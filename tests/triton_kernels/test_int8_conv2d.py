"""int8_conv2d's Triton kernel without a GPU: right in the interpreter, compiled for sm_80, 89 and 90."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from tests.triton_kernels.compiling import (
    CAPABILITIES,
    POINTER,
    check_resources,
    compile_kernel,
    run_in_the_interpreter,
)

from tautorch.triton_kernels import int8_conv2d as tk
from tautorch.triton_kernels._device import ACTIVATIONS


def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_int8_conv2d.py", 35)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("m,n,c", [(49, 64, 3), (6272, 256, 256), (401408, 64, 64), (100352, 512, 128)])
@pytest.mark.parametrize("out,activation", [("int8", "relu"), ("bfloat16", "gelu"), ("int32", "none")])
def test_every_tile_compiles(
    capability: int, m: int, n: int, c: int, out: str, activation: str, tmp_path: Path
) -> None:
    kernel, tile, full = tk._int8_conv2d, tk.choose(m, n, c), out != "int32"
    values: dict[str, Any] = {
        **dict.fromkeys(("STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W", "PAD_H", "PAD_W"), 1),
        **dict.fromkeys(("KERNEL_H", "KERNEL_W"), 3),
        "SCALE_PER_SAMPLE": True,
        "HAS_BIAS": full,
        "HAS_ZERO_POINT": full,
        "HAS_OUT_ZERO_POINT": out == "int8",
        "ACTIVATION": ACTIVATIONS[activation],
        "RAW": out == "int32",
        "REQUANTIZE": out == "int8",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    values |= {} if full else {"bias_ptr": None, "zero_point_ptr": None, "sums_ptr": None}
    values |= {} if out == "int8" else {"out_scale_ptr": None, "out_zero_point_ptr": None}
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "*i32" for name in kernel.arg_names if name.endswith(("zero_point_ptr", "sums_ptr"))}
    types |= dict.fromkeys(("M", "N", "C", "H", "W", "OH", "OW"), "i32")
    types |= {"x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": POINTER[out]}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = compile_kernel(kernel, capability, types, values, **options)
    check_resources(compiled, capability, tmp_path)
    assert re.search(r"mma\S*s32\.s8\.s8", compiled.asm["ptx"])

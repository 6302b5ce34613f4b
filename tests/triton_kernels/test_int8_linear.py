"""int8_linear's Triton kernels without a GPU: right in the interpreter, and compiled for sm_80, 89 and 90."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
torch = pytest.importorskip("torch")

from tests.triton_kernels.compiling import (  # noqa: E402
    CAPABILITIES,
    POINTER,
    check_resources,
    compile_kernel,
    run_in_the_interpreter,
)

from tautorch.triton_kernels import _int8_linear_tiles as tiles  # noqa: E402
from tautorch.triton_kernels import _int8_linear_weight_only as weight_only  # noqa: E402
from tautorch.triton_kernels import int8_linear as tk  # noqa: E402
from tautorch.triton_kernels._device import ACTIVATIONS  # noqa: E402
from tautorch.triton_kernels._quantize_rows import _quantize_rows  # noqa: E402


def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_int8_linear.py", 100)


def test_importing_tautorch_does_not_import_triton() -> None:
    names = {"triton", "tautorch.triton_kernels.int8_linear"}
    code = f"import sys, torch, tautorch; assert not {names} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def types_of(kernel: Any, **pointers: str) -> dict[str, str]:
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "*i32" for name in kernel.arg_names if name.endswith(("zero_point_ptr", "sums_ptr"))}
    types |= {name: "i32" for name in kernel.arg_names if name in "MNK" or name.startswith("stride_")}
    return types | {f"{name}_ptr": POINTER[dtype] for name, dtype in pointers.items()}


def tile(config: tiles.Config) -> dict[str, int]:
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return sizes | {"GROUP_M": config.group_m}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "dtype,static", list(itertools.product(["float32", "bfloat16", "float16"], [False, True]))
)
def test_quantiser_compiles(capability: int, dtype: str, static: bool, tmp_path: Path) -> None:
    kernel = _quantize_rows
    values: dict[str, Any] = {"STATIC": static, "HAS_ZERO_POINT": static, "BLOCK_K": 4096, "stride_xk": 1}
    if not static:
        values |= {"static_scale_ptr": None, "zero_point_ptr": None}
    types = types_of(kernel, x=dtype, q="int8", scale="float32")
    compiled = compile_kernel(kernel, capability, types, values, num_warps=8)
    check_resources(compiled, capability, tmp_path)
    ptx = compiled.asm["ptx"]
    assert "div.rn.f32" in ptx, "the contract asks for IEEE division"
    assert not re.search(r"\bfma\.|div\.full|div\.approx|\.ftz", ptx), (
        "no contraction, no approximate division"
    )


# (out dtype, activation, zero points and bias, requantised): every branch of the epilogue at least once.
VARIANTS = [
    ("int32", "none", False),
    ("int32", "none", True),
    ("float32", "none", False),
    ("bfloat16", "relu", True),
    ("float16", "gelu", True),
    ("bfloat16", "gelu_tanh", False),
    ("bfloat16", "silu", True),
    ("int8", "gelu", True),
    ("int8", "none", False),
]
SHAPES = [
    (1, 4096, 4096),
    (17, 64, 64),
    (64, 4096, 4096),
    (128, 4096, 4096),
    (512, 64, 64),
    (4096, 4096, 4096),
]


def choices() -> list[Any]:
    """Every tile that ``choose`` can give, with the capability it is given for."""
    found = {(c, tiles.choose(m, n, k, (c // 10, c % 10))) for c in CAPABILITIES for m, n, k in SHAPES}
    return sorted(found, key=str)


def epilogue(out: str, activation: str, full: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "HAS_BIAS": full,
        "HAS_OUT_ZERO_POINT": full and out == "int8",
        "ACTIVATION": ACTIVATIONS[activation],
        "REQUANTIZE": out == "int8",
    }
    values |= {} if full else {"bias_ptr": None}
    values |= {} if values["HAS_OUT_ZERO_POINT"] else {"out_zero_point_ptr": None}
    return values | ({} if out == "int8" else {"out_scale_ptr": None})


@pytest.mark.parametrize("capability,config", choices(), ids=str)
def test_every_tile_compiles(capability: int, config: tiles.Config, tmp_path: Path) -> None:
    check_int8_variant(capability, config, ("bfloat16", "silu", True), tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_epilogue_compiles(capability: int, variant: tuple[str, str, bool], tmp_path: Path) -> None:
    check_int8_variant(capability, tiles.choose(64, 4096, 4096), variant, tmp_path)


def check_int8_variant(
    capability: int, config: tiles.Config, variant: tuple[str, str, bool], tmp_path: Path
) -> None:
    out, activation, full = variant
    kernel = tk._int8_linear
    values = epilogue(out, activation, full) | tile(config)
    values |= {"SCALE_PER_ROW": full, "HAS_ZERO_POINT": full, "RAW": out == "int32"}
    if not full:
        values |= {"zero_point_ptr": None, "column_sums_ptr": None}
    types = types_of(kernel, x="int8", w="int8", y=out)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_kernel(kernel, capability, types, values, **options)
    check_resources(compiled, capability, tmp_path)
    ptx = compiled.asm["ptx"]
    # wgmma needs 64 rows; a smaller tile uses mma.sync on sm_90 too.
    wide = capability >= 90 and config.block_m >= 64
    pattern = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if wide else r"mma\.sync\S*\.s32\.s8\.s8\.s32"
    assert re.search(pattern, ptx), f"no int8 tensor-core instruction for sm_{capability}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype,m", list(itertools.product(["float32", "bfloat16", "float16"], [1, 64])))
def test_weight_only_compiles(capability: int, dtype: str, m: int, tmp_path: Path) -> None:
    kernel = weight_only._weight_only_linear
    config = tiles.choose_weight_only(m, getattr(torch, dtype).itemsize)
    values = epilogue(dtype, "gelu", True) | tile(config)
    types = types_of(kernel, x=dtype, w="int8", y=dtype)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_kernel(kernel, capability, types, values, **options)
    check_resources(compiled, capability, tmp_path)
    has_tensor_core = re.search(r"mma\.(sync|async)|mma_async", compiled.asm["ptx"]) is not None
    assert has_tensor_core == (dtype != "float32"), "fp32 activations must not be rounded to tf32"


def test_more_rows_than_32_bits_count_are_refused() -> None:
    from tautorch.dispatch import MAX_TRITON_ROWS

    assert tiles.MAX_ROWS == MAX_TRITON_ROWS == 2**31 - 256
    one = torch.ones(1)
    q = torch.zeros(1, 16, dtype=torch.int8).expand(tiles.MAX_ROWS + 1, 16)
    with pytest.raises(ValueError, match="at most 2147483392 rows"):
        tk.matmul(q, one, q[:1], one)
    with pytest.raises(ValueError, match="at most 2147483392 rows"):
        weight_only.weight_only_matmul(torch.zeros(1, 16).expand(q.shape), q[:1], one)


def test_rows_are_no_part_of_what_is_compiled() -> None:
    """Another batch of the same tile must not compile anew."""
    from tautorch.triton_kernels import _lowrank_linear_kernels as lowrank
    from tautorch.triton_kernels import int8_conv2d, lowrank_conv2d, sparse_linear

    kernels = [tk._int8_linear, weight_only._weight_only_linear, int8_conv2d._int8_conv2d]
    kernels += [sparse_linear._block_sparse, lowrank._down, lowrank._up, lowrank._fused]
    kernels += [lowrank_conv2d._down, lowrank_conv2d._fused]
    for kernel in kernels:
        (rows,) = [p for p in kernel.params if p.name == "M"]
        assert rows.do_not_specialize, kernel.fn.__name__

"""lowrank_conv2d's Triton kernels without a GPU: right in the interpreter, compiled for sm_80, 89 and 90."""

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

from tautorch.triton_kernels import lowrank_conv2d as tk  # noqa: E402
from tautorch.triton_kernels._device import ACTIVATIONS  # noqa: E402
from tautorch.triton_kernels._lowrank_tiles import Stage, fits_one_tile, one_launch, tile_rank  # noqa: E402
from tautorch.triton_kernels._windows import Windows  # noqa: E402

SIZE = {"int8": 1, "bfloat16": 2, "float32": 4}
# (B, C, side, O, r), 3x3: a first layer; a single image; small and large factors; r beyond 128
SHAPES = [(8, 3, 224, 64, 16), (1, 256, 14, 256, 64), (32, 64, 56, 64, 16), (32, 512, 7, 512, 128)]
SHAPES += [(32, 256, 14, 256, 200)]


def windows(b: int, c: int, side: int) -> Windows:
    return Windows(b, c, side, side, side, side, (3, 3), (1, 1), (1, 1), (1, 1))


def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_lowrank_conv2d.py", 150)


def compile_stage(capability: int, operands: str, kernel: str, stage: Stage, rank: int, out: str) -> Any:
    function = getattr(tk, kernel)
    int8 = operands == "int8"
    values: dict[str, Any] = windows(1, 64, 14).options()
    values |= {"INT8": int8, "SCALE_PER_ROW": int8, "HAS_ZERO_POINT": int8, "SPLITS": stage.splits}
    values |= {"BLOCK_M": stage.block_m, "BLOCK_K": stage.block_k, "BLOCK_R": rank}
    if not int8:
        values |= dict.fromkeys(("zero_point_ptr", "down_sums_ptr", "x_scale_ptr", "down_scale_ptr"))
    if kernel == "_fused":
        requantised = out == "int8"
        values |= {"BLOCK_N": stage.block_n, "HAS_BIAS": True, "HAS_OUT_ZERO_POINT": requantised}
        values |= {"ACTIVATION": ACTIVATIONS["silu"], "RAW": out == "int32", "REQUANTIZE": requantised}
        values |= {} if requantised else dict.fromkeys(("out_scale_ptr", "out_zero_point_ptr"))
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in function.arg_names}
    types |= {name: "*i32" for name in types if name.endswith(("zero_point_ptr", "sums_ptr", "counter_ptr"))}
    types |= {name: POINTER[operands] for name in ("x_ptr", "down_ptr", "up_ptr", "h_ptr") if name in types}
    types |= {"y_ptr": POINTER[out], "partial_ptr": "*i32" if int8 else "*fp32"}
    values = {name: value for name, value in values.items() if name in function.arg_names}
    options = {"num_warps": stage.num_warps, "num_stages": stage.num_stages}
    return compile_kernel(function, capability, types, values, **options)


def stages(operands: str) -> list[tuple[str, Stage, int]]:
    """(kernel, tile, columns of the tile that holds r) of every choice for ``SHAPES``, each once."""
    found, size = set(), SIZE[operands]
    for b, c, side, n, r in SHAPES:
        w = windows(b, c, side)
        chosen = tk.choose(w, n, r, size)
        if chosen.down is not None:
            found.add(("_down", chosen.down, chosen.down.block_n))
        if fits_one_tile(r, size):
            one = tk.for_channels(one_launch(w.rows, n, 9 * c, r, size), c, size)
            found.add(("_fused", one.up, tile_rank(r, size)))
    return sorted(found, key=str)


@pytest.mark.parametrize("operands", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_compiles(capability: int, operands: str, tmp_path: Path) -> None:
    for kernel, stage, rank in stages(operands):
        compiled = compile_stage(capability, operands, kernel, stage, rank, "bfloat16")
        check_resources(compiled, capability, tmp_path)
        ptx = compiled.asm["ptx"]
        if operands == "float32":
            assert not re.search(r"mma", ptx), "fp32 must not be rounded to tf32"
            continue
        kind = r"s32\.s8\.s8" if operands == "int8" else r"f32\.bf16\.bf16"
        wide = capability >= 90 and stage.block_m >= 64
        assert re.search((r"wgmma\.mma_async\S*" if wide else r"mma\.sync\S*") + kind, ptx), kernel


@pytest.mark.parametrize("out", ["int32", "int8", "float32"])
def test_every_output_compiles(out: str, tmp_path: Path) -> None:
    for capability in (80, 90):
        compiled = compile_stage(capability, "int8", "_fused", Stage(64, 64, 64, 4, 3), 64, out)
        check_resources(compiled, capability, tmp_path)


@pytest.mark.parametrize("kernel", ["_fused", "_down"])
def test_the_quantiser_is_ieee(kernel: str) -> None:
    ptx = compile_stage(90, "int8", kernel, Stage(64, 64, 64, 4, 3, 2), 64, "int32").asm["ptx"]
    assert "div.rn.f32" in ptx
    assert not re.search(r"\bfma\.|div\.full|div\.approx|\.ftz", ptx)


def test_images_are_copied_16_bytes_at_a_time_in_a_pipeline() -> None:
    """Channels a multiple of 16: the tap's address must not hide that they are adjacent."""
    stage = tk.choose(windows(32, 64, 56), 64, 16, 1).up
    ptx = compile_stage(80, "int8", "_fused", stage, 32, "bfloat16").asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10", ptx)


@pytest.mark.parametrize("c", [1, 3, 16, 40, 512])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_steps_keep_to_the_channels(c: int, size: int) -> None:
    """No longer than they fill, no shorter than a matrix instruction takes."""
    for b in (1, 64):
        w = windows(b, c, 14)
        for config in (tk.choose(w, 64, 16, size), *tk.candidates(w, 64, 16, size, 132)):
            for stage in filter(None, (config.down, config.up)):
                assert (32 if size == 1 else 16) <= stage.block_k <= tile_rank(c, size)

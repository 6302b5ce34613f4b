"""lowrank_linear's Triton kernels without a GPU: right in the interpreter, compiled for sm_80, 89 and 90."""

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

from tautorch.triton_kernels import _lowrank_linear_kernels as kernels  # noqa: E402
from tautorch.triton_kernels import _lowrank_tiles as tiles  # noqa: E402
from tautorch.triton_kernels._device import ACTIVATIONS  # noqa: E402
from tautorch.triton_kernels._lowrank_launch import grid  # noqa: E402

SIZE = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
# (M, N, K, r): few and many rows, ranks from one step to beyond a tile, small and large factors.
SHAPES = [
    (1, 4096, 4096, 128),
    (64, 4096, 4096, 128),
    (512, 4096, 4096, 128),
    (20000, 4096, 4096, 128),
    (4096, 4096, 4096, 256),
    (4096, 4096, 4096, 1000),
    (4096, 1024, 1024, 32),
    (16, 128, 128, 256),
    (4096, 256, 256, 256),
]


def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("interpreted_lowrank_linear.py", 150)


def types_of(kernel: Any, operands: str, y: str) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in "MNRK" or name.startswith("stride_"):
            types[name] = "i32"
        elif name in ("x_ptr", "down_ptr", "up_ptr", "h_ptr"):
            types[name] = POINTER[operands]
        elif name in ("q_ptr", "residual_ptr"):
            types[name] = "*i8"
        elif name.endswith(("zero_point_ptr", "sums_ptr", "counter_ptr")):
            types[name] = "*i32"
        elif name == "partial_ptr":
            types[name] = "*i32" if operands == "int8" else "*fp32"
        else:
            types[name] = POINTER[y] if name == "y_ptr" else "*fp32"
    return types


def stages(capability: int, operands: str, residual: bool) -> list[tuple[str, tiles.Stage, int]]:
    """(kernel, tile, columns of the tile that holds r) of every choice, each once."""
    found = set()
    size = SIZE[operands]
    for m, n, k, r in SHAPES:
        chosen = tiles.choose(m, n, k, r, size, residual)
        if chosen.down is None:
            found.add(("_fused", chosen.up, tiles.tile_rank(r, size)))
            chosen = tiles.two_launches(m, n, k, r, size, residual)
        assert chosen.down is not None
        if size > 1 or r <= chosen.down.block_n:
            found.add(("_down", chosen.down, chosen.down.block_n))
        found.add(("_up", chosen.up, min(tiles.tile_rank(r, size), 128 // size)))
    return sorted(found, key=str)


def compile_stage(
    capability: int,
    operands: str,
    kernel: str,
    stage: tiles.Stage,
    rank: int,
    *,
    out: str = "bfloat16",
    activation: str = "gelu",
    full: bool = True,
    residual: bool = False,
) -> Any:
    function = getattr(kernels, kernel)
    int8 = operands == "int8"
    zero_point = full and (int8 or residual)
    values: dict[str, Any] = {
        "INT8": int8,
        "SCALE_PER_ROW": not full,
        "HAS_ZERO_POINT": zero_point,
        "BLOCK_M": stage.block_m,
        "BLOCK_K": stage.block_k,
        "BLOCK_R": rank,
    }
    if not zero_point:
        values |= {"zero_point_ptr": None, "down_sums_ptr": None, "residual_sums_ptr": None}
    if kernel != "_up":
        values["SPLITS"] = stage.splits
    if kernel != "_down":
        values |= {
            "BLOCK_N": stage.block_n,
            "HAS_BIAS": full,
            "HAS_OUT_ZERO_POINT": full and out == "int8",
            "ACTIVATION": ACTIVATIONS[activation],
            "RAW": out == "int32",
            "REQUANTIZE": out == "int8",
        }
        values |= {} if full else {"bias_ptr": None}
        values |= {} if out == "int8" else {"out_scale_ptr": None}
        values |= {} if full and out == "int8" else {"out_zero_point_ptr": None}
    if kernel == "_up":
        values |= {"RESIDUAL": residual, "GROUP_M": stage.group_m}
    values = {name: value for name, value in values.items() if name in function.arg_names}
    options = {"num_warps": stage.num_warps, "num_stages": stage.num_stages}
    return compile_kernel(function, capability, types_of(function, operands, out), values, **options)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("operands", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_compiles(capability: int, operands: str, residual: bool, tmp_path: Path) -> None:
    for kernel, stage, rank in stages(capability, operands, residual):
        if residual and kernel != "_up":
            continue
        compiled = compile_stage(capability, operands, kernel, stage, rank, residual=residual)
        check_resources(compiled, capability, tmp_path)
        ptx = compiled.asm["ptx"]
        if operands == "float32" and not residual:
            assert not re.search(r"mma", ptx), "fp32 must not be rounded to tf32"
        elif operands != "float32":
            kind = r"s32\.s8\.s8" if operands == "int8" else r"f32\.bf16\.bf16"
            wide = capability >= 90 and stage.block_m >= 64
            assert re.search((r"wgmma\.mma_async\S*" if wide else r"mma\.sync\S*") + kind, ptx), kernel
        if residual:
            assert re.search(r"mma\S*s32\.s8\.s8", ptx)


# (out dtype, activation, zero points and bias): every branch of the epilogue at least once.
VARIANTS = [
    ("int32", "none", True),
    ("float32", "none", False),
    ("bfloat16", "relu", True),
    ("float16", "gelu_tanh", False),
    ("int8", "silu", True),
    ("int8", "none", False),
]


@pytest.mark.parametrize("kernel", ["_fused", "_up"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_epilogue_compiles(
    capability: int, variant: tuple[str, str, bool], kernel: str, tmp_path: Path
) -> None:
    out, activation, full = variant
    compiled = compile_stage(
        capability,
        "int8",
        kernel,
        tiles.Stage(64, 64, 128, 4, 3),
        64,
        out=out,
        activation=activation,
        full=full,
    )
    check_resources(compiled, capability, tmp_path)


@pytest.mark.parametrize("kernel", ["_fused", "_down"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_quantiser_is_ieee(capability: int, kernel: str) -> None:
    compiled = compile_stage(
        capability, "int8", kernel, tiles.Stage(64, 64, 128, 4, 3, 2), 64, activation="none"
    )
    ptx = compiled.asm["ptx"]
    assert "div.rn.f32" in ptx
    assert not re.search(r"\bfma\.|div\.full|div\.approx|\.ftz", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_parts_are_counted_behind_a_barrier(capability: int) -> None:
    """Between the stores of a part and its program's count all threads meet, and the count is ordered."""
    compiled = compile_stage(capability, "bfloat16", "_down", tiles.Stage(64, 64, 64, 4, 3, 4), 64)
    ptx = compiled.asm["ptx"]
    count = re.search(r"atom\.global\.gpu\.acq_rel\.add\.u32|atom\.acq_rel\.gpu\.global\.add\.u32", ptx)
    assert count, re.findall(r"atom\S*", ptx)
    before = ptx[: count.start()]
    assert before.rfind("bar.sync") > before.rfind("st.global"), "a part may be counted before it is stored"
    after = ptx[count.end() :]
    first = re.search(r"ld\.global\.cg|ld\.relaxed|ld\.global", after)
    assert first and 0 <= after.find("bar.sync") < first.start(), "read before the count is known"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_choices_keep_to_their_limits(size: int) -> None:
    for m in (1, 15, 16, 17, 64, 1000, 8448, 8449, 100_000, 2**31):
        for n, k, r in [(1, 1, 1), (4096, 4096, 128), (64, 100_000, 4096), (300, 70, 255), (8, 8, 0)]:
            for residual in (False, True):
                config = tiles.choose(m, n, k, r, size, residual)
                assert config.up.splits >= 1
                if config.down is None:
                    assert not residual and tiles.fits_one_tile(r, size)
                    assert config.up.splits <= -(-n // config.up.block_n)
                else:
                    count = -(-m // config.down.block_m) * -(-r // config.down.block_n)
                    assert 1 <= config.down.splits <= max(1, 132 // max(count, 1))


def test_too_many_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="split the batch"):
        grid("lowrank_linear", 2**31)

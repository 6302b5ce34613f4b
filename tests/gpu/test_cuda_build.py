"""The CUDA extension as compiled: which instructions its kernels are made of, what they spill, what it links.

Reads the machine code; runs nothing on a device.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .conftest import CudaBuild

pytestmark = pytest.mark.cuda_build

# Bytes of shared memory one block may have, by architecture (CUDA C++ Programming Guide).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_90a": 227 * 1024}


@dataclass
class Function:
    """One kernel of one architecture: its resources and how often each opcode occurs in it."""

    arch: str
    name: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)

    def count(self, prefix: str) -> int:
        return sum(n for op, n in self.opcodes.items() if op.startswith(prefix))


def _cuobjdump() -> str:
    try:
        import triton
    except ImportError:
        found = shutil.which("cuobjdump")
    else:
        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    if found is None:
        pytest.skip("cuobjdump not found: pip install triton, which brings it")
    return found


def _dump(path: Path, *options: str) -> str:
    done = subprocess.run([_cuobjdump(), *options, path], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def functions(cuda_build: CudaBuild) -> list[Function]:
    found: dict[tuple[str, str], Function] = {}
    arch = name = ""
    for line in _dump(cuda_build.path, "-res-usage").splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found[arch, name] = Function(arch, name, *(int(v) for v in match.groups()))
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    current: Function | None = None
    for line in _dump(cuda_build.path, "-sass").splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            current = found[arch, match[1]]
        elif current is not None and (match := opcode.search(line)):
            current.opcodes[match[1]] = current.opcodes.get(match[1], 0) + 1
    assert found
    return list(found.values())


def gemms(functions: list[Function], arch: str) -> list[Function]:
    return [f for f in functions if f.arch == arch and "cutlass" in f.name]


def test_every_table_row_is_compiled_once_per_output_size(
    cuda_build: CudaBuild, functions: list[Function]
) -> None:
    names = cuda_build.module.int8_linear_kernels()
    names += cuda_build.module.sparse_linear_kernels()
    for arch in ("sm_90a", "sm_80"):
        rows = [n for n in names if n.startswith(arch.replace("_", "") + "_")]
        assert rows and len(gemms(functions, arch)) == 3 * len(rows)
    sparse = [f for f in gemms(functions, "sm_90a") if f.count("IGMMA.SP")]
    wgmma = [n for n in cuda_build.module.sparse_linear_kernels() if n.startswith("sm90a")]
    assert len(sparse) == 3 * len(wgmma) and all(f.count("IGMMA") == f.count("IGMMA.SP") for f in sparse)


def test_no_kernel_spills(functions: list[Function]) -> None:
    for f in functions:
        assert f.registers <= 255
        assert f.stack == 0 and f.local == 0, f
        assert f.opcodes, f"no code read for {f.name}"
        assert f.count("LDL") == 0 and f.count("STL") == 0, f"{f.arch} {f.name} uses local memory"


def test_hopper_kernels_are_wgmma_and_tma(functions: list[Function]) -> None:
    for f in gemms(functions, "sm_90a"):
        assert f.count("IGMMA") > 0, f.name
        assert f.count("UTMALDG") > 0 and f.count("UTMASTG") > 0, f.name
        assert f.count("IMMA") == 0, f.name
        # A wait per block of K, of at least two wgmmas, and one at the end; more: ptxas serialised them.
        assert f.count("WARPGROUP.DEPBAR") <= max(2, f.count("IGMMA") / 2), f.name


def test_ampere_kernels_are_mma_and_cp_async(functions: list[Function]) -> None:
    for f in gemms(functions, "sm_80"):
        assert f.count("IMMA.16832.S8.S8") > 0, f.name
        assert f.count("LDGSTS.E.BYPASS") > 0 and f.count("LDSM") > 0, f.name


def stream_kernels(functions: list[Function], arch: str, rows: str) -> list[Function]:
    return [f for f in functions if f.arch == arch and "stream_kernel" in f.name and rows in f.name]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_for_few_rows(cuda_build: CudaBuild, functions: list[Function], arch: str) -> None:
    names = cuda_build.module.int8_linear_kernels()
    ints, floats = stream_kernels(functions, arch, "Int8Row"), stream_kernels(functions, arch, "FloatRow")
    assert len(ints) == sum(n.startswith("stream") for n in names)
    assert len(floats) == 2 * sum(n.startswith("weight_only") for n in names)
    for f in ints + floats:
        assert f.count("LDGSTS.E.BYPASS") > 0, f.name  # weights past L1
        # A group of copies, and the pieces read back 16 bytes at a time.
        assert f.count("LDGSTS") > f.count("LDGSTS.E.BYPASS") and f.count("LDS.128") > 0, f.name
        assert f.count("BAR.SYNC") <= 3, f"{f.name}: no barrier along K"
    assert all(f.count("IMMA.16832.S8.S8") for f in ints)
    assert sum(f.count("HMMA.16816.F32.BF16") > 0 for f in floats) == len(floats) / 2
    assert all(f.count("HMMA.16816.F32") > 0 for f in floats)
    assert all(f.count("I2F.S8") == 0 for f in floats), (
        "weights become floats by bits, not by the slow conversion"
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "units,rows,op,instruction",
    [
        ("SparseUnits", "MatrixRows", "sparse_linear", "IMMA.SP.16864.S8.S8"),
        ("DenseUnits", "ImageRows", "int8_conv2d", "IMMA.16832.S8.S8"),
    ],
)
def test_kernels_of_packed_weights(
    cuda_build: CudaBuild,
    functions: list[Function],
    arch: str,
    units: str,
    rows: str,
    op: str,
    instruction: str,
) -> None:
    found = [
        f
        for f in functions
        if f.arch == arch and "gemm_kernel" in f.name and units in f.name and rows in f.name
    ]
    names = getattr(cuda_build.module, f"{op}_kernels")()
    others = ("sm90a", "sp24_float", "bitmap")
    assert len(found) == sum(not name.startswith(others) for name in names)
    for f in found:
        # Every multiplication is of that kind, its rows come by ldmatrix, its stages by cp.async.
        assert f.count("IMMA") == f.count(instruction) > 0, f.name
        assert f.count("LDSM.16.M88.4") > 0 and f.count("LDGSTS.E.BYPASS") > 0, f.name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_of_two_of_four_floats(cuda_build: CudaBuild, functions: list[Function], arch: str) -> None:
    found = [f for f in functions if f.arch == arch and "SparseFloatUnits" in f.name]
    names = [n for n in cuda_build.module.sparse_linear_kernels() if "float" in n]
    assert names and len(found) == 2 * len(names)
    for f in found:
        bf16 = f.count("HMMA.SP.16832.F32.BF16")
        assert f.count("HMMA") == f.count("HMMA.SP.16832.F32") and bf16 in (0, f.count("HMMA")), f.name
        assert (bf16 > 0) == ("SparseFloatUnitsILb1E" in f.name) and f.count("HMMA") > 0, f.name
        assert f.count("LDSM.16.M88.4") > 0 and f.count("LDGSTS.E.BYPASS") > 0, f.name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_of_single_weights(cuda_build: CudaBuild, functions: list[Function], arch: str) -> None:
    found = [f for f in functions if f.arch == arch and "bitmap_kernel" in f.name]
    assert len(found) == sum(n.startswith("bitmap") for n in cuda_build.module.sparse_linear_kernels())
    for f in found:
        assert f.count("IMMA") == f.count("IMMA.16832.S8.S8") > 0, f.name
        assert f.count("LDGSTS.E.BYPASS") > 0 and f.count("PRMT") > 0 and f.count("SHF") > 0, f.name
        assert f.count("BAR.SYNC") <= 4, f"{f.name}: no barrier of the block along K"


def test_choice_for_single_weights(cuda_build: CudaBuild) -> None:
    m: Any = cuda_build.module
    chosen = [m.sparse_linear_bitmap(rows) for rows in (0, 1, 8, 9, 16, 17, 32, 33, 4096)]
    assert chosen == ["bitmap_8"] * 3 + ["bitmap_16"] * 2 + ["bitmap_32"] * 4
    assert {m.sparse_linear_order(name) for name in chosen} == {3}
    assert m.sparse_linear_supports("bitmap_8", 80, 9999, 64, 66311, I8) is None
    for reason, problem in {
        "8.0 or later": (75, 1, 64, 64, I8),
        "almost no int8": (103, 1, 64, 64, I8),
        "K is outside": (90, 1, 64, 66312, I8),
        "int8 by int8": (90, 1, 64, 64, BF16),
    }.items():
        assert reason in m.sparse_linear_supports("bitmap_8", *problem)
    layout = m.sparse_linear_bitmap_layout(70, 130)  # 5 tiles of 16 outputs, 3 steps of 64
    assert layout == {
        "tiles": 5,
        "steps": 3,
        "offsets_off": 15 * 128,
        "sums_off": 15 * 128 + 128,
        "values_off": 15 * 128 + 128 + 384,
    }
    assert m.sparse_linear_layout(70, 130, 3)["sums_off"] == layout["sums_off"]
    with pytest.raises(ValueError, match="packed by their caller"):
        m.sparse_linear_pack(0, 0, 16, 32, 0, 3, 0, 0)


def test_choice_for_packed_weights(cuda_build: CudaBuild) -> None:
    m: Any = cuda_build.module
    for capability in (80, 89, 120):
        assert m.sparse_linear_choose(capability, 132, 256, 1024, 4096, I8) == "sp24_128x64"
        assert m.sparse_linear_choose(capability, 132, 4096, 4096, 4096, I8) == "sp24_256x128"
    assert m.sparse_linear_choose(90, 132, 4096, 4096, 4096, I8) == "sm90a_sp24_256x128x128"
    assert m.sparse_linear_choose(75, 132, 1, 64, 64, I8) is None
    # What is chosen on one device reads one layout of the weight, whatever the rows.
    for capability, order in ((80, 0), (90, 1), (100, 0)):
        for x_dtype, wanted in ((I8, order), (BF16, 2), (F16, 2)):
            chosen = {m.sparse_linear_choose(capability, 132, r, 64, 64, x_dtype) for r in (0, 1, 64, 9999)}
            assert {m.sparse_linear_order(name) for name in chosen} == {wanted}
    assert m.sparse_linear_choose(80, 108, 256, 1024, 4096, BF16) == "sp24_float_128x64"
    assert m.sparse_linear_choose(80, 108, 4096, 4096, 4096, F16) == "sp24_float_256x128"
    assert m.sparse_linear_choose(90, 132, 1, 64, 64, F32) is None
    assert m.sparse_linear_choose(103, 132, 1, 64, 99999, BF16) == "sp24_float_128x64"
    assert "bfloat16 and float16" in m.sparse_linear_supports("sp24_float_128x64", 80, 1, 64, 64, I8)
    assert "int8 by int8" in m.sparse_linear_supports("sp24_128x64", 80, 1, 64, 64, BF16)
    assert "2^26" in m.sparse_linear_supports("sp24_float_128x64", 80, 1, 64, 2**26 + 1, BF16)
    assert m.sparse_linear_supports("sp24_128x64", 80, 1, 64, 64, I8) is None
    assert "9.0" in m.sparse_linear_supports("sm90a_sp24_256x128x128", 100, 1, 64, 64, I8)
    # Steps of places lie 128 N apart, which CUTLASS multiplies as int32.
    for n, kernel in ((2**24 - 64, "sm90a_sp24_256x128x128"), (2**24, "sp24_256x128")):
        assert m.sparse_linear_choose(90, 132, 4096, n, 64, I8) == kernel
    assert "2^24" in m.sparse_linear_supports("sm90a_sp24_256x128x128", 90, 1, 2**24, 64, I8)
    for reason, problem in {
        "sparse tensor cores": (75, 1, 64, 64),
        "almost no int8": (103, 1, 64, 64),
        "K is outside": (90, 1, 64, 66312),
        "N is outside": (90, 1, 0, 64),
        "M is outside": (90, -1, 64, 64),
        "2^31 tiles": (90, 2**30, 2**20, 64),
    }.items():
        assert reason in m.sparse_linear_supports("sp24_128x64", *problem, I8)
    assert m.int8_conv2d_choose(132, 32 * 56 * 56, 64) == "conv_64x128"
    assert m.int8_conv2d_choose(132, 32 * 14 * 14, 1024) == "conv_128x128"
    assert m.int8_conv2d_supports(86, 1, 64, 64, 9) is None
    for reason, layer in {
        "8.0 or later": (75, 1, 64, 64, 9),
        "almost no int8": (103, 1, 64, 64, 9),
        "no groups": (90, 2, 64, 64, 9),
        "multiple of 16": (90, 1, 3, 64, 49),
        "K is above": (90, 1, 8192, 64, 9),
        "output channels": (90, 1, 64, 0, 9),
    }.items():
        assert reason in m.int8_conv2d_supports(*layer)
    # The sums lie where the layout of 2:4's K, rounded up to 8, says too.
    for order in (0, 1, 2):
        assert m.sparse_linear_layout(70, 61, order) == m.sparse_linear_layout(70, 64, order)
    # values of 32 bytes, rounded to 128; a step of places of 128 rows; 70 sums
    assert m.sparse_linear_layout(70, 61, 1) == {
        "sums_off": 70 * 32 + 64 + 2048,
        "total": 2304 + 2048 + 384,
    }
    # 2 groups of 64 outputs, 2 steps of 32, 2304 bytes each: 1.125 a weight
    assert m.sparse_linear_layout(70, 61, 2)["sums_off"] == 4 * 2304
    with pytest.raises(ValueError, match="order must be"):
        m.sparse_linear_layout(70, 61, 4)
    assert isinstance(m.sparse_linear_plan(256, 8, 64, 2, tail(mode=3)), bytes)
    with pytest.raises(ValueError, match="float x by float values"):
        m.sparse_linear_plan(256, 8, 64, 2, tail())
    assert m.int8_conv2d_workspace(3, 1024) == 3072 + 128 + 128 + 128  # q, scales, outside, peaks
    with pytest.raises(ValueError, match="geometry must have 9"):
        m.int8_conv2d_plan(256, 8, (1, 2), tail())
    for plan in (
        lambda *a: m.sparse_linear_plan(*a[:3], 0, a[3]),
        lambda *a: m.sparse_linear_plan(*a[:3], 1, a[3]),
        lambda *a: m.int8_conv2d_plan(*a[:2], (16, 3, 3, 1, 1, 1, 1, 1, 1), a[3]),
    ):
        assert isinstance(plan(256, 8, 64, tail()), bytes)
        with pytest.raises(ValueError, match="weight-only"):
            plan(256, 8, 64, tail(mode=3))


def test_the_quantiser_has_every_variant_and_wide_loads(functions: list[Function]) -> None:
    for arch in ("sm_80", "sm_90"):
        rows = [f for f in functions if f.arch == arch and "quantize_rows_kernel" in f.name]
        assert len(rows) == 12  # three dtypes, row per warp or per block, 16-byte or single loads
        wide = [f for f in rows if f.count("LDG.E.128")]
        assert len(wide) == 6
        assert all(f.count("REDUX") > 0 for f in rows)


def test_later_devices_find_ptx(cuda_build: CudaBuild) -> None:
    assert re.search(r"sm_80\.ptx", _dump(cuda_build.path, "-lptx"))


def test_it_links_no_torch_and_no_cuda_library(cuda_build: CudaBuild) -> None:
    needed = subprocess.run(["ldd", cuda_build.path], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not re.search(r"libtorch|libc10|libcudart|libcublas|libcuda\.so|libpython", needed)


def test_it_loads_and_refuses_without_a_driver(cuda_build: CudaBuild) -> None:
    m = cuda_build.module
    assert m.runtime_version() >= 12080
    if m.driver_version() == 0:
        with pytest.raises(RuntimeError, match="driver"):
            m.quantize_rows(0, 0, 1, 1, 1, 1, 0, 0, 0, 16, 0, 0, 0)


SHAPES = [
    (m, n, k) for m in (0, 1, 16, 17, 64, 65, 512, 4096) for n in (1, 17, 4096) for k in (1, 4096, 66311)
]


I8, F32, BF16, F16 = 3, 0, 1, 2


@pytest.mark.parametrize("capability,tiles", [(80, "sm80"), (89, "sm80"), (90, "sm90a"), (120, "sm80")])
def test_choice_is_the_devices_own(cuda_build: CudaBuild, capability: int, tiles: str) -> None:
    m = cuda_build.module
    for shape in SHAPES:
        name = m.int8_linear_choose(capability, 132, *shape, False, BF16)
        assert name.startswith((tiles, "stream"))
        assert m.int8_linear_supports(name, capability, *shape, False, BF16) is None


def test_choice_follows_the_shape(cuda_build: CudaBuild) -> None:
    def choose(*problem: int) -> str | None:
        name: str | None = cuda_build.module.int8_linear_choose(*problem, False, BF16)
        return name

    for capability, count in ((90, 132), (80, 108)):
        few = [choose(capability, count, m, 4096, 4096) for m in (0, 1, 8, 9, 16, 17, 32)]
        assert few == ["stream_8"] * 3 + ["stream_16"] * 2 + ["stream_32"] * 2
        # Where tiles would leave most multiprocessors idle.
        assert str(choose(capability, count, 64, 1024, 4096)).startswith("stream")
    assert choose(90, 132, 64, 8192, 4096) == "sm90a_64x64x256"
    # Few tiles: K is shared out. No more rows a tile than there are.
    assert choose(90, 132, 64, 4096, 4096) == "sm90a_64x128x128_swapped"
    assert choose(90, 132, 128, 4096, 4096) == "sm90a_128x128x128_split"
    assert choose(90, 132, 8192, 8192, 8192) == "sm90a_128x256x128_cooperative"
    assert choose(90, 132, 512, 4096, 4096) == "sm90a_128x128x128_pingpong"
    assert choose(80, 108, 4096, 4096, 4096) == "sm80_128x128x64"


def test_choice_for_weight_only(cuda_build: CudaBuild) -> None:
    choose = cuda_build.module.int8_linear_choose
    for dtype in (BF16, F16):
        few = [choose(90, 132, m, 4096, 4096, True, dtype) for m in (1, 8, 9, 17, 32)]
        assert few == [f"weight_only_{m}" for m in (8, 8, 16, 32, 32)]
        assert choose(90, 132, 33, 4096, 4096, True, dtype) is None
    assert choose(90, 132, 1, 4096, 4096, True, F32) is None
    supports = cuda_build.module.int8_linear_supports
    assert "must not" in supports("stream_8", 90, 1, 64, 64, True, BF16)
    assert "does not quantise" in supports("weight_only_8", 90, 1, 64, 64, False, BF16)
    assert "bfloat16 and float16" in supports("weight_only_8", 90, 1, 64, 64, True, F32)
    assert "2^31 - 1 tiles" in supports("stream_8", 90, 2**30, 4096, 64, False, BF16)
    assert supports("weight_only_8", 103, 1, 64, 64, True, BF16) is None


@pytest.mark.parametrize(
    "capability,shape,reason",
    [
        (75, (1, 64, 64), "8.0 or later"),
        (103, (1, 64, 64), "10.3 has almost no int8"),
        (80, (1, 64, 0), "K is outside"),
        (80, (1, 64, 66312), "K is outside"),
        (80, (1, 0, 64), "N is outside"),
        (80, (2**31, 64, 64), "M is outside"),
    ],
)
def test_what_no_kernel_can_do_is_said(
    cuda_build: CudaBuild, capability: int, shape: tuple[int, int, int], reason: str
) -> None:
    m = cuda_build.module
    assert m.int8_linear_choose(capability, 132, *shape, False, I8) is None
    assert reason in m.int8_linear_supports("sm80_128x128x64", capability, *shape, False, I8)


def test_a_hopper_kernel_declines_other_devices(cuda_build: CudaBuild) -> None:
    supports = cuda_build.module.int8_linear_supports
    assert "9.0" in supports("sm90a_64x64x256", 100, 1, 64, 64, False, I8)
    with pytest.raises(ValueError, match="no CUDA kernel is called 'sm10'"):
        supports("sm10", 90, 1, 64, 64, False, I8)


@pytest.mark.parametrize("n,k", [(1, 1), (3, 16), (5, 17), (128, 4096), (1000, 66311)])
def test_pack_layout(cuda_build: CudaBuild, n: int, k: int) -> None:
    d = cuda_build.module.int8_linear_layout(n, k)
    assert d["ldw"] % 16 == 0 and k <= d["ldw"] < k + 16
    assert all(d[name] % 128 == 0 for name in ("weight_off", "sums_off", "total"))
    assert d["weight_off"] >= 64 and d["sums_off"] >= d["weight_off"] + n * d["ldw"]
    assert d["sums_off"] + 4 * n <= d["total"] < d["sums_off"] + 4 * n + 128


def test_workspace(cuda_build: CudaBuild) -> None:
    m: Any = cuda_build.module
    kernels = m.int8_linear_kernels()

    def size(x: int, dtype: int, rows: int, k: int, *strides: int, weight_only: bool = False) -> int:
        kernel = kernels.index(
            "weight_only_8" if weight_only else "stream_8"
        )  # they want none for themselves
        plan = m.int8_linear_plan(256, 64, 0, 8, k, tail(mode=3 if weight_only else 0))
        return int(m.int8_linear_workspace(plan, kernel, x, dtype, rows, *strides, F32, 0))

    assert size(256, 0, 3, 33, 33, 1) == 256 + 128  # 3 rows of 48 bytes, then 3 scales, in lines of 128
    assert size(256, 3, 3, 32, 32, 1) == 0  # int8 rows on 16 bytes are read where they are
    assert size(257, 3, 3, 32, 32, 1) > 0
    assert size(256, 3, 3, 33, 33, 1) > 0
    assert size(256, 3, 3, 8, 0, 1) > 0  # an expanded row
    assert size(256, 1, 3, 24, 24, 1, weight_only=True) == 0  # as are float rows that are not quantised
    assert size(256, 1, 3, 33, 33, 1, weight_only=True) == 384 + 128  # 3 rows of 48 elements
    with pytest.raises(ValueError, match="adjacent"):
        size(256, 3, 3, 32, 1, 3)
    with pytest.raises(ValueError, match="adjacent"):
        size(256, 1, 3, 32, 1, 3, weight_only=True)


def test_workspace_of_what_splits_k(cuda_build: CudaBuild) -> None:
    m: Any = cuda_build.module
    for name in m.int8_linear_kernels():
        splits = name.endswith(("_split", "_swapped"))
        for dtype in (F32, BF16, I8):
            few = m.int8_linear_kernel_workspace(name, 132, 64, 1024, 4096, dtype)
            # Sums of at most every block's tile, twice, and the counters.
            assert 0 < few <= 132 * 2 * 128 * 128 * 4 + 65536 if splits else few == 0
        # As many tiles as multiprocessors: nothing is split.
        assert m.int8_linear_kernel_workspace(name, 128, 128, 128 * 128, 4096, BF16) == 0
        assert m.int8_linear_kernel_workspace(name, 132, 0, 4096, 4096, BF16) == 0


def tail(**values: int) -> dict[str, int]:
    names = "weight_scale bias activation mode x_scale x_scales x_zero_point out_scale out_zero_point"
    return dict.fromkeys(names.split(), 0) | values


def test_plans(cuda_build: CudaBuild) -> None:
    m: Any = cuda_build.module
    assert isinstance(m.int8_linear_plan(256, 64, 0, 8, 64, tail()), bytes)
    assert isinstance(m.int8_linear_plan(256, 64, 0, 8, 64, tail(mode=3)), bytes)
    with pytest.raises(TypeError, match="plan"):
        m.int8_linear_run(b"", -1, 0, 0, 1, 64, 1, 0, 0, 0, 8, 0, 0)
    with pytest.raises(TypeError, match="few"):
        m.int8_linear_run(m.int8_linear_plan(256, 64, 0, 8, 64, tail()), -1)

"""Instructions of the Arm kernels' inner loops, from the disassembly, against committed numbers.

No Arm machine runs these tests; what the loops should reach is computed from their instructions and from how
many of each kind a core starts in a cycle. ``python -m tests.native.test_instructions`` prints the table of
docs/perf-notes.md.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from .building import CROSS, PREFIX, ROOT, run

DOCS = ROOT / "docs" / "perf-notes.md"
OBJECTS = CROSS / "CMakeFiles" / "tautorch_kernels.dir" / "csrc" / "kernels" / "common"


@dataclass(frozen=True)
class Core:
    """What a core starts in a cycle at most."""

    instructions: int
    vectors: int
    loads: int
    multiplies: int  # of the widening kind (smull, smlal); dot products run on every vector pipe
    conversion: int  # cycles for which scvtf of four lanes holds its pipe


CORES = {
    "Cortex-A72": Core(3, 2, 1, 1, 2),
    "Cortex-A76": Core(4, 2, 2, 1, 2),
    "Neoverse V1, V2": Core(8, 4, 3, 2, 2),
    "Apple M": Core(8, 4, 3, 4, 1),
}
# Cores that would choose the kernel.
RUNS = {
    "neon": ("Cortex-A72",),
    "neon_dotprod": ("Cortex-A76", "Apple M"),
    "neon_i8mm": ("Neoverse V1, V2", "Apple M"),
}


@dataclass(frozen=True)
class Loop:
    """An inner loop: where it is, what it does at each turn, and the most it may take for that."""

    name: str
    kernel: str
    function: str
    product: str  # the instruction that multiplies
    products: int
    macs: int  # multiply-accumulates with kept weights
    instructions: int
    vectors: int
    loads: int
    conversions: int = 0  # scvtf, of the vector operations

    @property
    def widening(self) -> bool:
        return self.product in ("smull", "smlal")

    @property
    def multiplies(self) -> tuple[str, ...]:
        return ("smull", "smlal") if self.widening else (self.product,)


# fmt: off
LOOPS = (
    Loop("int8, tile 4 x 4", "neon", "dot_i8_t<4, 1, false>", "smull", 32, 256, 60, 48, 8),
    Loop("int8, tile 4 x 4, operands of -128", "neon", "dot_i8_t<4, 1, true>", "smull", 32, 256, 76, 64, 8),
    Loop("int8, 1 row x 8", "neon", "dot_i8_t<1, 2, false>", "smull", 16, 128, 36, 24, 9),
    Loop("4x1, 16 rows", "neon", "sparse_i8_t<4, 64, 4>", "smlal", 64, 256, 90, 74, 9),
    Loop("unstructured, 16 rows", "neon", "sparse_i8_t<1, 64, 4>", "smlal", 16, 64, 41, 26, 9),
    Loop("depthwise, 9 to 12 taps, 16 channels", "neon", "depthwise_pass<3, true>", "smull",
         24, 192, 69, 48, 16),
    Loop("weight-only, 1 row of 3 digits x 4", "neon", "dot_i8_t<3, 1, true>", "smull", 24, 64, 63, 52, 7),
    Loop("blocks, tile 4 x 4", "neon", "cells_t<4, 1, false>", "smull", 32, 256, 64, 48, 9),
    Loop("blocks, 1 row x 8", "neon", "cells_t<1, 2, false>", "smull", 16, 128, 38, 24, 10),
    Loop("int8, tile 6 x 16", "neon_dotprod", "dot_i8_t<6, 4>", "sdot", 96, 1536, 128, 100, 23),
    Loop("int8, 1 row x 16", "neon_dotprod", "dot_i8_t<1, 4>", "sdot", 16, 256, 36, 16, 17),
    Loop("4x1, 16 rows", "neon_dotprod", "sparse_i8_t<4, 64, 4>", "sdot", 16, 256, 40, 24, 9),
    Loop("4x1, 4 rows", "neon_dotprod", "sparse_i8_t<4, 4, 1>", "sdot", 4, 64, 25, 9, 9),
    Loop("unstructured, 32 rows", "neon_dotprod", "sparse_i8_t<1, 64, 8>", "sdot", 32, 512, 180, 96, 49),
    Loop("unstructured, 4 rows", "neon_dotprod", "sparse_i8_t<1, 4, 1>", "sdot", 4, 64, 76, 24, 33),
    Loop("depthwise, 9 to 12 taps, 16 channels", "neon_dotprod", "depthwise_pass<3, true>", "sdot",
         12, 192, 58, 37, 16),
    Loop("float, tile 6 x 16", "neon_dotprod", "dot_f32_t<6, 4, false>", "fmla", 96, 384, 128, 100, 23),
    Loop("float, 1 row x 16", "neon_dotprod", "dot_f32_t<1, 4, false>", "fmla", 16, 64, 36, 16, 17),
    Loop("float 4x1, 16 rows", "neon_dotprod", "sparse_f32_t<4, 64, 4, 4,", "fmla", 16, 64, 33, 17, 9),
    Loop("float unstructured, 16 rows", "neon_dotprod", "sparse_f32_t<1, 64, 4, 4,", "fmla",
         16, 64, 56, 17, 24),
    Loop("weight-only, 1 row of 3 digits x 16", "neon_dotprod", "dot_i8_t<3, 4>", "sdot",
         48, 256, 71, 48, 19),
    Loop("weight-only, 2 rows of 3 digits x 16", "neon_dotprod", "dot_i8_t<6, 4>", "sdot",
         96, 512, 128, 100, 23),
    Loop("blocks, tile 6 x 16", "neon_dotprod", "cells_t<6>", "sdot", 96, 1536, 134, 100, 24),
    Loop("blocks, 1 row x 16", "neon_dotprod", "cells_t<1>", "sdot", 16, 256, 38, 16, 18),
    Loop("int8, tile 6 x 16", "neon_i8mm", "dot_i8_t<6, 4>", "smmla", 24, 768, 45, 27, 14),
    Loop("int8, 1 row x 16", "neon_i8mm", "dot_i8_one<4>", "sdot", 8, 128, 20, 9, 9),
    Loop("weight-only, 1 row of 3 digits x 16", "neon_i8mm", "dot_i8_t<3, 4>", "smmla", 32, 256, 61, 38, 19),
    Loop("weight-only, 2 rows of 3 digits x 16", "neon_i8mm", "dot_i8_t<6, 4>", "smmla", 24, 256, 45, 27, 14),
    Loop("blocks, tile 6 x 16", "neon_i8mm", "cells_t<6>", "smmla", 48, 1536, 80, 48, 23),
    Loop("blocks, 1 row x 16", "neon_i8mm", "cells_one", "sdot", 16, 256, 40, 18, 18),
)
# fmt: on


# Instructions in which a loop makes floats of so many weights (four a scvtf), before the product.
WIDEN = {"neon": (64, 79), "neon_dotprod": (16, 22), "neon_i8mm": (32, 41)}


def predicted(loop: Loop, core: Core) -> float:
    """Multiply-accumulates a cycle if nothing but a core's width and pipes held the loop back."""
    cycles = max(
        loop.instructions / core.instructions,
        (loop.vectors + loop.conversions * (core.conversion - 1)) / core.vectors,
        loop.loads / core.loads,
        loop.products / core.multiplies if loop.widening else 0,
    )
    return loop.macs / cycles


def best(loop: Loop, core: Core) -> float:
    """The same with nothing but the products: smull, smlal and sadalp of `neon` share the pipes."""
    per_product = loop.macs / loop.products
    return per_product * (core.multiplies if loop.widening else core.vectors)


def table() -> list[str]:
    """The rows of docs/perf-notes.md."""
    rows = []
    for loop in LOOPS:
        cores = []
        for name in RUNS[loop.kernel]:
            rate = predicted(loop, CORES[name])
            cores.append(f"{name} {rate:.1f} ({rate / best(loop, CORES[name]):.0%})")
        cells = (
            *(f"`{loop.kernel}`", loop.name, loop.macs, f"{loop.products} {loop.product}", loop.vectors),
            *(loop.loads, loop.instructions, f"{loop.instructions / loop.macs:.3f}", "; ".join(cores)),
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


JUMP = re.compile(r"(?:b\.\w+|b|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+([0-9a-f]+) <")
VECTOR = re.compile(r"\b[vdsq]\d+\b|\bv\d+\.")


def counts(loop: Loop, listing: str) -> tuple[int, int, int, int, int]:
    """Products, instructions, vector operations, loads, conversions of the loop with the most products."""
    found: list[tuple[int, int, int, int, int]] = []
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        if loop.function not in name:
            continue
        code = [
            (int(at, 16), text.strip())
            for at, text in re.findall(r"^\s*([0-9a-f]+):\t(.*)$", body, re.MULTILINE)
        ]
        place = {at: i for i, (at, _) in enumerate(code)}
        turns = []
        for last, (at, text) in enumerate(code):
            jump = JUMP.match(text)
            if jump and int(jump[1], 16) <= at and int(jump[1], 16) in place:
                turns.append((place[int(jump[1], 16)], last))
        for first, last in turns:
            if any((f, n) != (first, last) and first <= f and n <= last for f, n in turns):
                continue  # not an inner loop
            words = [text.split(None, 1) for _, text in code[first : last + 1]]
            if any(w[0] == "ret" for w in words):
                continue  # a jump back to code that was put elsewhere
            products = sum(w[0].rstrip("2") in loop.multiplies for w in words)
            loads = sum(2 if w[0] == "ldp" else 1 for w in words if w[0].startswith("ld"))
            # Loads to one lane or to all take a vector pipe too.
            vectors = sum(
                VECTOR.search(w[1]) is not None and re.match(r"ld[pur]|st", w[0]) is None
                for w in words
                if len(w) > 1
            )
            conversions = sum(w[0] == "scvtf" for w in words)
            found.append((products, len(words), vectors, loads, conversions))
    assert found, f"{loop.kernel} has no loop in {loop.function}"
    most = max(products for products, *_ in found)
    return min((f for f in found if f[0] == most), key=lambda f: f[1])


@pytest.fixture(scope="module")
def listings(aarch64: Path) -> dict[str, str]:
    """Disassembly of each kernel's table."""
    assert aarch64.exists()
    if not shutil.which(f"{PREFIX}objdump"):
        pytest.skip(f"{PREFIX}objdump is not installed")
    return {
        kernel: run(f"{PREFIX}objdump", "-dC", "--no-show-raw-insn", OBJECTS / f"isa_{kernel}.cpp.o")
        for kernel in RUNS
    }


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: f"{loop.kernel}-{loop.name}")
def test_no_loop_takes_more_than_it_did(listings: dict[str, str], loop: Loop) -> None:
    products, *took = counts(loop, listings[loop.kernel])
    assert products == loop.products
    most = [loop.instructions, loop.vectors, loop.loads, loop.conversions]
    assert all(n <= m for n, m in zip(took, most, strict=True)), (
        f"{took} instructions, vectors, loads, conversions; {most} are committed"
    )


@pytest.mark.parametrize("kernel", WIDEN)
def test_weights_are_widened_before_products(listings: dict[str, str], kernel: str) -> None:
    weights, most = WIDEN[kernel]
    loop = Loop("widen", kernel, "widen(", "scvtf", weights // 4, 0, most, most, 1, weights // 4)
    products, instructions, *_ = counts(loop, listings[kernel])
    assert products == weights // 4 and instructions <= most
    assert not re.search(r"<.*dot_f32_t<\d+, \d+, true>", listings[kernel])


def test_documentation_has_these_numbers() -> None:
    lines = set(DOCS.read_text().splitlines())
    missing = [row for row in table() if row not in lines]
    assert not missing, "\n".join(missing)


if __name__ == "__main__":
    print("\n".join(table()))

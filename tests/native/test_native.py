"""The kernels through a C++ program without Python: on this machine, and as aarch64 code under qemu-user.

The program gets the list of kernels that the CPU must have, so that none is left out unnoticed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from .building import EMULATOR, HERE, ROOT, run

GOLDEN = ROOT / "tests" / "golden" / "golden.json"
# A model without dot products (Raspberry Pi 4), one with SDOT, one with SMMLA too; and what each must run.
MODELS = {
    "cortex-a72": "scalar,neon",
    "neoverse-n1": "scalar,neon,neon_dotprod",
    "max": "scalar,neon,neon_dotprod,neon_i8mm",
}


def x86_kernels() -> str:
    """What this CPU must run, by the kernel's list of its features rather than by the product's own look."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    names = ["scalar"]
    if {"avx2", "fma", "f16c"} <= flags:
        names.append("avx2")
        if "avx_vnni" in flags:
            names.append("avxvnni")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
            names.append("avx512vnni")
            # ARCH_REQ_XCOMP_PERM of XFEATURE_XTILE_DATA: a sandbox may refuse it.
            if {"amx_tile", "amx_int8"} <= flags and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0:
                names.append("amx")
    return ",".join(names)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="reads x86 feature names")
def test_here() -> None:
    if not (HERE / "CMakeCache.txt").exists():
        pytest.skip(f"no {HERE}; run `make build`")
    run("cmake", "--build", HERE, "--target", "native_test")
    out = run(HERE / "tests" / "native" / "native_test", GOLDEN, "--expect", x86_kernels())
    assert out.endswith("all equal\n")


@pytest.mark.parametrize("cpu", MODELS)
def test_emulated(aarch64: Path, cpu: str) -> None:
    if not shutil.which(EMULATOR):
        pytest.skip(f"{EMULATOR} is not installed; apt-get install qemu-user")
    out = run(EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu, aarch64, GOLDEN, "--expect", MODELS[cpu])
    assert out.endswith("all equal\n")

"""The C interface: values against numpy, and what the library exports."""

from __future__ import annotations

import ctypes as c
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.capi import library as t
from tests.capi.library import Library, Refused, at
from tests.capi.problem import Problem, entries
from tests.native.building import HERE, ROOT, run

INCLUDE = ROOT / "include"


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q int64 and fp32 scales of float rows: one IEEE division each, rint to even."""
    amax = np.abs(x).max(1, keepdims=True)
    return np.rint(x * (np.float32(127) / amax)).astype(np.int64), amax / np.float32(127)


SIZES = [(1, 1, 1), (1, 70, 33), (5, 17, 64), (13, 129, 257), (200, 40, 96)]


@pytest.fixture(params=SIZES, ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(*request.param)


def test_dense_int8(lib: Library, problem: Problem) -> None:
    p = problem
    for kernel in lib.supported():
        packed = lib.pack(kernel, t.INT8, p.w)
        q, scale = quantised(p.x)
        acc = q @ p.w.astype(np.int64).T
        plan = lib.plan(p.layer(packed, y_dtype=t.INT32))
        assert lib.c.tt_plan_kernel(c.byref(plan)).decode() == kernel
        assert np.array_equal(lib.run(plan, p.x, p.out(np.int32)), acc)
        plan = lib.plan(p.layer(packed, weight_scale=p.scale, bias=p.bias, activation=t.RELU))
        y = np.maximum(acc * scale.astype(np.float64) * p.scale + p.bias, 0)
        assert np.allclose(lib.run(plan, p.x, p.out()), y, rtol=1e-6, atol=1e-6 * np.abs(acc).max())


def test_int8_in_and_out(lib: Library, problem: Problem) -> None:
    p = problem
    zero, acc = -7, (p.x8.astype(np.int64) + 7) @ p.w.astype(np.int64).T
    for kernel in lib.supported():
        packed = lib.pack(kernel, t.INT8, p.w)
        given = {"x_dtype": t.INT8_X, "x_scale": 0.5, "x_zero_point": zero}
        plan = lib.plan(p.layer(packed, y_dtype=t.INT32, **given))
        assert np.array_equal(lib.run(plan, p.x8, p.out(np.int32)), acc)
        # Powers of two: every product is exact, and only rint rounds.
        step = 2.0 ** int(np.ceil(np.log2(np.abs(acc).max() + 1)) - 8)
        fields = {"y_dtype": t.INT8_X, "y_scale": step, "y_zero_point": 3, **given}
        y = np.clip(np.rint(acc * 0.5 / step) + 3, -128, 127)
        assert np.array_equal(lib.run(lib.plan(p.layer(packed, **fields)), p.x8, p.out(np.int8)), y)


def test_a_static_scale(lib: Library, problem: Problem) -> None:
    p = problem
    q = np.clip(np.rint(p.x * (np.float32(1) / np.float32(0.03))) + 5, -128, 127).astype(np.int64)
    for kernel in lib.supported():
        plan = lib.plan(p.layer(lib.pack(kernel, t.INT8, p.w), x_scale=0.03, x_zero_point=5, y_dtype=t.INT32))
        assert np.array_equal(lib.run(plan, p.x, p.out(np.int32)), (q - 5) @ p.w.astype(np.int64).T)


@pytest.mark.parametrize("kind", [t.FLOAT, t.INT8_FLOAT_X])
def test_float_products(lib: Library, problem: Problem, kind: int) -> None:
    p = problem
    w = p.wf if kind == t.FLOAT else p.w
    scale = None if kind == t.FLOAT else p.scale
    exact = p.x.astype(np.float64) @ w.T.astype(np.float64) * (1 if scale is None else scale) + p.bias
    size = np.abs(p.x).astype(np.float64) @ np.abs(w.T) * (1 if scale is None else scale) + 1
    for kernel in lib.supported():
        fields: dict[str, Any] = (
            {"bias": p.bias} if scale is None else {"bias": p.bias, "weight_scale": scale}
        )
        y = lib.run(lib.plan(p.layer(lib.pack(kernel, kind, w), **fields)), p.x, p.out())
        assert (np.abs(y - exact) <= (16 + p.k / 8) * 2.0**-23 * size).all()


@pytest.mark.parametrize("group", [1, 4])
def test_sparse(lib: Library, problem: Problem, group: int) -> None:
    p = problem
    mask = np.random.default_rng(1).random((-(-p.n // group), p.k)) < 0.3
    dense = mask.repeat(group, 0)[: p.n]
    acc = quantised(p.x)[0] @ (p.w * dense).astype(np.int64).T
    exact = p.x.astype(np.float64) @ (p.wf * dense).T.astype(np.float64)
    size = np.abs(p.x).astype(np.float64) @ np.abs(p.wf * dense).T + 1
    for kernel in lib.supported():
        sparse, _keep = entries(mask, p.w, group)
        plan = lib.plan(p.layer(packed := lib.pack_sparse(kernel, t.INT8, sparse), y_dtype=t.INT32))
        assert np.array_equal(lib.run(plan, p.x, p.out(np.int32)), acc)
        sparse, _keep = entries(mask, p.wf, group)
        plan = lib.plan(p.layer(packed := lib.pack_sparse(kernel, t.FLOAT, sparse)))
        assert (np.abs(lib.run(plan, p.x, p.out()) - exact) <= (16 + p.k / 8) * 2.0**-23 * size).all()
        assert packed.nbytes % 64 == 0


@pytest.mark.parametrize("rank", [1, 24])
def test_lowrank(lib: Library, problem: Problem, rank: int) -> None:
    p = problem
    rng = np.random.default_rng(2)
    down, up = rng.standard_normal((rank, p.k), np.float32), rng.standard_normal((p.n, rank), np.float32)
    for kernel in lib.supported():
        d, u = lib.pack(kernel, t.FLOAT, down), lib.pack(kernel, t.FLOAT, up)
        plan = t.Plan()
        layer = p.layer(d, bias=p.bias)
        lib.call("tt_lowrank_plan", c.byref(layer), at(u), c.c_size_t(u.nbytes), None, c.byref(plan))
        exact = p.x.astype(np.float64) @ down.T @ up.T + p.bias
        size = np.abs(p.x) @ np.abs(down).T @ np.abs(up).T + 1
        assert (
            np.abs(lib.run(plan, p.x, p.out()) - exact) <= (32 + (p.k + rank) / 8) * 2.0**-23 * size
        ).all()
        d8, u8 = (np.clip(np.rint(w * 30), -127, 127).astype(np.int8) for w in (down, up))
        d, u = lib.pack(kernel, t.INT8, d8), lib.pack(kernel, t.INT8, u8)
        down_scale = np.full(rank, 1 / 30, np.float32)
        layer = p.layer(d, weight_scale=p.scale)
        lib.call(
            "tt_lowrank_plan", c.byref(layer), at(u), c.c_size_t(u.nbytes), at(down_scale), c.byref(plan)
        )
        q, scale = quantised(p.x)
        inner = (q @ d8.astype(np.int64).T).astype(np.float32) * scale * down_scale
        live = np.abs(inner).max(1) > 0
        q, scale = quantised(inner[live])
        y = lib.run(plan, p.x, p.out())[live]
        assert np.allclose(y, q @ u8.astype(np.int64).T * (scale * p.scale), rtol=1e-5, atol=1e-5)


def test_strides_and_no_rows(lib: Library) -> None:
    p = Problem(3, 20, 10)
    packed = lib.pack(None, t.INT8, p.w)
    wide, y = np.zeros((3, 16), np.float32), np.full((3, 25), 7, np.int32)
    wide[:, :10] = p.x
    plan = lib.plan(p.layer(packed, x_stride=16, y_stride=25, y_dtype=t.INT32))
    lib.run(plan, wide, y)
    assert np.array_equal(y[:, :20], quantised(p.x)[0] @ p.w.astype(np.int64).T) and (y[:, 20:] == 7).all()
    lib.call("tt_run", c.byref(plan), None, c.c_int64(0), None)


def test_plans_may_be_copied(lib: Library) -> None:
    p = Problem(4, 30, 20)
    fields = {"x_dtype": t.INT8_X, "x_scale": 0.25}
    packed = lib.pack(None, t.INT8, p.w)
    plan, copy = lib.plan(p.layer(packed, **fields)), t.Plan()
    c.memmove(c.byref(copy), c.byref(plan), c.sizeof(plan))
    c.memset(c.byref(plan), 0, c.sizeof(plan))
    y = lib.run(copy, p.x8, p.out())
    assert np.array_equal(y, (p.x8.astype(np.int64) @ p.w.astype(np.int64).T * 0.25).astype(np.float32))
    with pytest.raises(Refused, match="plan must be as tt_linear_plan or tt_lowrank_plan made it"):
        lib.run(plan, p.x8, p.out())
    assert lib.c.tt_plan_kernel(c.byref(plan)) is None and lib.c.tt_plan_kernel(None) is None


# ---- the library ----


def test_exports_and_name(lib: Library, path: Path) -> None:
    header = (INCLUDE / "tautorch.h").read_text()
    declared = set(re.findall(r"TT_API [\w *]*?(tt_\w+)\(", header))
    assert len(declared) == 15
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None and lib.c.tt_version().decode() == version[1]
    abi = re.search(r"TT_ABI_VERSION (\d+)", header)
    assert abi is not None and lib.c.tt_abi_version() == int(abi[1])
    assert os.readlink(path) == f"libtautorch.so.{abi[1]}"
    assert {name for name in declared if hasattr(lib.c, name)} == declared
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    symbols = run("nm", "-D", "--defined-only", path).split("\n")
    assert {line.split()[-1] for line in symbols if line} == declared


@pytest.mark.parametrize(("compiler", "standard"), [("cc", "c99"), ("c++", "c++11")])
def test_the_header_is_plain(tmp_path: Path, compiler: str, standard: str) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    suffix = ".c" if compiler == "cc" else ".cpp"
    source = tmp_path / f"one{suffix}"
    source.write_text('#include "tautorch.h"\nint main(void) { return tt_abi_version() - TT_ABI_VERSION; }\n')
    flags = (f"-std={standard}", "-Wall", "-Wextra", "-pedantic", "-Werror")
    run(compiler, *flags, f"-I{INCLUDE}", "-c", source, "-o", tmp_path / "one.o")


def test_an_installed_library_is_found(path: Path, tmp_path: Path) -> None:
    """pkg-config's and CMake's files name what is there."""
    prefix = tmp_path / "prefix"
    for part in ("include", "lib"):
        (prefix / part).mkdir(parents=True)
    run("cmake", "--install", HERE, "--component", "c", "--prefix", prefix)
    source = tmp_path / "one.c"
    source.write_text('#include "tautorch.h"\nint main(void) { return tt_abi_version() - TT_ABI_VERSION; }\n')
    text = (prefix / "lib/pkgconfig/tautorch.pc").read_text()
    assert "-ltautorch" in text
    if shutil.which("pkg-config"):
        env = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
        found = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "tautorch"],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        run("cc", source, *found.stdout.split(), "-o", tmp_path / "one")
        done = subprocess.run([tmp_path / "one"], env={"LD_LIBRARY_PATH": str(prefix / "lib")}, check=False)
        assert done.returncode == 0
    config = (prefix / "lib/cmake/tautorch/tautorch-targets.cmake").read_text()
    assert "tautorch::tautorch_shared" in config and "tautorch::tautorch_static" in config

"""The kernel table: order, refusals, forcing, what ran, and the threads the kernels run on."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tautorch import _C, dispatch, ops
from tautorch.dispatch import Kernel, Problem
from tautorch.testing.cases import linear_case

OP = "int8_linear"
PROBLEM = Problem(OP, "cpu", 64, 64)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_operator_has_its_rows(op: str) -> None:
    names = [k.name for k in dispatch.kernels(op) if k.device == "cpu"]
    assert {"scalar", "reference"} <= set(names)
    assert names.index("scalar") < names.index("reference") == len(names) - 1
    assert len(set(names)) == len(names)
    known = [
        n
        for n in ("amx", "avx512vnni", "avxvnni", "avx2", "neon_i8mm", "neon_dotprod", "neon", "scalar")
        if n in names
    ]
    assert known == [n for n in names if n in known], "better kernels come first"


def test_the_first_that_can_is_chosen() -> None:
    reasons = dispatch.refusals(PROBLEM)
    assert dispatch.choose(PROBLEM) == next(name for name, reason in reasons.items() if reason is None)
    assert reasons["scalar"] is None
    assert all(reason is None or "this CPU has no" in reason for reason in reasons.values())


def test_unknown_operators_are_refused() -> None:
    for fn in (dispatch.kernels, dispatch.last_used):
        with pytest.raises(ValueError, match=r"op must be one of int8_linear, .*got 'int7_linear'"):
            fn("int7_linear")


def test_force_holds_and_is_lifted() -> None:
    automatic, epoch = dispatch.choose(PROBLEM), dispatch.epoch
    with dispatch.force(OP, "scalar"):
        assert dispatch.choose(PROBLEM) == dispatch.forced(OP) == "scalar"
        assert dispatch.epoch > epoch
        with dispatch.force(OP, "reference"):
            assert dispatch.choose(PROBLEM) == "reference"
        assert dispatch.choose(PROBLEM) == "scalar"
        assert dispatch.forced("sparse_linear") is None
    assert dispatch.forced(OP) is None
    assert dispatch.choose(PROBLEM) == automatic
    dispatch.force(OP, "scalar")
    assert dispatch.choose(PROBLEM) == "scalar"
    dispatch.force(OP, None)
    assert dispatch.choose(PROBLEM) == automatic


def test_force_is_lifted_by_an_error() -> None:
    with pytest.raises(KeyError), dispatch.force(OP, "scalar"):
        raise KeyError
    assert dispatch.forced(OP) is None


def test_forcing_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"force: int8_linear has kernels .*scalar.*; got 'warp9'"):
        dispatch.force(OP, "warp9")
    assert dispatch.forced(OP) is None


def test_a_forced_kernel_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Kernel(OP, "amx", "cpu", lambda problem: "this CPU has no AMX")
    monkeypatch.setattr(dispatch, "_table", [row, *dispatch.kernels()])
    case = linear_case(OP, 2, 3, 4)
    assert case(ops.int8_linear).shape == (2, 3)  # automatic choice passes it by
    with dispatch.force(OP, "amx"):
        with pytest.raises(ValueError, match="int8_linear: kernel 'amx' is forced, but this CPU has no AMX"):
            case(ops.int8_linear)
        with pytest.raises(ValueError, match="is forced, but there is none of that name for cuda"):
            dispatch.choose(Problem(OP, "cuda", 64, 64))


def test_the_choice_never_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel for a device the answer is an error, never another device or the reference."""
    monkeypatch.setattr(dispatch, "_table", [k for k in dispatch.kernels() if k.device == "cpu"])
    with pytest.raises(ValueError, match="int8_linear: no kernel for cuda: none is built for it"):
        dispatch.choose(Problem(OP, "cuda", 64, 64))
    unable = Kernel(OP, "scalar", "cpu", lambda problem: "it is closed")
    reference = Kernel(OP, "reference", "cpu", lambda problem: None)
    monkeypatch.setattr(dispatch, "_table", [unable, reference])
    with pytest.raises(ValueError, match="int8_linear: no kernel for cpu: scalar: it is closed"):
        dispatch.choose(PROBLEM)


def test_last_used_is_what_ran() -> None:
    case = linear_case(OP, 2, 3, 4)
    for name, reason in dispatch.refusals(PROBLEM).items():
        if reason is None:
            with dispatch.force(OP, name):
                case(ops.int8_linear)
            assert dispatch.last_used(OP) == name
    case(ops.int8_linear)
    assert dispatch.last_used(OP) == dispatch.choose(PROBLEM)


def test_nothing_has_run_in_a_fresh_process() -> None:
    done = run_python("from tautorch import dispatch; print([dispatch.last_used(op) for op in dispatch.OPS])")
    assert done.stdout.strip() == str([None] * len(dispatch.OPS)), done.stderr


def test_the_environment_forces() -> None:
    code = (
        "import torch; from tautorch import dispatch, ops;"
        "ops.int8_linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int8), torch.ones(4));"
        "print(dispatch.last_used('int8_linear'), dispatch.forced('sparse_linear'))"
    )
    done = run_python(code, TAUTORCH_FORCE="int8_linear:scalar, sparse_linear:reference")
    assert done.stdout.split() == ["scalar", "reference"], done.stderr
    done = run_python(code, TAUTORCH_FORCE="int8_linear:warp9")
    assert done.returncode != 0
    assert "TAUTORCH_FORCE must be like int8_linear:scalar, with commas" in done.stderr
    assert "got 'int8_linear:warp9': force: int8_linear has kernels" in done.stderr
    done = run_python(code, TAUTORCH_FORCE="bogus")
    assert "TAUTORCH_FORCE must be like" in done.stderr and "got 'bogus'" in done.stderr


# ---- threads ----


def test_kernels_run_in_torchs_pool() -> None:
    assert dispatch.threaded
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert _C.max_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_a_torch_without_the_pool_runs_on_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    case = linear_case(OP, 131, 200, 300)
    expected = case(ops.int8_linear)
    handed: list[Any] = []
    stub = SimpleNamespace(set_thread_pool=lambda *a: handed.append(a))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.ctypes, "CDLL", lambda path: SimpleNamespace())  # torch 2.9: no such symbols
        patch.setattr(dispatch, "_C", stub)
        assert not dispatch._use_torch_threads()
    assert handed == []
    try:
        _C.set_thread_pool(0, 0)
        assert _C.max_threads() == 1
        assert torch.equal(case(ops.int8_linear), expected)
    finally:
        assert dispatch._use_torch_threads()
    assert torch.equal(case(ops.int8_linear), expected)

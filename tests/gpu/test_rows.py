"""Rows of the kernel table on CUDA: what they decline, with the reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tautorch import dispatch
from tautorch.dispatch import Kernel, Problem

from .stand_in import FACTS, OP


def test_what_the_packed_kernels_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch,
        "cuda",
        SimpleNamespace(
            driver_version=lambda: 13000,
            sparse_linear_supports=lambda *a: f"asked {a}",
            sparse_linear_choose=lambda *a: None,
            sparse_linear_bitmap=lambda rows: "bits",
            sparse_linear_kernels=lambda: ["first", "last", "float", "bitmap_8"],
            int8_conv2d_supports=lambda *a: f"asked {a}",
            sparse_conv2d_supports=lambda *a: f"asked {a}",
        ),
    )

    def why(op: str, **details: object) -> str | None:
        kernel = next(k for k in dispatch.kernels(op) if k.device == "cuda" and k.name == "cuda")
        return kernel.supports(Problem(op, "cuda", 24, 288, FACTS | details))

    patterns = "it is for patterns 2:4, unstructured and 4x1"
    assert why("sparse_linear", pattern="32x32", weight_dtype="int8") == patterns
    for pattern in ("unstructured", "4x1"):
        asked = why("sparse_linear", pattern=pattern, weight_dtype="int8", rows=40)
        assert asked == "asked ('bits', 90, 40, 24, 288, 3)"
        assert "int8 with int8" in str(why("sparse_linear", pattern=pattern, weight_dtype="float32"))
        only = {"weight_dtype": "int8", "weight_only": True}
        assert "int8 with int8" in str(why("sparse_linear", pattern=pattern, **only))
    floats = {"pattern": "2:4", "weight_dtype": "float32"}
    assert "float16 x; convert x" in str(why("sparse_linear", x_dtype=0, **floats))
    assert why("sparse_linear", x_dtype=2, **floats) == "asked ('float', 90, 1, 24, 288, 2)"
    assert why("sparse_linear", **floats) == "asked ('float', 90, 1, 24, 288, 1)"
    assert "int8 with int8" in str(why("sparse_linear", pattern="2:4", weight_dtype="int8", weight_only=True))
    assert (
        why("sparse_linear", pattern="2:4", weight_dtype="int8", rows=7)
        == "asked ('last', 90, 7, 24, 288, 3)"
    )
    assert why("sparse_linear") == patterns
    assert why("sparse_conv2d") == "it is for pattern 2:4 of 1x1 layers"  # `tautorch kernels` names none
    assert "16x16 convolutions have no GPU kernel" in str(why("sparse_conv2d", pattern="16x16", int8=True))
    assert "int8 with int8" in str(why("sparse_conv2d", pattern="2:4", int8=False))
    assert why("sparse_conv2d", pattern="2:4", int8=True, taps=9) == "asked (90, 1, 32, 24, 9)"
    assert "must not" in str(why("int8_conv2d", weight_only=True))
    assert why("int8_conv2d", groups=2, taps=9) == "asked (90, 2, 32, 24, 9)"
    monkeypatch.setattr(dispatch, "cuda", None)
    for op, details in (("sparse_linear", {"pattern": "2:4", "weight_dtype": "int8"}), ("int8_conv2d", {})):
        assert "TAUTORCH_CUDA=on" in str(why(op, **details))


def row(name: str) -> Kernel:
    return next(k for k in dispatch.kernels(OP) if k.device == "cuda" and k.name == name)


def problem(capability: int, **details: object) -> Problem:
    return Problem(OP, "cuda", 64, 64, {"capability": capability, "multiprocessors": 132, **details})


def refusal(name: str, asked: Problem) -> str:
    reason = row(name).supports(asked)
    assert reason is not None
    return reason


def test_a_cpu_build_says_how_to_get_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "cuda", None)
    assert "reinstall with TAUTORCH_CUDA=on" in refusal("cuda", problem(90))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_every_row_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "cuda", SimpleNamespace(driver_version=lambda: 13000))
    for name in ("cuda", "triton"):
        assert row(name).supports(Problem(OP, "cuda", 64, 64)) == "no CUDA device is visible"
    every = [k for k in dispatch.kernels() if k.device == "cuda"]
    assert {k.supports(Problem(k.op, "cuda", 64, 64)) for k in every} == {"no CUDA device is visible"}
    with pytest.raises(ValueError, match="int8_linear: no kernel for cuda: cuda: no CUDA device"):
        dispatch.choose(Problem(OP, "cuda", 64, 64))


def test_the_extension_declines_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers = {"version": 13000}
    ext = SimpleNamespace(
        driver_version=lambda: drivers["version"],
        int8_linear_kernels=lambda: ["weight_only_last", "last"],
        int8_linear_choose=lambda capability, count, m, *rest: (
            "last" if capability >= 80 and m < 33 else None
        ),
        int8_linear_supports=lambda name, capability, *size: f"{name}: too old" if capability < 80 else None,
    )
    monkeypatch.setattr(dispatch, "cuda", ext)
    assert row("cuda").supports(problem(90)) is None
    assert refusal("cuda", problem(75)) == "last: too old"
    assert refusal("cuda", problem(75, weight_only=True)) == "weight_only_last: too old"
    assert "32 float rows" in refusal("cuda", problem(90, weight_only=True, rows=33))
    drivers["version"] = 12080
    assert "580 or newer), this one is for 12.8" in refusal("cuda", problem(90))
    drivers["version"] = 0
    assert refusal("cuda", problem(90)) == "no CUDA driver is installed"


def test_triton_declines_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row("triton").supports(problem(80)) is None
    assert row("triton").supports(problem(103, weight_only=True)) is None
    assert "7.5" in refusal("triton", problem(75))
    assert "almost no int8" in refusal("triton", problem(103))
    assert row("triton").supports(problem(90, rows=2**31 - 256)) is None
    assert "at most 2147483392 rows" in refusal("triton", problem(90, rows=2**31 - 255))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in refusal("triton", problem(90))

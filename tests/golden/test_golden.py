"""numpy, the reference and every kernel compute the numbers whose hashes are committed."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest
import torch

from tautorch import dispatch, ops
from tautorch.reference.layouts import encode
from tautorch.reference.quantizer import quantize_rows, quantize_samples, quantize_static

from .generate import GOLDEN, STATIC_SCALE, ZERO_POINT, Golden, cases, digest, hashes

CASES = {case.name: case for case in cases()}
INTEGERS = [name for name, case in CASES.items() if "acc" in case.outputs]
WEIGHT_ONLY = [name for name, case in CASES.items() if "y" in case.outputs]
DIGITS = ("amx", "avx512vnni", "neon", "neon_dotprod", "neon_i8mm")
COMMITTED: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())


def call(case: Golden) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the functional form for the raw accumulators."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in case.inputs.items()}
    kwargs: dict[str, Any] = {**case.config, "out_dtype": torch.int32}
    if case.mode == "static":
        kwargs["x_scale"] = torch.tensor([STATIC_SCALE])
        kwargs["x_zero_point"] = torch.tensor([ZERO_POINT], dtype=torch.int32)
    x = tensors["x"]
    if "down" in tensors:
        kwargs.update(down_scale=tensors["down_scale"], up_scale=torch.ones(tensors["up"].shape[0]))
        return (x, tensors["down"], tensors["up"]), kwargs
    weight = tensors["weight"]
    scale = torch.ones(weight.shape[0])
    if "mask" not in tensors:
        return (x, weight, scale), kwargs
    layout = encode(weight, tensors["mask"], kwargs["pattern"], kwargs.get("groups", 1))
    if case.op == "sparse_linear":
        kwargs["out_features"] = weight.shape[0]
    else:
        kwargs["weight_shape"] = tuple(weight.shape)
    return (x, *layout, scale), kwargs


def test_numpy_still_agrees_with_the_committed_file() -> None:
    assert hashes() == COMMITTED


@pytest.mark.parametrize("name", INTEGERS)
def test_reference(name: str) -> None:
    case = CASES[name]
    fn = getattr(importlib.import_module(f"tautorch.reference.{case.op}"), case.op)
    args, kwargs = call(case)
    assert digest(fn(*args, **kwargs).numpy()) == COMMITTED[name]["acc"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "q" in case.outputs])
def test_quantiser(name: str) -> None:
    case = CASES[name]
    x = torch.from_numpy(case.inputs["x"])
    samples = x.dim() == 4
    if case.mode == "static":
        point = torch.tensor([ZERO_POINT], dtype=torch.int32)
        q, scale = quantize_static(x, torch.tensor([STATIC_SCALE]), point, samples=samples)
    else:
        q, scale = quantize_samples(x) if samples else quantize_rows(x)
    assert digest(q.reshape(x.shape[0], -1).numpy()) == COMMITTED[name]["q"]
    assert digest(scale.numpy()) == COMMITTED[name]["scale"]


@pytest.mark.parametrize("name", INTEGERS)
def test_kernels(name: str) -> None:
    case = CASES[name]
    args, kwargs = call(case)
    reasons = dispatch.refusals(dispatch.Problem(case.op, "cpu", 70, 131))
    assert len(reasons) > 1
    for kernel, reason in reasons.items():
        if reason is None:
            with dispatch.force(case.op, kernel):
                acc = getattr(ops, case.op)(*args, **kwargs)
                assert dispatch.last_used(case.op) == kernel
            assert digest(acc.numpy()) == COMMITTED[name]["acc"], kernel


@pytest.mark.parametrize(
    "kernel",
    [
        k
        for k, r in dispatch.refusals(dispatch.Problem("int8_linear", "cpu", 64, 263)).items()
        if r is None and k in DIGITS
    ],
)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_rows_by_digits(name: str, kernel: str) -> None:
    """Bit for bit: the digits, the integers and each rounding of their sum."""
    inputs = CASES[name].inputs
    x = torch.from_numpy(inputs["x"]).to(getattr(torch, str(CASES[name].config["dtype"])))
    assert torch.equal(x.float(), torch.from_numpy(inputs["x"]))
    weight = torch.from_numpy(inputs["weight"])
    with dispatch.force("int8_linear", kernel):
        y = torch.cat(
            [
                ops.int8_linear(
                    rows, weight, torch.ones(len(weight)), weight_only=True, out_dtype=torch.float32
                )
                for rows in x.split(2)
            ]
        )
    assert digest(y.numpy()) == COMMITTED[name]["y"]

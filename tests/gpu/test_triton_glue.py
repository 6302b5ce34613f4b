"""From the operators' CUDA paths to the Triton kernels' arguments, with stand-ins on the CPU's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Problem
from tautorch.ops import _gpu, tails
from tautorch.ops import _int8_conv2d_gpu as conv
from tautorch.ops import _lowrank_conv2d_gpu as lowrank_conv
from tautorch.ops import _lowrank_linear_gpu as lowrank
from tautorch.ops import _sparse_linear_gpu as sparse
from tautorch.ops.geometry import geometry_of
from tautorch.reference.int8_conv2d import int8_conv2d as conv_reference
from tautorch.reference.layouts import decode
from tautorch.reference.lowrank_conv2d import lowrank_conv2d as lowrank_conv_reference
from tautorch.reference.lowrank_linear import lowrank_linear as lowrank_reference
from tautorch.reference.quantizer import quantize_weight
from tautorch.reference.sparse_linear import sparse_linear as sparse_reference
from tautorch.testing.cases import Case, conv_case, linear_case


class Device:
    """What the glue asked torch.cuda for."""

    def __init__(self) -> None:
        self.waits, self.capturing = 0, False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    d = Device()

    def wait() -> None:
        assert not d.capturing, "a graph may not wait"
        d.waits += 1

    stream = SimpleNamespace(cuda_stream=7, synchronize=wait)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: d.capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: None)
    monkeypatch.setattr(_gpu, "facts", lambda index: (90, 132))
    yield d
    for op in ("lowrank_linear", "sparse_linear", "int8_conv2d", "lowrank_conv2d"):
        dispatch._last_python.pop(op, None)


# ---- lowrank_linear ---------------------------------------------------------------------------------------


@pytest.fixture
def seen(device: Device, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The reference in the kernels' place, and what it was given."""
    from tautorch.triton_kernels import lowrank_linear as kernels

    given: dict[str, Any] = {}

    def stand_in(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
        given.clear()
        given.update(rest, down=down, up=up, bias=bias)
        for t in (down, up, rest["residual"]):
            assert t is None or (t.dtype in (x.dtype, torch.int8) and t.stride(1) == 1)
        for name, factor in (("down_sums", down), ("residual_sums", rest["residual"])):
            sums = rest.pop(name)
            assert sums is None or torch.equal(sums, factor.sum(1, dtype=torch.int32))
        return lowrank_reference(x, down, up, bias, **rest)

    monkeypatch.setattr(kernels, "lowrank_linear", stand_in)
    return given


def run_lowrank(case: Case) -> Tensor:
    x, down, up, bias = case.args
    rest = dict(case.kwargs)
    scales = rest.pop("down_scale", None), rest.pop("up_scale", None)
    residual = rest.pop("residual", None), None, None, rest.pop("residual_scale", None), None
    return lowrank.run(x, down, up, bias, scales, residual, tails.Tail(**rest))


@pytest.mark.parametrize("mode", ["float", "dynamic", "static", "int8"])
@pytest.mark.parametrize("residual", [False, True])
def test_lowrank_arguments(seen: dict[str, Any], mode: str, residual: bool) -> None:
    case = linear_case("lowrank_linear", 5, 17, 33, mode=mode, rank=7)
    if residual:
        values, scale = quantize_weight(torch.randn(17, 33))
        case = case.but(residual=values, residual_scale=scale)
    assert torch.equal(run_lowrank(case), case(lowrank_reference))
    assert dispatch.last_used("lowrank_linear") == "triton"
    with_sums = mode in ("static", "int8")
    assert (seen["down_sums"] is not None) == with_sums
    assert (seen["residual_sums"] is not None) == (with_sums and residual)
    wide = torch.randn(34)[::2]
    assert torch.equal(run_lowrank(_with_bias(case, wide)), _with_bias(case, wide)(lowrank_reference))
    assert seen["bias"].is_contiguous()


def _with_bias(case: Case, bias: Tensor) -> Case:
    return Case(case.op, case.mode, case.label, case.k, (*case.args[:-1], bias), case.kwargs)


def test_lowrank_factors_take_the_dtype_of_x_once(seen: dict[str, Any], device: Device) -> None:
    case = linear_case("lowrank_linear", 5, 17, 33, mode="float", rank=7, x_dtype=torch.bfloat16)
    run_lowrank(case)
    first = seen["down"], seen["up"]
    assert first[0].dtype == first[1].dtype == torch.bfloat16 and device.waits == 2
    run_lowrank(case)
    assert seen["down"] is first[0] and seen["up"] is first[1] and device.waits == 2
    case.args[1].mul_(2)
    run_lowrank(case)
    assert torch.equal(seen["down"], first[0] * 2) and device.waits == 3


def test_nothing_is_remembered_in_a_capture(seen: dict[str, Any], device: Device) -> None:
    case = linear_case("lowrank_linear", 5, 17, 33, mode="static", rank=7)
    device.capturing = True
    run_lowrank(case)
    first = seen["down_sums"]
    run_lowrank(case)
    assert seen["down_sums"] is not first


def test_lowrank_refusals(seen: dict[str, Any]) -> None:
    case = linear_case("lowrank_linear", 5, 17, 33, mode="float", rank=7)
    x, down, up, bias = case.args
    none = (None,) * 5
    with pytest.raises(ValueError, match=r"down must be canonical on CUDA, got a pack"):
        lowrank.run(x, torch.zeros(9, dtype=torch.uint8), up, bias, (None, None), none, tails.Tail())
    sparse = torch.ones(3), torch.ones(3), torch.ones(3), None, "4x1"
    with pytest.raises(ValueError, match="triton: a 4x1 residual has no GPU kernel"):
        lowrank.run(x, down, up, bias, (None, None), sparse, tails.Tail())


def test_lowrank_row() -> None:
    row = next(k for k in dispatch.kernels("lowrank_linear") if k.name == "triton")

    def reason(capability: int, **details: object) -> str | None:
        facts = {"capability": capability, "multiprocessors": 132}
        return row.supports(Problem("lowrank_linear", "cuda", 8, 8, {**facts, **details}))

    pytest.importorskip("triton")
    assert reason(80, weight_dtype="int8") is None
    assert reason(103, weight_dtype="float32") is None
    assert "almost no int8" in str(reason(103, weight_dtype="int8"))
    assert "almost no int8" in str(reason(103, weight_dtype="float32", residual="int8"))
    assert "7.5" in str(reason(75))


# ---- sparse_linear ----------------------------------------------------------------------------------------


@pytest.fixture
def given(device: Device, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The reference in the kernel's place, and what it was given."""
    from tautorch.triton_kernels import sparse_linear as kernels

    kept: dict[str, Any] = {}

    def stand_in(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, *rest: Any, **options: Any) -> Tensor:
        kept.update(options, values=values)
        assert values.is_contiguous() and crow.is_contiguous() and col.is_contiguous()
        sums = options.pop("row_sums")
        if values.dtype == torch.int8:
            weight = decode(values, crow, col, options["pattern"], (options["out_features"], x.shape[-1]))
            assert torch.equal(sums, weight.sum(1, dtype=torch.int32))
        else:
            assert values.dtype == x.dtype
        return sparse_reference(x, values, crow, col, *rest, **options)

    monkeypatch.setattr(kernels, "sparse_linear", stand_in)
    return kept


def run_sparse(case: Case) -> Tensor:
    x, values, crow, col, scale, bias = case.args
    rest = dict(case.kwargs)
    pattern, n = rest.pop("pattern"), rest.pop("out_features")
    return sparse.run(x, (values, crow, col), scale, bias, pattern, n, tails.Tail(**rest))


@pytest.mark.parametrize("mode", ["float", "dynamic", "static", "int8", "weight_only"])
@pytest.mark.parametrize("pattern", ["16x16", "32x32", "64x64"])
def test_sparse_arguments(given: dict[str, Any], mode: str, pattern: str) -> None:
    case = linear_case("sparse_linear", 5, 70, 131, mode=mode, pattern=pattern)
    assert torch.equal(run_sparse(case), case(sparse_reference))
    assert dispatch.last_used("sparse_linear") == "triton"


def test_a_layout_is_checked_once_and_never_in_a_capture(given: dict[str, Any], device: Device) -> None:
    case = linear_case("sparse_linear", 5, 70, 131, pattern="32x32")
    device.capturing = True
    with pytest.raises(ValueError, match="call the layer once before capturing"):
        run_sparse(case)
    device.capturing = False
    run_sparse(case)
    assert device.waits == 1
    device.capturing = True
    run_sparse(case)
    device.capturing = False
    case.args[3][0] = 99  # a block column that does not exist
    with pytest.raises(ValueError, match="col_indices"):
        run_sparse(case)


def test_sparse_values_take_the_dtype_of_x_once(given: dict[str, Any]) -> None:
    case = linear_case("sparse_linear", 5, 70, 131, mode="float", pattern="32x32", x_dtype=torch.bfloat16)
    run_sparse(case)
    first = given["values"]
    run_sparse(case)
    assert first.dtype == torch.bfloat16 and given["values"] is first


@pytest.mark.parametrize("pattern", ["4x1", "unstructured", "2:4"])
def test_sparse_patterns_without_a_kernel(given: dict[str, Any], pattern: str) -> None:
    case = linear_case("sparse_linear", 5, 64, 64, pattern=pattern)
    reason = "no instruction for 2:4" if pattern == "2:4" else f"{pattern} weights are not for Triton"
    with pytest.raises(ValueError, match=reason):
        run_sparse(case)


# ---- int8_conv2d ------------------------------------------------------------------------------------------


def run_conv(case: Case) -> Tensor:
    x, weight, scale, bias = case.args
    rest = dict(case.kwargs)
    where = [rest.pop(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    geometry = geometry_of("int8_conv2d", weight.shape, *where, rest.pop("groups"))
    return conv.run(x, weight, scale, bias, geometry, tails.Tail(**rest))


@pytest.fixture
def by_reference(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from tautorch.triton_kernels import int8_conv2d as kernels

    def stand_in(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert x.dim() == 4 and weight.is_contiguous()
        sums = options.pop("row_sums")
        assert sums is None or torch.equal(sums, weight.sum((1, 2, 3), dtype=torch.int32))
        assert (sums is None) == (options["x_zero_point"] is None)
        y = conv_reference(x, weight.permute(0, 3, 1, 2), *rest, **options)
        return y.contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(kernels, "int8_conv2d", stand_in)


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (3, 7, 5)])
def test_conv_arguments(by_reference: None, mode: str, shape: tuple[int, ...]) -> None:
    case = conv_case("int8_conv2d", shape, (5, 3, 3, 3), mode=mode, stride=(2, 1), padding=1)
    y = run_conv(case)
    assert torch.equal(y, case(conv_reference)) and y.is_contiguous()
    if len(shape) == 4:
        x = case.x.contiguous(memory_format=torch.channels_last)
        assert run_conv(case.with_x(x)).is_contiguous(memory_format=torch.channels_last)


def test_conv_refusals(by_reference: None) -> None:
    with pytest.raises(ValueError, match="groups have no GPU kernel yet"):
        run_conv(conv_case("int8_conv2d", (2, 4, 7, 5), (6, 2, 3, 3), groups=2))
    with pytest.raises(ValueError, match="weight-only layer must not"):
        run_conv(conv_case("int8_conv2d", (2, 3, 7, 5), (6, 3, 3, 3), mode="weight_only"))
    case = conv_case("int8_conv2d", (1, 3, 7, 5), (6, 3, 3, 3))
    with pytest.raises(ValueError, match="at most 2147483392 rows"):
        run_conv(case.with_x(case.x.expand(2**28, 3, 7, 5)))


# ---- lowrank_conv2d ---------------------------------------------------------------------------------------


def run_lowrank_conv(case: Case) -> Tensor:
    x, down, up, bias = case.args
    rest = dict(case.kwargs)
    scales = rest.pop("down_scale", None), rest.pop("up_scale", None)
    where = [rest.pop(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    geometry = geometry_of("lowrank_conv2d", (up.shape[0], *down.shape[1:]), *where, rest.pop("groups"))
    return lowrank_conv.run(x, down, up, bias, scales, geometry, tails.Tail(**rest))


@pytest.fixture
def factors(device: Device, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The reference in the kernels' place, and the factors it was given."""
    from tautorch.triton_kernels import lowrank_conv2d as kernels

    kept: dict[str, Any] = {}

    def stand_in(x: Tensor, down: Tensor, up: Tensor, *rest: Any, **options: Any) -> Tensor:
        kept.update(down=down, up=up)
        assert x.dim() == 4 and down.is_contiguous() and up.is_contiguous() and up.dim() == 2
        assert down.dtype == up.dtype == (torch.int8 if options["down_scale"] is not None else x.dtype)
        sums = options.pop("down_sums")
        assert sums is None or torch.equal(sums, down.sum((1, 2, 3), dtype=torch.int32))
        assert (sums is None) == (options["x_zero_point"] is None)
        y = lowrank_conv_reference(x, down.permute(0, 3, 1, 2), up[:, :, None, None], *rest, **options)
        return y.contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(kernels, "lowrank_conv2d", stand_in)
    return kept


@pytest.mark.parametrize("mode", ["float", "dynamic", "static", "int8"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (3, 7, 5)])
def test_lowrank_conv_arguments(factors: dict[str, Any], mode: str, shape: tuple[int, ...]) -> None:
    case = conv_case("lowrank_conv2d", shape, (5, 3, 3, 3), mode=mode, stride=(2, 1), padding=1)
    y = run_lowrank_conv(case)
    assert torch.equal(y, case(lowrank_conv_reference)) and y.is_contiguous()
    assert dispatch.last_used("lowrank_conv2d") == "triton"
    if len(shape) == 4:
        x = case.x.contiguous(memory_format=torch.channels_last)
        assert run_lowrank_conv(case.with_x(x)).is_contiguous(memory_format=torch.channels_last)


def test_lowrank_conv_factors_take_the_dtype_of_x_once(factors: dict[str, Any], device: Device) -> None:
    case = conv_case("lowrank_conv2d", (2, 3, 7, 5), (5, 3, 3, 3), mode="float", x_dtype=torch.bfloat16)
    run_lowrank_conv(case)
    first = factors["down"]
    assert first.dtype == torch.bfloat16 and device.waits == 2
    run_lowrank_conv(case)
    assert factors["down"] is first and device.waits == 2
    case.args[2].mul_(2)
    run_lowrank_conv(case)
    assert factors["down"] is first and device.waits == 3


def test_lowrank_conv_refusals(factors: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="triton: groups have no GPU kernel yet; keep the factors as two"):
        run_lowrank_conv(conv_case("lowrank_conv2d", (2, 4, 7, 5), (6, 2, 3, 3), groups=2))
    case = conv_case("lowrank_conv2d", (1, 3, 7, 5), (6, 3, 3, 3))
    with pytest.raises(ValueError, match="at most 2147483392 rows"):
        run_lowrank_conv(case.with_x(case.x.expand(2**28, 3, 7, 5)))
    packed = torch.zeros(9, dtype=torch.uint8)
    geometry = geometry_of("lowrank_conv2d", (6, 3, 3, 3), 1, 0, 1, 1)
    with pytest.raises(ValueError, match="down must be canonical on CUDA, got a pack"):
        lowrank_conv.run(case.x, packed, case.args[2], None, (None, None), geometry, tails.Tail())


def test_lowrank_conv_row() -> None:
    row = next(k for k in dispatch.kernels("lowrank_conv2d") if k.name == "triton")
    facts = {"capability": 103, "multiprocessors": 132}
    assert row.supports(Problem("lowrank_conv2d", "cuda", 8, 8, {**facts, "int8": False})) is None
    refused = row.supports(Problem("lowrank_conv2d", "cuda", 8, 8, {**facts, "int8": True}))
    assert "almost no int8" in str(refused)


@pytest.mark.parametrize("op", ["lowrank_linear", "sparse_linear", "lowrank_conv2d"])
def test_more_rows_than_32_bits_count_are_refused(op: str) -> None:
    row = next(k for k in dispatch.kernels(op) if k.name == "triton")
    details = {"capability": 90, "multiprocessors": 132, "rows": 2**31 - 255, "pattern": "32x32"}
    assert "at most 2147483392 rows" in str(row.supports(Problem(op, "cuda", 8, 8, details)))
    assert row.supports(Problem(op, "cuda", 8, 8, {**details, "rows": 2**31 - 256})) is None


@pytest.mark.parametrize("op", ["lowrank", "block", "conv", "lowrank_conv"])
def test_the_lowest_weight_is_refused_where_sums_could_overflow(
    seen: dict[str, Any],
    given: dict[str, Any],
    by_reference: None,
    factors: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    op: str,
) -> None:
    monkeypatch.setattr(_gpu, "MAX_K_LOWEST", 20)
    case, run, name = {
        "lowrank": (linear_case("lowrank_linear", 5, 17, 33, rank=7), run_lowrank, "down"),
        "block": (linear_case("sparse_linear", 5, 70, 131, pattern="32x32"), run_sparse, "values"),
        "conv": (conv_case("int8_conv2d", (2, 3, 7, 5), (6, 3, 3, 3)), run_conv, "weight"),
        "lowrank_conv": (conv_case("lowrank_conv2d", (2, 3, 7, 5), (6, 3, 3, 3)), run_lowrank_conv, "down"),
    }[op]
    run(case)
    case.args[1].view(-1)[3] = -128
    with pytest.raises(ValueError, match=rf"{name} must be in \[-127, 127\] where K is above 20, got -128"):
        run(case)

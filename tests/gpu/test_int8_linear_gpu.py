"""int8_linear on a GPU: every row of the CUDA table forced in turn, against the reference on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import dispatch, ops
from tautorch.dispatch import Problem
from tautorch.nn import Int8Linear
from tautorch.reference.int8_linear import int8_linear as reference
from tautorch.reference.quantizer import quantize_rows
from tautorch.testing.cases import Case, conv_case, linear_case
from tautorch.testing.tolerances import assert_close

OP = "int8_linear"
ROWS = [k.name for k in dispatch.kernels(OP) if k.device == "cuda" and k.name != "reference"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]

# Around the tiles of the table (64, 128 and 256 wide, K in steps of 64, 128 and 256), primes, and K off 16.
SIZES = [
    (1, 1, 1),
    (1, 64, 256),
    (7, 17, 33),
    (16, 63, 127),
    (17, 65, 129),
    (63, 128, 64),
    (64, 127, 255),
    (65, 129, 257),
    (128, 256, 128),
    (129, 257, 384),
    (200, 500, 1000),
    (257, 131, 509),
    (300, 1024, 4096),
]


def on_gpu(case: Case) -> Case:
    def move(v: Any) -> Any:
        return v.cuda() if isinstance(v, Tensor) else v

    return replace(
        case, args=tuple(move(a) for a in case.args), kwargs={k: move(v) for k, v in case.kwargs.items()}
    )


def agree(case: Case, kernel: str) -> None:
    """The GPU's output against the reference's on the CPU: accumulators exactly, floats within the table."""
    there = on_gpu(case)
    actual, expected = there(ops.int8_linear), case(reference)
    ran = dispatch.last_used(OP)
    assert ran == kernel or (kernel == "cuda" and ran in ROWS)
    assert actual.is_contiguous()
    if expected.dtype == torch.int8 and not case.exact:
        assert (actual.cpu().int() - expected.int()).abs().max() <= 1
    else:
        kind = "float" if not case.exact else "integer"
        if case.kwargs.get("activation", "none") not in ("none", "relu"):
            kind = "activation" if case.exact else "float"
        if expected.dtype == torch.int8 and kind == "activation":  # an erf apart may round the other way
            assert (actual.cpu().int() - expected.int()).abs().max() <= 1
        else:
            assert_close(actual.cpu(), expected, magnitude=case.magnitude(reference), kind=kind, k=case.k)
    if case.exact:
        assert torch.equal(there.raw()(ops.int8_linear).cpu(), case.raw()(reference))


@pytest.fixture(params=ROWS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """A row that this device can run, forced for the test."""
    p = torch.cuda.get_device_properties(0)
    details: dict[str, object] = {
        "capability": p.major * 10 + p.minor,
        "multiprocessors": p.multi_processor_count,
    }
    row = next(k for k in dispatch.kernels(OP) if k.device == "cuda" and k.name == request.param)
    reason = row.supports(Problem(OP, "cuda", 64, 64, details))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with dispatch.force(OP, request.param):
        yield request.param


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("m,n,k", SIZES)
def test_sizes(kernel: str, mode: str, m: int, n: int, k: int) -> None:
    agree(linear_case(OP, m, n, k, mode=mode), kernel)


@pytest.mark.parametrize("x", ["lowest", "highest", "extremes"])
@pytest.mark.parametrize("w", ["lowest", "highest", "extremes"])
def test_extreme_integers(kernel: str, x: str, w: str) -> None:
    agree(linear_case(OP, 33, 65, 2048, mode="int8", x=x, w=w), kernel)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_epilogues(kernel: str, out_dtype: torch.dtype, activation: str, bias: bool) -> None:
    for mode in ("dynamic", "static"):
        case = linear_case(OP, 70, 200, 300, mode=mode, bias=bias)
        agree(case.but(activation=activation, out_dtype=out_dtype), kernel)


@pytest.mark.parametrize("zero_point", [None, -7])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_requantised_output(kernel: str, zero_point: int | None, activation: str) -> None:
    zp = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    case = linear_case(OP, 70, 203, 300, mode="int8")
    agree(case.but(activation=activation, out_scale=torch.tensor([0.05]), out_zero_point=zp), kernel)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_dtypes_and_special_values(kernel: str, x_dtype: torch.dtype) -> None:
    case = linear_case(OP, 40, 64, 200, x_dtype=x_dtype)
    x = case.x.clone()
    x[0], x[1] = 0, 2.0**-120
    x[2, 3], x[3, 199], x[4, 0] = float("nan"), float("inf"), -float("inf")
    agree(case.with_x(x), kernel)


def test_one_scale_per_row(kernel: str) -> None:
    case = linear_case(OP, 37, 64, 96, mode="int8")
    agree(case.but(x_scale=torch.rand(37) * 0.1, x_zero_point=None), kernel)


def test_any_strides(kernel: str) -> None:
    case = linear_case(OP, 24, 40, 48)
    _, weight, scale, bias = (a.cuda() for a in case.args)
    for mode in ("dynamic", "static"):
        extra = {} if mode == "dynamic" else {"x_scale": torch.tensor([0.02])}
        base = torch.randn(96, 96)
        views = (base[:24, :48], base[:48, :24].t(), base[:24, ::2], base[0, :48].expand(24, 48))
        for x in (*views, base[1:25, 3:51]):
            at = {k: v.cuda() for k, v in extra.items()}
            got = ops.int8_linear(_like(x), weight, scale, bias, **at)
            want = reference(x, *case.args[1:], **extra)
            assert_close(got.cpu(), want, magnitude=want.abs().max())


def _like(x: Tensor) -> Tensor:
    """x on the GPU with x's strides and offset, which .cuda() would straighten."""
    storage = torch.empty(0).set_(x.untyped_storage()).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def test_int8_rows_off_16_bytes(kernel: str) -> None:
    case = linear_case(OP, 9, 33, 61, mode="int8")
    wide = torch.full((9, 80), 99, dtype=torch.int8)
    wide[:, 3:64] = case.x
    there = on_gpu(case)
    raw = there.with_x(wide.cuda()[:, 3:64]).raw()
    assert torch.equal(raw(ops.int8_linear).cpu(), case.raw()(reference))


def test_weight_rows_off_16_bytes(kernel: str) -> None:
    for k, start in (
        (64, 1),
        (61, 0),
        (64, 0),
        (61, 16),
    ):  # rows start on 16 bytes, end on them, both, neither
        case = linear_case(OP, 9, 33, k, mode="int8")
        there = on_gpu(case)
        wide = torch.full((33, 80), 99, dtype=torch.int8, device="cuda")
        wide[:, start : start + k] = there.args[1]
        x = torch.full((9, 80), 99, dtype=torch.int8, device="cuda")
        x[:, :k] = there.x
        inside = replace(there, args=(x[:, :k], wide[:, start : start + k], *there.args[2:])).raw()
        assert torch.equal(inside(ops.int8_linear).cpu(), case.raw()(reference))


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (2, 3, 5, 48)])
def test_leading_shapes(kernel: str, shape: tuple[int, ...]) -> None:
    case = linear_case(OP, 4, 40, 48)
    agree(case.with_x(torch.randn(shape)), kernel)


def test_weight_edited_in_place_is_packed_anew(kernel: str) -> None:
    case = linear_case(OP, 5, 33, 61, mode="int8")  # K off 16: packed
    there = on_gpu(case)
    assert torch.equal(there.raw()(ops.int8_linear).cpu(), case.raw()(reference))
    for c in (case, there):
        c.args[1].mul_(-1)
    assert torch.equal(there.raw()(ops.int8_linear).cpu(), case.raw()(reference))


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
def test_cuda_graph(kernel: str, mode: str) -> None:
    case = linear_case(OP, 20, 100, 61, mode=mode)  # packed weight, padded output
    there = on_gpu(case)
    there(ops.int8_linear)  # warm: Triton compiles, weights are packed
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = there(ops.int8_linear)
    other = linear_case(OP, 20, 100, 61, mode=mode, seed=9).x
    there.x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    changed = case.with_x(other)
    assert_close(y.cpu(), changed(reference), magnitude=changed.magnitude(reference))


@pytest.mark.parametrize("m,n,k", [(2100, 2400, 1168), (60, 520, 4096), (250, 1000, 2064)])
def test_several_tiles_a_block_and_several_blocks_a_tile(kernel: str, m: int, n: int, k: int) -> None:
    """More tiles than multiprocessors, and so few that K is shared out; again and again in a graph."""
    x, weight = (torch.randint(-127, 128, s, dtype=torch.int8, device="cuda") for s in ((m, k), (n, k)))
    scale, bias, x_scale = (torch.rand(s, device="cuda") * 0.01 for s in (n, n, m))
    acc = x.double() @ weight.double().T
    raw = ops.int8_linear(x, weight, scale, x_scale=x_scale, out_dtype=torch.int32)
    assert torch.equal(raw.double(), acc)

    def call() -> Tensor:
        return ops.int8_linear(x, weight, scale, bias, x_scale=x_scale, out_dtype=torch.bfloat16)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for turn in (1, -1, 1):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, (((turn * acc).float() * x_scale[:, None]) * scale + bias).bfloat16())
        x.neg_()


def test_the_callers_stream_is_used(kernel: str) -> None:
    case = linear_case(OP, 64, 128, 256)
    there = on_gpu(case)
    there(ops.int8_linear)
    x = torch.zeros_like(there.x)
    late = there.x.clone()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a kernel on another stream would read zeros
        x.copy_(late)
        y = there.with_x(x)(ops.int8_linear)
    side.synchronize()
    assert_close(y.cpu(), case(reference), magnitude=case.magnitude(reference))


def test_another_device_than_the_current_one(kernel: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = linear_case(OP, 20, 64, 64)
    with torch.cuda.device(1):
        there = on_gpu(case)
    assert there.x.device.index == 1 and torch.cuda.current_device() == 0
    assert_close(there(ops.int8_linear).cpu(), case(reference), magnitude=case.magnitude(reference))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_quantisers_are_exact(dtype: torch.dtype, backend: str) -> None:
    for m, k in [(1, 1), (33, 7), (5, 1024), (5, 1025), (3, 4096), (2, 20000), (1, 66311)]:
        x = (torch.randn(m, k) * torch.logspace(-35, 4, m)[:, None]).to(dtype)
        x[0, 0] = 0.5
        want_q, want_scale = quantize_rows(x)
        got_q, got_scale = _quantise(x.cuda(), backend)
        assert torch.equal(got_q.cpu(), want_q)
        assert torch.equal(got_scale.cpu(), want_scale.reshape(-1))


def _quantise(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        kernels = pytest.importorskip("tautorch.triton_kernels._quantize_rows")
        return kernels.quantize_rows(x)  # type: ignore[no-any-return]
    if dispatch.cuda is None:
        pytest.skip("tautorch._cuda is not built")
    (m, k), wide = x.shape, -(-x.shape[1] // 16) * 16
    q = torch.empty(m, wide, dtype=torch.int8, device="cuda")
    scale = torch.empty(m, device="cuda")
    code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[x.dtype]
    stream = torch.cuda.current_stream().cuda_stream
    dispatch.cuda.quantize_rows(
        x.data_ptr(), code, k, 1, m, k, 0, 0, q.data_ptr(), wide, scale.data_ptr(), 0, stream
    )
    return q[:, :k], scale


def test_pack_block() -> None:
    if dispatch.cuda is None:
        pytest.skip("tautorch._cuda is not built")
    for n, k in [(1, 1), (5, 17), (70, 300)]:
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
        layout = dispatch.cuda.int8_linear_layout(n, k)
        packed = torch.full((layout["total"],), 99, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        dispatch.cuda.int8_linear_pack(w.data_ptr(), k, n, k, packed.data_ptr(), 0, stream)
        block = packed.cpu()
        header = block[:24].numpy().tobytes()
        assert int.from_bytes(header[:4], "little") == layout["magic"]
        assert [ctypes.c_int64.from_buffer_copy(header, o).value for o in (8, 16)] == [n, k]
        rows = block[layout["weight_off"] :][: n * layout["ldw"]].view(torch.int8).reshape(n, -1)
        assert torch.equal(rows[:, :k], w.cpu()) and not rows[:, k:].any()
        sums = block[layout["sums_off"] :][: 4 * n].view(torch.int32)
        assert torch.equal(sums, w.cpu().sum(1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m,n,k", [*SIZES, (8, 4096, 4096), (31, 1000, 14336)])
@pytest.mark.parametrize("row", ["cuda", "triton", *(r for r in ROWS if r.startswith("weight_only"))])
def test_weight_only(row: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    case = linear_case(OP, m, n, k, mode="weight_only", x_dtype=dtype)
    there = on_gpu(case)
    if row != "triton" and (dtype == torch.float32 or (row == "cuda" and m > 32)):
        with dispatch.force(OP, row), pytest.raises(ValueError, match="float"):
            there(ops.int8_linear)
        return
    with dispatch.force(OP, row):
        actual = there(ops.int8_linear)
        # The same sums in the same order, whatever else runs.
        assert torch.equal(there(ops.int8_linear), actual)
    assert str(dispatch.last_used(OP)).startswith("weight_only" if row == "cuda" else row)
    assert_close(actual.cpu(), case(reference), magnitude=case.magnitude(reference), kind="float", k=case.k)


def test_module_compiles_whole(kernel: str) -> None:
    layer = Int8Linear.from_float(torch.nn.Linear(96, 64), activation="gelu").cuda().eval()
    x = torch.randn(5, 96, device="cuda")
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), want)


@torch.no_grad()
def test_a_module_repeats_its_launch(kernel: str) -> None:
    module = Int8Linear.from_float(torch.nn.Linear(256, 128)).cuda()
    side = torch.cuda.Stream()
    for rows in (5, 16, 300):
        x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
        want = module._through_op(x)
        for _ in range(3):
            assert torch.equal(module(x), want) and dispatch.last_used(OP) in ROWS
        assert kernel == "triton" or rows in module._gpu_calls[x.dtype][10]  # the extension's are
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(2):
                assert torch.equal(module(x), want)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        y.zero_()
        graph.replay()
        assert torch.equal(y, want)
    module.weight.neg_()
    module.bias.neg_()
    assert torch.equal(module(x), -want)


def test_module_gradient() -> None:
    layer = Int8Linear.from_float(torch.nn.Linear(48, 32))
    x = torch.randn(4, 48)
    grads = []
    for device in ("cpu", "cuda"):
        here = x.to(device).detach().requires_grad_()
        layer.to(device)(here).square().sum().backward()
        assert here.grad is not None
        grads.append(here.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_scales_elsewhere_are_refused() -> None:
    case = on_gpu(linear_case(OP, 3, 32, 32, mode="static"))
    with pytest.raises(ValueError, match="x_scale must be on cuda:0 like x"):
        case.but(x_scale=torch.tensor([0.1]))(ops.int8_linear)


def test_other_operators_say_that_they_have_no_kernel() -> None:
    case = on_gpu(conv_case("int8_conv2d", (1, 8, 5, 5), (8, 4, 3, 3), groups=2))
    with pytest.raises(ValueError, match="groups have no GPU kernel"):
        case(ops.int8_conv2d)

"""The operators that Triton runs, on a GPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tautorch
from tautorch import dispatch, ops, tuning
from tautorch.nn import LowRankConv2d, LowRankLinear, SparseLinear
from tautorch.reference.int8_conv2d import int8_conv2d as conv_reference
from tautorch.reference.lowrank_conv2d import lowrank_conv2d as lowrank_conv_reference
from tautorch.reference.lowrank_linear import lowrank_linear as lowrank_reference
from tautorch.reference.quantizer import quantize_weight
from tautorch.reference.sparse_linear import sparse_linear as sparse_reference
from tautorch.testing.cases import Case, conv_case, linear_case
from tautorch.testing.tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "lowrank_linear": (ops.lowrank_linear, lowrank_reference),
    "sparse_linear": (ops.sparse_linear, sparse_reference),
}
# Around the tiles (16, 64, 128 rows; 64 and 128 columns), primes, and K off 16.
SIZES = [(1, 1, 1), (16, 63, 127), (17, 65, 129), (64, 128, 256), (129, 257, 384), (257, 131, 509)]
MODES = ["float", "dynamic", "static", "int8"]


def on_gpu(case: Case) -> Case:
    def move(v: Any) -> Any:
        return v.cuda() if isinstance(v, Tensor) else v

    args = tuple(move(a) for a in case.args)
    return replace(case, args=args, kwargs={k: move(v) for k, v in case.kwargs.items()})


def agree(case: Case) -> None:
    """Accumulators exactly, floats within the table; where x is 16 bits wide, within its rounding of h."""
    function, reference = FUNCTIONS[case.op]
    there = on_gpu(case)
    actual, expected = there(function).cpu(), case(reference)
    assert dispatch.last_used(case.op) == "triton"
    if case.exact:
        assert_close(actual, expected, magnitude=case.magnitude(reference))
        if case.kwargs.get("residual") is None:
            assert torch.equal(there.raw()(function).cpu(), case.raw()(reference))
    elif case.x.dtype == torch.float32:
        assert_close(actual, expected, magnitude=case.magnitude(reference), kind="float", k=case.k)
    else:
        error = (actual.double() - expected.double()).abs()
        size = case.magnitude(reference).double()
        assert bool((error <= 4 * torch.finfo(case.x.dtype).eps * size).all())


@pytest.fixture(params=["rule", "one launch", "measured"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[str]:
    """How lowrank_linear gets its tiles."""
    from tautorch.triton_kernels import _lowrank_tiles as tiles
    from tautorch.triton_kernels import lowrank_linear as kernels

    monkeypatch.setenv("TAUTORCH_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_found", {})
    if request.param == "one launch":

        def one(m: int, n: int, k: int, r: int, size: int, residual: bool, processors: int) -> Any:
            if residual or not tiles.fits_one_tile(r, size):
                pytest.skip("takes two launches")
            return tiles.one_launch(m, n, k, r, size, processors)

        monkeypatch.setattr(kernels, "choose", one)
    if request.param == "measured":
        with tuning.measuring():
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m,n,k", SIZES)
def test_lowrank_sizes(way: str, mode: str, m: int, n: int, k: int) -> None:
    for r in (1, 17, 64):
        dtype = torch.bfloat16 if mode == "float" else torch.float32
        agree(linear_case("lowrank_linear", m, n, k, mode=mode, rank=r, x_dtype=dtype))


@pytest.mark.parametrize("m", [1, 64, 300])
def test_lowrank_with_split_k_is_the_same_every_time(m: int) -> None:
    """Many splits, counters used again and again: the same sums in every run."""
    for mode in ("float", "dynamic"):
        there = on_gpu(linear_case("lowrank_linear", m, 96, 8192, mode=mode, rank=48, x_dtype=torch.bfloat16))
        first = there(ops.lowrank_linear)
        for _ in range(50):
            assert torch.equal(there(ops.lowrank_linear), first)


@pytest.mark.parametrize("mode", MODES)
def test_lowrank_residual(mode: str) -> None:
    values, scale = quantize_weight(torch.randn(200, 300))
    case = linear_case("lowrank_linear", 70, 200, 300, mode=mode, rank=20)
    case = case.but(residual=values, residual_scale=scale)
    there, expected = on_gpu(case)(ops.lowrank_linear).cpu(), case(lowrank_reference)
    assert_close(there, expected, magnitude=expected.abs().max() * 10, kind="float", k=case.k)


@pytest.mark.parametrize("r", [257, 1000])
def test_lowrank_ranks_beyond_a_tile(r: int) -> None:
    for mode in ("float", "dynamic"):
        agree(linear_case("lowrank_linear", 33, 70, 1100, mode=mode, rank=r))


@pytest.mark.parametrize("mode", [*MODES, "weight_only"])
@pytest.mark.parametrize("pattern", ["16x16", "32x32", "64x64"])
@pytest.mark.parametrize("m,n,k", SIZES)
def test_sparse_sizes(mode: str, pattern: str, m: int, n: int, k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        agree(linear_case("sparse_linear", m, n, k, mode=mode, pattern=pattern, x_dtype=dtype))


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize(
    "x,w,stride,padding,dilation",
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1),
        ((2, 3, 33, 31), (64, 3, 7, 7), 2, 3, 1),
        ((3, 65, 14, 15), (130, 65, 3, 3), 1, 1, 1),
        ((2, 128, 9, 8), (64, 128, 1, 1), 2, 0, 1),
        ((1, 40, 20, 17), (33, 40, 3, 2), 1, 2, 2),
    ],
)
def test_conv(mode: str, x: Any, w: Any, stride: int, padding: int, dilation: int) -> None:
    case = conv_case("int8_conv2d", x, w, mode=mode, stride=stride, padding=padding, dilation=dilation)
    with dispatch.force("int8_conv2d", "triton"):
        for memory in (torch.contiguous_format, torch.channels_last):
            here = case.with_x(case.x.contiguous(memory_format=memory))
            actual, expected = on_gpu(here)(ops.int8_conv2d).cpu(), here(conv_reference)
            assert_close(actual, expected, magnitude=here.magnitude(conv_reference))
            assert torch.equal(on_gpu(here.raw())(ops.int8_conv2d).cpu(), here.raw()(conv_reference))
            assert actual.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "x,w,rank,stride,padding,dilation",
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), 1, 1, 0, 1),
        ((2, 3, 33, 31), (64, 3, 7, 7), 17, 2, 3, 1),
        ((3, 65, 14, 15), (130, 65, 3, 3), 64, 1, 1, 1),
        ((2, 128, 9, 8), (64, 128, 1, 1), 300, 2, 0, 1),
        ((1, 512, 7, 7), (512, 512, 3, 3), 128, 1, 1, 1),
        ((1, 40, 20, 17), (33, 40, 3, 2), 9, 1, 2, 2),
    ],
)
def test_lowrank_conv(mode: str, x: Any, w: Any, rank: int, stride: int, padding: int, dilation: int) -> None:
    where = {"stride": stride, "padding": padding, "dilation": dilation}
    case = conv_case("lowrank_conv2d", x, w, mode=mode, rank=rank, **where)
    for memory in (torch.contiguous_format, torch.channels_last):
        here = case.with_x(case.x.contiguous(memory_format=memory))
        actual, expected = on_gpu(here)(ops.lowrank_conv2d).cpu(), here(lowrank_conv_reference)
        assert dispatch.last_used("lowrank_conv2d") == "triton"
        kind, size = ("integer" if case.exact else "float"), here.magnitude(lowrank_conv_reference)
        assert_close(actual, expected, magnitude=size, kind=kind, k=case.k + rank)
        assert actual.is_contiguous(memory_format=memory)
        if case.exact:
            raw = here.raw()
            assert torch.equal(on_gpu(raw)(ops.lowrank_conv2d).cpu(), raw(lowrank_conv_reference))


def test_lowrank_conv_in_a_graph_and_compiled() -> None:
    conv = torch.nn.Conv2d(40, 70, 3, padding=1)
    layer = LowRankConv2d.from_float(conv, rank=20, weight_dtype=torch.int8).cuda().eval()
    x = torch.randn(2, 40, 9, 8, device="cuda").to(memory_format=torch.channels_last)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(x)) and not torch.equal(y, first)
    here = x.detach().clone().requires_grad_()
    layer(here).square().sum().backward()
    assert here.grad is not None and torch.isfinite(here.grad).all()


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("op", list(FUNCTIONS))
def test_epilogues(op: str, out_dtype: torch.dtype, activation: str) -> None:
    function, reference = FUNCTIONS[op]
    case = linear_case(op, 70, 203, 300, pattern="32x32", rank=33).but(activation=activation)
    if out_dtype == torch.int8:
        case = case.but(out_scale=torch.tensor([0.05]), out_zero_point=torch.tensor([-7], dtype=torch.int32))
        assert (on_gpu(case)(function).cpu().int() - case(reference).int()).abs().max() <= 1
        return
    case = case.but(out_dtype=out_dtype)
    kind = "integer" if activation in ("none", "relu") else "activation"
    size = case.magnitude(reference)
    assert_close(on_gpu(case)(function).cpu(), case(reference), magnitude=size, kind=kind)


@pytest.mark.parametrize("op", list(FUNCTIONS))
@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
def test_cuda_graph(op: str, mode: str) -> None:
    function, reference = FUNCTIONS[op]
    case = linear_case(op, 20, 100, 4096, mode=mode, pattern="32x32", rank=40)
    there = on_gpu(case)
    there(function)  # compiled, checked
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = there(function)
    for seed in (9, 10):
        other = linear_case(op, 20, 100, 4096, mode=mode, pattern="32x32", rank=40, seed=seed).x
        there.x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        changed = case.with_x(other)
        kind = "float" if mode == "float" else "integer"
        assert_close(y.cpu(), changed(reference), magnitude=changed.magnitude(reference), kind=kind, k=case.k)


@pytest.mark.parametrize("op", list(FUNCTIONS))
def test_the_callers_stream_is_used(op: str) -> None:
    function, reference = FUNCTIONS[op]
    case = linear_case(op, 64, 128, 256, pattern="32x32", rank=40)
    there = on_gpu(case)
    there(function)
    x, late = torch.zeros_like(there.x), there.x.clone()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a kernel on another stream would read zeros
        x.copy_(late)
        y = there.with_x(x)(function)
    side.synchronize()
    assert_close(y.cpu(), case(reference), magnitude=case.magnitude(reference))


@pytest.mark.parametrize("kind", ["lowrank", "residual", "sparse"])
def test_modules_compile_whole_and_warm_up(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TAUTORCH_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_found", {})
    linear = torch.nn.Linear(96, 64)
    if kind == "sparse":
        layer: Any = SparseLinear.from_float(linear, pattern="32x32")
    else:
        layer = LowRankLinear.from_float(linear, rank=16, residual="int8" if kind == "residual" else None)
    layer, x = layer.cuda().eval(), torch.randn(5, 96, device="cuda")
    tautorch.warmup(layer, x)
    assert tuning.cache_file().exists()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    here = x.detach().clone().requires_grad_()
    layer(here).square().sum().backward()
    assert here.grad is not None and torch.isfinite(here.grad).all()

"""2:4 products, convolutions and the row quantiser on a GPU: every row forced, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import dispatch, ops
from tautorch.reference.int8_conv2d import int8_conv2d as conv_reference
from tautorch.reference.quantize_rows import STAGES
from tautorch.reference.quantize_rows import quantize_rows as rows_reference
from tautorch.reference.sparse_conv2d import sparse_conv2d as sparse_conv_reference
from tautorch.reference.sparse_linear import sparse_linear as sparse_reference
from tautorch.testing.cases import Case, conv_case, linear_case
from tautorch.testing.tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sparse_linear": (ops.sparse_linear, sparse_reference),
    "int8_conv2d": (ops.int8_conv2d, conv_reference),
    "sparse_conv2d": (ops.sparse_conv2d, sparse_conv_reference),
}
# Around the tiles (64 to 256 outputs, 64 and 128 rows, K in steps of 64), primes, and K off 16.
SIZES = [(1, 1, 1), (7, 17, 33), (63, 64, 127), (65, 65, 129), (128, 256, 384), (257, 131, 509)]
# Images and weights: one pixel, edges and strides, several tiles of pixels.
IMAGES: list[tuple[tuple[int, ...], tuple[int, int, int, int], dict[str, Any]]] = [
    ((1, 16, 1, 1), (1, 16, 1, 1), {}),
    ((2, 16, 9, 8), (19, 16, 3, 2), {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}),
    ((3, 48, 13, 11), (65, 48, 3, 3), {"padding": 1}),
    ((1, 64, 17, 17), (257, 64, 1, 1), {"stride": 2}),
]


def rows(op: str) -> list[str]:
    found = [k.name for k in dispatch.kernels(op) if k.device == "cuda"]
    return [name for name in found if name not in ("reference", "triton")]


def agree(case: Case, kernel: str, device: str = "cuda") -> None:
    """Sums exactly where x is int8 or quantised as the reference does; floats within the table."""

    def move(v: Any) -> Any:
        return v.to(device) if isinstance(v, Tensor) else v

    there = replace(
        case, args=tuple(move(a) for a in case.args), kwargs={k: move(v) for k, v in case.kwargs.items()}
    )
    function, reference = FUNCTIONS[case.op]
    with dispatch.force(case.op, kernel):
        raw, actual = there.raw()(function), there(function)
        ran = str(dispatch.last_used(case.op))
    assert ran == kernel or (kernel == "cuda" and ran in rows(case.op))
    assert torch.equal(raw.cpu(), case.raw()(reference))
    assert_close(actual.cpu(), case(reference), magnitude=case.magnitude(reference))


def patterns(kernel: str) -> list[str]:
    """Of int8 values."""
    single, others = ["unstructured", "4x1"], [] if "float" in kernel else ["2:4"]
    return [*others, *single] if kernel == "cuda" else single if kernel.startswith("bitmap") else others


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("m,n,k", SIZES)
@pytest.mark.parametrize("kernel", rows("sparse_linear"))
def test_int8_values(kernel: str, m: int, n: int, k: int, mode: str) -> None:
    for pattern in patterns(kernel):
        agree(linear_case("sparse_linear", m, n, k, mode=mode, pattern=pattern), kernel)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m,n,k", SIZES)
@pytest.mark.parametrize("kernel", rows("sparse_linear"))
def test_two_of_four_floats(kernel: str, m: int, n: int, k: int, x_dtype: torch.dtype) -> None:
    if kernel != "cuda" and "float" not in kernel:
        pytest.skip("a kernel of int8 values")
    case = linear_case("sparse_linear", m, n, k, mode="float", pattern="2:4", x_dtype=x_dtype)
    values = case.args[1].to(x_dtype)  # the kernels round them so
    case = replace(case, args=(case.args[0], values, *case.args[2:]))
    there = replace(case, args=tuple(a.cuda() if isinstance(a, Tensor) else a for a in case.args))
    with dispatch.force("sparse_linear", kernel):
        actual = there(ops.sparse_linear)
        assert "float" in str(dispatch.last_used("sparse_linear"))
    assert_close(actual.cpu(), case(sparse_reference), magnitude=case.magnitude(sparse_reference))


@pytest.mark.parametrize("x", ["lowest", "highest", "extremes"])
@pytest.mark.parametrize("w", ["lowest", "highest", "extremes"])
@pytest.mark.parametrize("kernel", rows("sparse_linear"))
def test_extreme_integers(kernel: str, w: str, x: str) -> None:
    for pattern in patterns(kernel):
        agree(linear_case("sparse_linear", 33, 65, 2048, mode="int8", x=x, w=w, pattern=pattern), kernel)


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 1.0])
def test_single_weights_of_any_density_in_a_graph(keep: float) -> None:
    case = linear_case("sparse_linear", 5, 300, 1000, mode="int8", pattern="unstructured", keep=keep)
    there = replace(
        case,
        args=tuple(a.cuda() if isinstance(a, Tensor) else a for a in case.args),
        kwargs={k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.raw().kwargs.items()},
    )
    there(ops.sparse_linear)  # packed
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = there(ops.sparse_linear)
    there.x.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), case.with_x(there.x.cpu()).raw()(sparse_reference))


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("image", IMAGES, ids=["pixel", "strided", "padded", "wide"])
@pytest.mark.parametrize("kernel", rows("int8_conv2d"))
def test_convolutions(kernel: str, image: tuple[Any, Any, dict[str, Any]], mode: str) -> None:
    x_shape, w_shape, more = image
    case = conv_case("int8_conv2d", x_shape, w_shape, mode=mode, **more)
    agree(case, kernel)
    agree(case.with_x(case.x.contiguous(memory_format=torch.channels_last)), kernel)


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("image", [IMAGES[0], IMAGES[3]], ids=["pixel", "wide"])
@pytest.mark.parametrize("kernel", rows("sparse_conv2d"))
def test_sparse_convolutions(kernel: str, image: tuple[Any, Any, dict[str, Any]], mode: str) -> None:
    x_shape, w_shape, more = image
    case = conv_case("sparse_conv2d", x_shape, w_shape, mode=mode, pattern="2:4", **more)
    agree(case, kernel)
    agree(case.with_x(case.x.contiguous(memory_format=torch.channels_last)), kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", STAGES)
@pytest.mark.parametrize("m,k", [(1, 8), (3, 33), (5, 1024), (7, 4104), (2, 16384), (2, 16392)])
def test_quantize_rows(after: str, dtype: torch.dtype, m: int, k: int) -> None:
    x = (torch.randn(m, k) * 3 + 0.5).to(dtype)
    case: dict[str, Any] = (
        {"weight": torch.rand(k), "bias": torch.randn(k)} if after.endswith("_norm") else {}
    )
    case |= {"gate": torch.randn(m, k).to(dtype)} if after == "silu_gate" else {}
    there = {name: t.cuda() for name, t in case.items()}
    q, scale = (t.cpu() for t in ops.quantize_rows(x.cuda(), after, **there))
    want_q, want_scale = rows_reference(x, after, **case)
    if after == "none":
        assert torch.equal(q, want_q) and torch.equal(scale, want_scale)
        return
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    apart = (q.int() - want_q.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() <= 1e-3 + 1 / k

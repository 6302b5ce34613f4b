"""From torch tensors to the CUDA extension's integers, where weights are always packed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tautorch import dispatch
from tautorch.dispatch import Kernel
from tautorch.ops import _gpu, tails
from tautorch.ops import _int8_conv2d_gpu as conv_gpu
from tautorch.ops import _sparse_conv2d_gpu as sparse_conv_gpu
from tautorch.ops import _sparse_linear_gpu as sparse
from tautorch.ops import geometry as conv
from tautorch.reference.int8_conv2d import int8_conv2d as conv_reference
from tautorch.reference.layouts import encode
from tautorch.reference.sparse_linear import sparse_linear as sparse_reference

from .stand_in import Extension


@pytest.fixture
def tables(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> Iterator[Extension]:
    """The same for the operators whose weights are always packed."""
    monkeypatch.setattr(_gpu, "facts", lambda index: (90, 132))
    rows = [
        Kernel(op, "cuda", "cuda", lambda p: None) for op in ("sparse_linear", "int8_conv2d", "sparse_conv2d")
    ]
    rows += [Kernel("sparse_linear", name, "cuda", lambda p: None) for name in ("sp_a", "bitmap_a")]
    monkeypatch.setattr(dispatch, "_table", rows)
    yield extension
    for op in ("sparse_linear", "int8_conv2d", "sparse_conv2d"):
        dispatch._last_python.pop(op, None)


@pytest.mark.parametrize("n,k", [(1, 1), (5, 17), (16, 64), (9, 100)])
def test_two_of_four(tables: Extension, monkeypatch: pytest.MonkeyPatch, n: int, k: int) -> None:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    weight.reshape(-1)[torch.arange(n * k) % k % 4 > 1] = 0
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    scale, bias = torch.rand(n), torch.randn(n)
    static = {"x_scale": torch.tensor([0.04]), "x_zero_point": torch.tensor([3], dtype=torch.int32)}
    for keywords in ({}, static, {"out_dtype": torch.bfloat16, "activation": "relu"}):
        for x in (torch.randn(3, k), torch.randn(2, 1, k), torch.randn(k, 4).t(), torch.randn(0, k)):
            got = sparse.run(x, (values, None, places), scale, bias, "2:4", n, tails.Tail(**keywords))  # type: ignore[arg-type]
            want = sparse_reference(
                x, values, None, places, scale, bias, pattern="2:4", out_features=n, **keywords
            )  # type: ignore[arg-type]
            assert torch.equal(got, want) and got.is_contiguous()
    assert tables.calls.count("pack") == 1 and tables.calls[:2] == ["pack", "synchronize"]
    assert dispatch.last_used("sparse_linear") == "sp_b"
    with dispatch.force("sparse_linear", "sp_a"):  # it reads another order of the same weight
        assert torch.equal(
            sparse.run(x, (values, None, places), scale, bias, "2:4", n, tails.Tail()), want[:0]
        )
    assert tables.calls.count("pack") == tables.calls.count("pack for wgmma") == 1
    assert dispatch.last_used("sparse_linear") == "sp_a"
    if k > 1:
        monkeypatch.setattr(_gpu, "MAX_K_LOWEST", k - 1)
        values[0, 0] = -128
        with pytest.raises(ValueError, match=r"values must be in \[-127, 127\]"):
            sparse.run(x, (values, None, places), scale, bias, "2:4", n, tails.Tail())
        values[0, 0] = 1
    with pytest.raises(ValueError, match="strictly ascending"):
        sparse.run(x, (values, None, places.clone().zero_()), scale, bias, "2:4", n, tails.Tail())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n,k", [(1, 1), (5, 17), (9, 100)])
def test_two_of_four_floats(tables: Extension, n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randint(1, 9, (n, k)).float()
    weight.reshape(-1)[torch.arange(n * k) % k % 4 > 1] = 0
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    bias = torch.randn(n)
    for keywords in ({}, {"out_dtype": torch.float32, "activation": "relu"}):
        tail = tails.Tail(**keywords)  # type: ignore[arg-type]
        for shape in ((3, k), (2, 1, k), (0, k)):
            x = torch.randint(-8, 9, shape).to(dtype)  # sums are exact
            for rows in (x, x.repeat(2, *[1] * (x.dim() - 1))[::2], x.mT.contiguous().mT):
                got = sparse.run(rows, (values, None, places), None, bias, "2:4", n, tail)
                want = sparse_reference(
                    rows, values, None, places, None, bias, pattern="2:4", out_features=n, **keywords
                )  # type: ignore[arg-type]
                assert torch.equal(got, want) and got.is_contiguous()
    assert tables.calls.count("pack") == 1 and dispatch.last_used("sparse_linear") == "sp_float"


@pytest.mark.parametrize("pattern,n,k", [("unstructured", 1, 1), ("unstructured", 18, 130), ("4x1", 33, 65)])
def test_single_weights(
    tables: Extension, monkeypatch: pytest.MonkeyPatch, pattern: str, n: int, k: int
) -> None:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    mask = (torch.rand(-(-n // 4), k) < 0.3).repeat_interleave(4, 0)[:n]
    mask = mask if pattern == "4x1" else torch.rand(n, k) < 0.3
    layout = encode(weight, mask, pattern)
    scale, bias = torch.rand(n), torch.randn(n)
    static = {"x_scale": torch.tensor([0.04]), "x_zero_point": torch.tensor([3], dtype=torch.int32)}
    for keywords in ({}, static, {"out_dtype": torch.bfloat16, "activation": "relu"}):
        tail = tails.Tail(**keywords)  # type: ignore[arg-type]
        for x in (torch.randn(3, k), torch.randn(2, 1, k), torch.randn(k, 4).t(), torch.randn(0, k)):
            got = sparse.run(x, layout, scale, bias, pattern, n, tail)
            want = sparse_reference(x, *layout, scale, bias, pattern=pattern, out_features=n, **keywords)  # type: ignore[arg-type]
            assert torch.equal(got, want) and got.is_contiguous()
    assert tables.calls.count("synchronize") == 1 and dispatch.last_used("sparse_linear") == "bitmap_a"
    if k > 1:
        layout[2][0] = k
        with pytest.raises(ValueError, match="col_indices"):
            sparse.run(x, layout, scale, bias, pattern, n, tails.Tail())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(ValueError, match="call the layer once before capturing"):
            sparse.run(x, layout, scale, bias, pattern, n, tails.Tail())


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("outputs", [1, 8, 19])
def test_convolutions(tables: Extension, mode: str, outputs: int) -> None:
    weight = torch.randint(-127, 128, (outputs, 16, 3, 2), dtype=torch.int8)
    scale, bias = torch.rand(outputs) * 1e-2, torch.randn(outputs)
    keywords: dict[str, Any] = {}
    if mode != "dynamic":
        keywords = {"x_scale": torch.tensor([0.04]), "x_zero_point": torch.tensor([3], dtype=torch.int32)}
    geometry = conv.geometry_of("int8_conv2d", weight.shape, (2, 1), 1, (1, 2), 1)
    whole = torch.randn(2, 16, 9, 8)
    inputs = [whole, whole.to(memory_format=torch.channels_last), whole[:, :, ::2], whole[0], whole[:0]]
    for x in inputs if mode != "int8" else [(v * 40).to(torch.int8) for v in inputs]:
        for extra in ({}, {"out_dtype": torch.bfloat16}, {"out_scale": torch.tensor([0.05])}):
            tail = tails.Tail(**keywords, **extra)
            got = conv_gpu.run(x, weight, scale, bias, geometry, tail)
            want = conv_reference(
                x, weight, scale, bias, stride=(2, 1), padding=1, dilation=(1, 2), **keywords, **extra
            )
            assert torch.equal(got, want)
            assert got.stride() == conv.fake_output(x, geometry, got.dtype).stride()
    assert tables.calls.count("pack") == 1
    assert dispatch.last_used("int8_conv2d") == "conv_b"


@pytest.mark.parametrize("outputs", [1, 8, 19])
def test_sparse_convolutions(tables: Extension, monkeypatch: pytest.MonkeyPatch, outputs: int) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    weight = torch.randint(-127, 128, (outputs, 16), dtype=torch.int8)
    weight[:, torch.arange(16) % 4 > 1] = 0
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    scale, bias = torch.rand(outputs) * 1e-2, torch.randn(outputs)
    geometry = conv.geometry_of("sparse_conv2d", (outputs, 16, 1, 1), (2, 1), 1, 1, 1)
    static = {"x_scale": torch.tensor([0.04]), "x_zero_point": torch.tensor([3], dtype=torch.int32)}
    whole = torch.randn(2, 16, 9, 8)
    for x in (whole, whole.to(memory_format=torch.channels_last), whole[:, :, ::2], whole[0], whole[:0]):
        for keywords in ({}, static, {"out_dtype": torch.bfloat16}):
            tail = tails.Tail(**keywords)  # type: ignore[arg-type]
            got = sparse_conv_gpu.run(x, (values, None, places), scale, bias, "2:4", geometry, tail)
            want = conv_reference(
                x, weight[:, :, None, None], scale, bias, stride=(2, 1), padding=1, **keywords
            )  # type: ignore[arg-type]
            assert torch.equal(got, want)
            assert got.stride() == conv.fake_output(x, geometry, got.dtype).stride()
    assert tables.calls.count("pack") == 1
    assert dispatch.last_used("sparse_conv2d") == "conv_b"
    with pytest.raises(ValueError, match=r"sparse_conv2d: .*strictly ascending"):
        bad = places.clone().zero_()
        sparse_conv_gpu.run(whole, (values, None, bad), scale, bias, "2:4", geometry, tails.Tail())

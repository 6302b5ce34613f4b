"""Timings of 2:4 and single-weight products, int8 convolutions and the fused row quantiser, beside peers.

Peers, in the same run: 2:4 beside our dense int8, bf16, and cuSPARSELt through torch's semi-structured
tensors (bf16 and int8); single weights beside our dense int8 and bf16; convolutions, int8 in and out, beside
cuDNN's bf16 in channels-last and the Triton kernel, 2:4 ones beside the dense int8 ones; quantize_rows beside
the same stage by torch with the plain quantiser. A peer that this torch or device does not have is left out,
and the row says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benches.gpu.measure import Calls, Case
from torch import Tensor
from torch.nn import functional as F

from tautorch import dispatch, ops
from tautorch.prune.patterns import make_mask
from tautorch.reference.layouts import encode

ROWS = (16, 64, 512, 1024, 4096)
SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336)]
BATCH = 32
DEVICE = "cuda"
# ResNet-50: input and output channels, window, stride, side of the image. Its first layer has 3 channels.
RESNET = [
    *[(64, 64, 1, 1, 56), (64, 64, 3, 1, 56), (64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (256, 128, 1, 1, 56)],
    *[
        (128, 128, 3, 2, 56),
        (256, 512, 1, 2, 56),
        (128, 512, 1, 1, 28),
        (512, 128, 1, 1, 28),
        (128, 128, 3, 1, 28),
    ],
    *[(512, 256, 1, 1, 28), (256, 256, 3, 2, 28), (512, 1024, 1, 2, 28), (256, 1024, 1, 1, 14)],
    *[(1024, 256, 1, 1, 14), (256, 256, 3, 1, 14), (1024, 512, 1, 1, 14), (512, 512, 3, 2, 14)],
    *[(1024, 2048, 1, 2, 14), (512, 2048, 1, 1, 7), (2048, 512, 1, 1, 7), (512, 512, 3, 1, 7)],
]


def peer(calls: Calls, missing: list[str], name: str, make: Callable[[], Callable[[], object]]) -> None:
    """Add a peer that runs here, else the reason why not."""
    try:
        call = make()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        calls[name] = call
    except Exception as error:  # whatever a peer raises: it is not ours
        missing.append(f"{name}: {str(error).splitlines()[0][:80]}")


def same(name: str, got: Tensor, want: Tensor) -> None:
    """The results are the float64 product's."""
    if not torch.equal(got.double(), want):
        raise RuntimeError(f"{name}: accumulators differ from the float64 product")


def forced(op: str, kernel: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with dispatch.force(op, kernel):
            return call()

    return run


def two_of_four(m: int, n: int, k: int) -> Case:
    """int8 rows by 2:4 int8, bf16 out; bf16 rows by 2:4 bf16."""
    weight = torch.randint(-127, 128, (n, k), device=DEVICE, dtype=torch.int8)
    weight[weight == 0] = 1
    weight *= make_mask(torch.rand(n, k, device=DEVICE), "2:4", 0.5)
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    x = torch.randint(-127, 128, (m, k), device=DEVICE, dtype=torch.int8)
    scale, x_scale = torch.rand(n, device=DEVICE) * 0.01, torch.rand(m, device=DEVICE) * 0.01

    def ours(dtype: torch.dtype) -> Tensor:
        return ops.sparse_linear(
            x, values, None, places, scale, pattern="2:4", out_features=n, x_scale=x_scale, out_dtype=dtype
        )

    some = torch.randperm(m, device=DEVICE)[:64]
    same(f"2:4 {m}x{n}x{k}", ours(torch.int32)[some], x[some].double() @ weight.double().T)
    floats, rows = weight.bfloat16(), torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    calls: Calls = {
        "ours": lambda: ours(torch.bfloat16),
        "int8": lambda: ops.int8_linear(x, weight, scale, x_scale=x_scale, out_dtype=torch.bfloat16),
        "bf16": lambda: F.linear(rows, floats),
    }
    missing: list[str] = []
    kept = values.bfloat16()

    def our_bf16() -> Callable[[], object]:
        def call() -> Tensor:
            return ops.sparse_linear(rows, kept, None, places, None, pattern="2:4", out_features=n)

        error = (call().double() - F.linear(rows, floats).double()).abs().max()
        if not error <= 0.01 * F.linear(rows, floats).double().abs().max():
            raise RuntimeError(f"2:4 bf16 {m}x{n}x{k}: {error} away from the dense product")
        return call

    def semi_structured() -> Callable[[], object]:
        compressed = torch.sparse.to_sparse_semi_structured(floats)
        return lambda: F.linear(rows, compressed)

    def cusparselt_int8() -> Callable[[], object]:
        compressed = torch._cslt_compress(weight)
        return lambda: torch._cslt_sparse_mm(compressed, x.t(), out_dtype=torch.bfloat16)

    calls["ours bf16"] = our_bf16()
    peer(calls, missing, "semi-structured bf16", semi_structured)
    peer(calls, missing, "cuSPARSELt int8", cusparselt_int8)
    return Case(calls, m * k + n * k * 0.625 + 2 * m * n, 2 * m * n * k, missing)


def single_weights(m: int, n: int, k: int, removed: float) -> Case:
    """int8 rows by unstructured int8, bf16 out."""
    weight = torch.randint(-127, 128, (n, k), device=DEVICE, dtype=torch.int8)
    weight *= torch.rand(n, k, device=DEVICE) >= removed
    layout = encode(weight, weight != 0, "unstructured")
    x = torch.randint(-127, 128, (m, k), device=DEVICE, dtype=torch.int8)
    scale, x_scale = torch.rand(n, device=DEVICE) * 0.01, torch.rand(m, device=DEVICE) * 0.01

    def ours(dtype: torch.dtype) -> Tensor:
        return ops.sparse_linear(
            x, *layout, scale, pattern="unstructured", out_features=n, x_scale=x_scale, out_dtype=dtype
        )

    same(f"unstructured {m}x{n}x{k}", ours(torch.int32), x.double() @ weight.double().T)
    floats, rows = weight.bfloat16(), torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    calls: Calls = {
        "ours": lambda: ours(torch.bfloat16),
        "int8": lambda: ops.int8_linear(x, weight, scale, x_scale=x_scale, out_dtype=torch.bfloat16),
        "bf16": lambda: F.linear(rows, floats),
    }
    return Case(calls, m * k + n * k / 8 + layout[0].numel() + 2 * m * n, 2 * m * layout[0].numel(), [])


def convolution(sizes: tuple[int, int, int, int, int], sparse: bool) -> Case:
    """int8 in and out, with bias and relu."""
    channels, n, window, stride, side = sizes
    geometry: dict[str, Any] = {"stride": stride, "padding": window // 2}
    x = torch.randint(-127, 128, (BATCH, channels, side, side), device=DEVICE, dtype=torch.int8)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (n, channels, window, window), device=DEVICE, dtype=torch.int8)
    if sparse:
        mask = make_mask(torch.rand(n, channels, device=DEVICE), "2:4", 0.5)
        weight *= mask.reshape(weight.shape)
    scale, bias = torch.rand(n, device=DEVICE) * 1e-3, torch.randn(n, device=DEVICE)
    one = {"x_scale": torch.tensor([0.02], device=DEVICE)}
    small = {**one, "activation": "relu", "out_scale": torch.tensor([0.05], device=DEVICE)}

    def dense(**keywords: Any) -> Tensor:
        return ops.int8_conv2d(x, weight, scale, bias, **geometry, **keywords)

    def two_of_four(**keywords: Any) -> Tensor:
        return ops.sparse_conv2d(
            x, values, None, places, scale, bias, pattern="2:4", weight_shape=tuple(weight.shape), **geometry,
            **keywords,
        )  # fmt: skip

    ours = two_of_four if sparse else dense
    if sparse:
        flat = weight.reshape(n, -1)
        values, _, places = encode(flat, flat != 0, "2:4")
        assert places is not None
    want = F.conv2d(x[:2].double(), weight.double(), **geometry)
    same(f"convolution {sizes}", ours(**one, out_dtype=torch.int32)[:2], want)
    out = want.shape[2] * want.shape[3]
    float_x = torch.randn(x.shape, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    float_w = weight.bfloat16().to(memory_format=torch.channels_last)
    float_b = bias.bfloat16()
    calls: Calls = {"ours": lambda: ours(**small)}
    calls["bf16"] = lambda: F.conv2d(float_x, float_w, float_b, **geometry).relu_()
    missing: list[str] = []
    if sparse:
        calls["int8"] = lambda: dense(**small)
    else:
        peer(calls, missing, "triton", lambda: forced("int8_conv2d", "triton", calls["ours"]))
    operations = 2 * BATCH * out * n * weight[0].numel()
    return Case(calls, x.numel() + weight.numel() + BATCH * out * n, operations, missing)


def quantiser(m: int, k: int, after: str) -> Case:
    """bf16 rows through a stage to int8."""
    x, gate = (torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(k, device=DEVICE, dtype=torch.bfloat16)
    by_torch: dict[str, Callable[[], Tensor]] = {
        "rms_norm": lambda: F.rms_norm(x, (k,), weight, 1e-5),
        "layer_norm": lambda: F.layer_norm(x, (k,), weight, None, 1e-5),
        "silu_gate": lambda: F.silu(gate) * x,
        "gelu": lambda: F.gelu(x),
    }
    given = {"weight": weight} if after.endswith("_norm") else {"gate": gate} if after == "silu_gate" else {}
    calls: Calls = {
        "ours": lambda: ops.quantize_rows(x, after, **given),  # type: ignore[arg-type]
        "torch, then ours": lambda: ops.quantize_rows(by_torch[after]()),
        "torch alone": by_torch[after],
    }
    q, scale = ops.quantize_rows(x, after, **given)  # type: ignore[arg-type]
    want = by_torch[after]().float()
    error = ((q.float() * scale[:, None] - want).norm() / want.norm()).item()
    if not error < 0.02:
        raise RuntimeError(f"quantize_rows {after}: {error} away from torch")
    return Case(calls, m * k * (5 if after == "silu_gate" else 3), 0, [])


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and what makes each."""
    for m in ROWS:
        for n, k in SHAPES:
            yield f"sparse_linear int8 {m}x{n}x{k} 2:4", lambda m=m, n=n, k=k: two_of_four(m, n, k)  # type: ignore[misc]
    for m in (1, 8, 32):
        for n, k in SHAPES:
            for removed in (0.5, 0.8, 0.9):
                name = f"sparse_linear int8 {m}x{n}x{k} unstructured {removed:.0%}"
                yield name, lambda m=m, n=n, k=k, r=removed: single_weights(m, n, k, r)  # type: ignore[misc]
    for sizes in RESNET:
        name = "{}->{} {}x{} /{} {}".format(*sizes[:3], sizes[2], *sizes[3:])
        yield f"int8_conv2d int8 {name}", lambda s=sizes: convolution(s, False)  # type: ignore[misc]
        if sizes[2] == 1:
            yield f"sparse_conv2d int8 {name} 2:4", lambda s=sizes: convolution(s, True)  # type: ignore[misc]
    for after, k in (("rms_norm", 4096), ("layer_norm", 1024), ("silu_gate", 14336), ("gelu", 4096)):
        for m in (16, 4096):
            yield f"quantize_rows {after} {m}x{k}", lambda m=m, k=k, a=after: quantiser(m, k, a)  # type: ignore[misc]

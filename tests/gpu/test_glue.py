"""From torch tensors to the CUDA extension's integers, with an extension that works on the CPU's memory.

The stand-in reads and writes through the addresses and strides it is given, and nothing else, so a wrong
stride, offset, padding or lifetime shows as a wrong number.
"""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.dispatch import Kernel, Problem
from tautorch.ops import _gpu
from tautorch.ops import _int8_conv2d_gpu as conv_gpu
from tautorch.ops import _int8_linear_gpu as gpu
from tautorch.ops import _sparse_conv2d_gpu as sparse_conv_gpu
from tautorch.ops import _sparse_linear_gpu as sparse
from tautorch.ops import geometry as conv
from tautorch.ops import library as lib
from tautorch.ops.quantize_rows import _cuda as quantize_gpu
from tautorch.reference import quantize_rows as rows_reference
from tautorch.reference.int8_conv2d import int8_conv2d as conv_reference
from tautorch.reference.int8_linear import int8_linear as reference
from tautorch.reference.layouts import decode, encode
from tautorch.reference.quantizer import MAX_K_LOWEST
from tautorch.reference.sparse_linear import sparse_linear as sparse_reference
from tautorch.testing.cases import Case, linear_case
from tautorch.testing.tolerances import assert_close

OP = "int8_linear"
FACTS: dict[str, object] = {"capability": 90, "multiprocessors": 132}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32)


def view(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The memory at an address as a tensor that shares it."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    buffer = (ctypes.c_uint8 * (span * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


def up(n: int, to: int) -> int:
    return -(-n // to) * to


class Extension:
    """``tautorch._cuda`` in plain torch, on addresses of the CPU; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.layouts: list[tuple[int, int]] = []
        self.kept: list[Tensor] = []

    def int8_linear_kernels(self) -> list[str]:
        return ["tile_a", "tile_b"]

    def int8_linear_layout(self, n: int, k: int) -> dict[str, int]:
        ldw = up(k, 16)
        sums = 128 + up(n * ldw, 128)
        return {"ldw": ldw, "weight_off": 128, "sums_off": sums, "total": sums + up(4 * n, 128)}

    def int8_linear_pack(self, weight: int, stride: int, n: int, k: int, packed: int, *_: int) -> None:
        self.calls.append("pack")
        layout = self.int8_linear_layout(n, k)
        rows = view(packed + layout["weight_off"], torch.int8, (n, layout["ldw"]), (layout["ldw"], 1))
        rows.zero_()[:, :k] = view(weight, torch.int8, (n, k), (stride, 1))
        self.int8_linear_sums(weight, stride, n, k, packed + layout["sums_off"])

    def int8_linear_sums(self, weight: int, stride: int, n: int, k: int, sums: int, *_: int) -> None:
        self.calls.append("sums")
        view(sums, torch.int32, (n,), (1,)).copy_(view(weight, torch.int8, (n, k), (stride, 1)).sum(1))

    def int8_linear_plan(self, *arguments: Any) -> bytes:
        return pickle.dumps(arguments)

    MAX_HELD = 512

    def quantize_rows(self, x: int, code: int, sm: int, sk: int, m: int, k: int, *rest: int) -> None:
        self.calls.append("quantize_rows")
        self._quantise(view(x, DTYPES[code], (m, k), (sm, sk)), *rest)

    def quantize_rows_after(self, x: int, code: int, stride: int, m: int, k: int, *rest: Any) -> None:
        self.calls.append("quantize_rows_after")
        stage, weight, bias, gate, gate_stride, eps, *rest = rest
        width = 16 // DTYPES[code].itemsize
        assert k % width == stride % width == gate_stride % width == 0 and k <= self.MAX_HELD
        assert all(p % 16 == 0 for p in (x, weight, bias, gate)) and stride >= k
        vectors = [view(p, torch.float32, (k,), (1,)) if p else None for p in (weight, bias)]
        gates = view(gate, DTYPES[code], (m, k), (gate_stride, 1)) if gate else None
        name = {number: name for name, number in rows_reference.STAGES.items()}[stage]
        rows = view(x, DTYPES[code], (m, k), (stride, 1))
        self._quantise(rows_reference.stage(rows, name, *vectors, gates, eps), *rest)

    def _quantise(self, rows: Tensor, x_scale: int, zero_point: int, q: int, ldq: int, *rest: int) -> None:
        scale, device, stream = rest
        assert (device, stream, ldq % 16) == (-1, 7, 0)
        static = view(x_scale, torch.float32, (1,), (1,)) if x_scale else None
        zero = view(zero_point, torch.int32, (1,), (1,)) if zero_point else None
        got_q, got_scale = rows_reference.quantize_rows(rows, x_scale=static, x_zero_point=zero)
        view(q, torch.int8, tuple(rows.shape), (ldq, 1)).copy_(got_q)
        view(scale, torch.float32, (rows.shape[0],), (1,)).copy_(got_scale)

    def int8_linear_supports(self, name: str, *_: Any) -> str | None:
        return None

    def int8_linear_workspace(
        self,
        plan: bytes,
        kernel: int,
        x: int,
        code: int,
        m: int,
        stride_m: int,
        stride_k: int,
        y_code: int,
        device: int,
    ) -> int:
        _, _, _, _, k, tail = pickle.loads(plan)
        weight_only = tail["mode"] == lib.NONE
        assert (code != 3 and not weight_only) or (stride_k == 1 and stride_m >= k), (
            "rows are copied by pitch"
        )
        if code == 3 and stride_k == 1 and stride_m % 16 == 0 and x % 16 == 0:
            return 0
        return up(m * up(k, 16), 128) + up(4 * m, 128)

    def int8_linear_run(self, plan: bytes, kernel: int, x: int, x_code: int, m: int, *rest: int) -> int:
        stride_m, stride_k, y_code, device, y, ldy, _, stream = rest
        assert (device, stream) == (-1, 7)
        weight, ldw, sums, n, k, tail = pickle.loads(plan)
        assert ldw % 16 == 0 and weight % 16 == 0 and ldy * DTYPES[y_code].itemsize % 16 == 0 and ldy >= n
        self.calls.append("run")

        def value(name: str, dtype: torch.dtype, count: int = 1) -> Tensor | None:
            return view(tail[name], dtype, (count,), (1,)).clone() if tail[name] else None

        w = view(weight, torch.int8, (n, up(k, 16)), (ldw, 1))
        assert not w[:, k:].any()
        zero_point = value("x_zero_point", torch.int32)
        if zero_point is not None:
            assert torch.equal(view(sums, torch.int32, (n,), (1,)), w.sum(1, dtype=torch.int32))
        if m:
            out = reference(
                view(x, DTYPES[x_code], (m, k), (stride_m, stride_k)),
                w[:, :k].contiguous(),
                view(tail["weight_scale"], torch.float32, (n,), (1,)),
                value("bias", torch.float32, n),
                x_scale=value("x_scale", torch.float32, tail["x_scales"] or 1),
                x_zero_point=zero_point,
                activation=("none", "relu", "gelu", "gelu_tanh", "silu")[tail["activation"]],
                weight_only=tail["mode"] == lib.NONE,
                out_scale=value("out_scale", torch.float32),
                out_zero_point=value("out_zero_point", torch.int32),
                out_dtype=DTYPES[y_code],
            )
            view(y, DTYPES[y_code], (m, ldy), (ldy, 1))[:, :n] = out
        return 1 if kernel < 0 else kernel

    # 2:4: the pack is the dense weight and the sums of its rows.

    def sparse_linear_kernels(self) -> list[str]:
        return ["sp_a", "sp_b", "sp_float"]

    def sparse_linear_choose(self, *problem: int) -> str:
        return "sp_b" if problem[-1] == 3 else "sp_float"

    def sparse_linear_order(self, name: str) -> int:
        return {"sp_a": 1, "sp_b": 0, "sp_float": 2}[name]

    def sparse_linear_layout(self, n: int, k: int, order: int = 0) -> dict[str, int]:
        size = 2 if order == 2 else 1
        return {"sums_off": up(n * k * size, 128), "total": up(n * k * size, 128) + 4 * n}

    def sparse_linear_pack(
        self, values: int, places: int, n: int, kept: int, packed: int, order: int, *_: int
    ) -> None:
        self.calls.append("pack for wgmma" if order == 1 else "pack")
        if order == 2:  # as it comes: all 16 bits are carried
            halves = view(values, torch.int16, (n, kept), (kept, 1)).float()
            dense = decode(
                halves, None, view(places, torch.uint8, (n, kept // 4), (kept // 4, 1)), "2:4", (n, 2 * kept)
            )
            view(packed, torch.int16, (n, 2 * kept), (2 * kept, 1)).copy_(dense)
            return
        layout = (
            view(values, torch.int8, (n, kept), (kept, 1)),
            view(places, torch.uint8, (n, kept // 4), (kept // 4, 1)),
        )
        dense = decode(layout[0], None, layout[1], "2:4", (n, 2 * kept))
        view(packed, torch.int8, (n, 2 * kept), (2 * kept, 1)).copy_(dense)
        sums = packed + self.sparse_linear_layout(n, 2 * kept)["sums_off"]
        view(sums, torch.int32, (n,), (1,)).copy_(dense.sum(1))

    def sparse_linear_plan(self, packed: int, n: int, k: int, order: int, tail: dict[str, int]) -> bytes:
        padded = up(k, 8)
        assert (order == 2) == (tail["mode"] == lib.NONE)
        if order == 2:
            return pickle.dumps((packed, padded, n, k, tail))
        sums = packed + self.sparse_linear_layout(n, padded)["sums_off"]
        dense = torch.zeros(n * up(k, 16) + 16, dtype=torch.int8)
        dense = dense[-dense.data_ptr() % 16 :][: n * up(k, 16)].view(n, -1)
        dense[:, :k] = view(packed, torch.int8, (n, padded), (padded, 1))[:, :k]
        self.kept.append(dense)
        return pickle.dumps((dense.data_ptr(), dense.shape[1], sums, n, k, tail))

    def sparse_linear_workspace(self, *arguments: Any) -> int:
        if len(pickle.loads(arguments[0])) == 5:  # float values: x as it is, or a copy
            assert arguments[6] == 1 or arguments[1] == 1
            return 2 * arguments[4] * up(arguments[5], 16) + 256
        return self.int8_linear_workspace(*arguments)

    def sparse_linear_run(self, *arguments: Any) -> int:
        if len(held := pickle.loads(arguments[0])) == 5:
            return self._float_product(held, *arguments[1:])
        return self.int8_linear_run(*arguments)

    def _float_product(
        self, held: tuple[Any, ...], kernel: int, x: int, x_code: int, m: int, *rest: int
    ) -> int:
        stride_m, stride_k, y_code, device, y, ldy, _, stream = rest
        packed, padded, n, k, tail = held
        assert (device, stream) == (-1, 7) and (stride_k == 1 or k == 1) and (m < 2 or stride_m >= k)
        if m == 0:
            return 2 if kernel < 0 else kernel
        rows = view(x, DTYPES[x_code], (m, k), (stride_m, stride_k)).double()
        weight = view(packed, DTYPES[x_code], (n, k), (padded, 1)).double()
        out = rows @ weight.T
        if tail["bias"]:
            out += view(tail["bias"], torch.float32, (n,), (1,))
        view(y, DTYPES[y_code], (m, ldy), (ldy, 1))[:, :n] = out.relu() if tail["activation"] == 1 else out
        return 2 if kernel < 0 else kernel

    # The same for pixels: a 1x1 convolution of the dense weight.

    def sparse_conv2d_kernels(self) -> list[str]:
        return ["conv_a", "conv_b"]

    def sparse_conv2d_workspace(self, *arguments: int) -> int:
        return self.int8_conv2d_workspace(*arguments)

    def sparse_conv2d_plan(self, *arguments: Any) -> bytes:
        return self.int8_conv2d_plan(*arguments)

    def sparse_conv2d_run(self, *arguments: Any) -> int:
        return self.int8_conv2d_run(*arguments)

    # Convolution: the pack is the weight with channels last, and the sums of its rows.

    def int8_conv2d_kernels(self) -> list[str]:
        return ["conv_a", "conv_b"]

    def int8_conv2d_layout(self, outputs: int, k: int) -> dict[str, int]:
        return self.sparse_linear_layout(outputs, k)

    def int8_conv2d_pack(self, weight: int, outputs: int, k: int, packed: int, *_: int) -> None:
        self.calls.append("pack")
        rows = view(weight, torch.int8, (outputs, k), (k, 1))
        view(packed, torch.int8, (outputs, k), (k, 1)).copy_(rows)

    def int8_conv2d_plan(self, *arguments: Any) -> bytes:
        return pickle.dumps(arguments)

    def int8_conv2d_workspace(self, batch: int, sample: int) -> int:
        return up(batch * up(sample, 16), 128) + up(4 * batch, 128) + 128

    def int8_conv2d_run(self, plan: bytes, kernel: int, x: int, x_code: int, *rest: int) -> int:
        batch, height, width, y, ldy, y_code, _, device, stream = rest
        assert (device, stream) == (-1, 7)
        packed, n, (channels, kh, kw, sh, sw, ph, pw, dh, dw), tail = pickle.loads(plan)
        self.calls.append("run")

        def value(name: str, dtype: torch.dtype, count: int = 1) -> Tensor | None:
            return view(tail[name], dtype, (count,), (1,)).clone() if tail[name] else None

        if batch == 0:
            return 1 if kernel < 0 else kernel
        sample = height * width * channels
        pixels = view(
            x, DTYPES[x_code], (batch, height, width, channels), (sample, width * channels, channels, 1)
        )
        k = kh * kw * channels
        weight = view(packed, torch.int8, (n, kh, kw, channels), (k, kw * channels, channels, 1))
        out = conv_reference(
            pixels.permute(0, 3, 1, 2),
            weight.permute(0, 3, 1, 2),
            view(tail["weight_scale"], torch.float32, (n,), (1,)),
            value("bias", torch.float32, n),
            stride=(sh, sw),
            padding=(ph, pw),
            dilation=(dh, dw),
            x_scale=value("x_scale", torch.float32, tail["x_scales"] or 1),
            x_zero_point=value("x_zero_point", torch.int32),
            activation=("none", "relu", "gelu", "gelu_tanh", "silu")[tail["activation"]],
            out_scale=value("out_scale", torch.float32),
            out_zero_point=value("out_zero_point", torch.int32),
            out_dtype=DTYPES[y_code],
        ).permute(0, 2, 3, 1)
        oh, ow = out.shape[1:3]
        view(y, DTYPES[y_code], (batch, oh, ow, ldy), (oh * ow * ldy, ow * ldy, ldy, 1))[..., :n] = out
        return 1 if kernel < 0 else kernel


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Extension]:
    ext = Extension()
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: ext.calls.append("synchronize"))
    monkeypatch.setattr(dispatch, "cuda", ext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: None)
    monkeypatch.setattr(gpu, "_facts", lambda index: (90, 132))
    rows = [Kernel(OP, name, "cuda", lambda p: None) for name in ("cuda", "tile_a", "tile_b")]
    monkeypatch.setattr(dispatch, "_table", rows)
    yield ext
    dispatch._last_python.pop(OP, None)


def call(case: Case) -> Tensor:
    """The GPU path on CPU tensors."""
    x, weight, scale, bias = case.args
    return gpu.run(x, weight, scale, bias, lib.Tail(**case.kwargs))


def check(case: Case) -> None:
    actual, expected = call(case), case(reference)
    assert actual.is_contiguous() and actual.shape == expected.shape
    assert_close(actual, expected, magnitude=case.magnitude(reference))


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8", "weight_only"])
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (3, 16, 16), (5, 17, 33), (4, 8, 64), (2, 130, 100)])
def test_sizes(extension: Extension, mode: str, m: int, n: int, k: int) -> None:
    case = linear_case(OP, m, n, k, mode=mode)
    check(case)
    if mode != "weight_only":
        check(case.raw())
    check(case.but(out_dtype=torch.bfloat16, activation="gelu"))
    check(case.but(out_scale=torch.tensor([0.05]), out_zero_point=torch.tensor([3], dtype=torch.int32)))


def test_strides_reach_the_kernel(extension: Extension) -> None:
    case = linear_case(OP, 24, 40, 48)
    base = torch.randn(96, 96)
    views = (base[:24, :48], base[:48, :24].t(), base[:24, ::2], base[0, :48].expand(24, 48))
    for x in (*views, torch.randn(2, 3, 4, 48), torch.randn(48), torch.randn(0, 48), base[:1, :48]):
        check(case.with_x(x))
    q = linear_case(OP, 24, 40, 48, mode="int8")
    wide = torch.randint(-128, 128, (48, 96), dtype=torch.int8)
    floats = linear_case(OP, 24, 40, 48, mode="weight_only")
    for x in (*views, torch.randn(0, 48)):
        check(floats.with_x(x))
    for x in (wide[:24, 1:49], wide[:, :24].t(), wide[0, :48].expand(24, 48), wide[:1, :48]):
        check(q.with_x(x))


def test_aligned_weights_are_read_where_they_are(extension: Extension) -> None:
    case = linear_case(OP, 4, 8, 64)
    check(case)
    assert extension.calls == ["run"]


@pytest.mark.parametrize(
    "width,start,k", [(112, 0, 100), (112, 0, 96), (112, 16, 96), (80, 1, 64), (80, 0, 61)]
)
def test_views_of_weights_are_padded_with_zeros(extension: Extension, width: int, start: int, k: int) -> None:
    for mode in ("int8", "static", "weight_only"):
        case = linear_case(OP, 4, 8, k, mode=mode)
        wide = torch.full((8, width), 99, dtype=torch.int8)
        wide[:, start : start + k] = case.args[1]
        extension.calls.clear()
        check(replace(case, args=(case.x, wide[:, start : start + k], *case.args[2:])))
        assert ("pack" in extension.calls) == (k % 16 != 0 or start % 16 != 0)
    overlapping = torch.randint(-127, 128, (64,), dtype=torch.int8).expand(8, 64)
    check(replace(case, args=(torch.randn(4, 64), overlapping, *case.args[2:])))


def test_one_int8_row_is_not_read_past_its_end(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    workspace = extension.int8_linear_workspace
    monkeypatch.setattr(
        extension, "int8_linear_workspace", lambda *a: asked.append(workspace(*a)) or workspace(*a)
    )
    for k in (33, 48):
        check(linear_case(OP, 1, 8, k, mode="int8"))
    assert asked[0] > 0 and asked[1] == 0


@pytest.mark.parametrize("value", [-128, -127])
def test_the_lowest_weight_is_refused_where_sums_could_overflow(
    extension: Extension, monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    k = MAX_K_LOWEST + 15  # 65808: a multiple of 16
    case = linear_case(OP, 1, 2, k, mode="static")
    case.args[1][1, 7] = value
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with pytest.raises(ValueError, match="call the layer once before capturing"):
        call(case)
    capturing[0] = False
    if value == -127:
        call(case)
        capturing[0] = True
        call(case)
        return
    with pytest.raises(ValueError, match=r"weight must be in \[-127, 127\] where K is above 65793"):
        call(case)
    floats = linear_case(OP, 1, 2, k, mode="weight_only")
    floats.args[1][1, 7] = value
    call(floats)


def test_a_pack_that_a_capture_reads_is_kept(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "_captured", {})
    cache, weight = lib.PackCache(), torch.zeros(3)
    pack = _gpu.once(cache, weight, lambda: torch.ones(2))
    alive = weakref.ref(pack)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _gpu.once(cache, weight, lambda: torch.zeros(2)) is pack
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weight.add_(1)
    assert _gpu.once(cache, weight, lambda: torch.zeros(2)) is not pack
    del pack
    assert alive() is not None


def test_sums_and_packs_are_made_once_and_waited_for(extension: Extension) -> None:
    static = linear_case(OP, 4, 8, 64, mode="static")
    check(static)
    check(static)
    assert extension.calls == ["sums", "synchronize", "run", "run"]
    extension.calls.clear()
    odd = linear_case(OP, 4, 8, 61)
    check(odd)
    check(odd)
    assert extension.calls == ["pack", "sums", "synchronize", "run", "run"]
    odd.args[1].mul_(-1)
    extension.calls.clear()
    check(odd)
    assert extension.calls == ["pack", "sums", "synchronize", "run"]


def test_nothing_made_in_a_capture_is_kept(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    case = linear_case(OP, 4, 8, 61)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check(case)
    check(case)
    assert extension.calls == ["pack", "sums", "run"] * 2, "a graph may not wait, and its pack is its own"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check(case)
    extension.calls.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check(case)
    assert extension.calls == ["run"], "what an earlier call made is used"


def test_what_ran_is_noted(extension: Extension) -> None:
    case = linear_case(OP, 4, 8, 64)
    check(case)
    assert dispatch.last_used(OP) == "tile_b"
    with dispatch.force(OP, "tile_a"):
        check(case)
    assert dispatch.last_used(OP) == "tile_a"


def test_packs_of_the_cpu_and_strangers_are_refused(extension: Extension) -> None:
    case = linear_case(OP, 4, 8, 64)
    with pytest.raises(ValueError, match=r"weight must be int8 .* got a pack"):
        gpu.run(case.x, torch.zeros(9, dtype=torch.uint8), *case.args[2:], lib.Tail())
    elsewhere = torch.zeros(1, device="meta")
    with pytest.raises(ValueError, match="x_scale must be on cpu like x, got meta"):
        call(case.but(x_scale=elsewhere))
    assert not extension.calls


def test_a_measured_kernel_is_used(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    """tuning decides among the table's kernels; what it kept of another version, or cannot run, does not."""
    asked: list[Any] = []
    kept: list[Any] = [["tile_a"]]

    def choose(x: Tensor, key: Any, rule: Any, candidates: Any, parse: Any, run: Any) -> Any:
        asked.append((key, [c.name for c in candidates()], rule().name))
        assert torch.equal(run(rule()), run(parse(["tile_b"])))
        return parse(*kept)

    monkeypatch.setattr(gpu.tuning, "choose", choose)
    case = linear_case(OP, 20, 8, 64)
    check(case)
    key = (OP, 32, 8, 64, torch.float32, torch.float32)
    assert asked == [(key, ["tile_a", "tile_b"], None)] and dispatch.last_used(OP) == "tile_a"
    kept[:] = [[None]]
    check(case)
    assert dispatch.last_used(OP) == "tile_b"
    kept[:] = [["tile_a"]]
    monkeypatch.setattr(extension, "int8_linear_supports", lambda *a: "too many rows", raising=False)
    check(case)
    assert dispatch.last_used(OP) == "tile_b"
    kept[:] = [["gone"]]
    with pytest.raises(ValueError, match="gone"):  # tuning takes that for no choice
        call(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", rows_reference.STAGES)
def test_quantize_rows(extension: Extension, after: str, dtype: torch.dtype) -> None:
    """Every shape and stride gives what the reference gives; the fused kernel gets what it can take."""
    whole = torch.randn(6, 80).to(dtype)
    odd = torch.randn(7, 600).to(dtype)
    inputs = [whole, whole[:, :64], whole[:, 8:40], whole[1], whole.reshape(2, 3, 80), whole[::2], whole[:0]]
    inputs += [whole[:, 1:41], whole.t()[:, :4].t(), odd[:, :33], odd, whole[:1].expand(5, 80)]
    for x in inputs:
        k = x.shape[-1]
        norm, gate = after.endswith("_norm"), torch.randn(x.shape).to(dtype)
        case: dict[str, Any] = {"weight": torch.rand(k + 1)[1:].to(dtype), "eps": 1e-6} if norm else {}
        case |= {"gate": gate} if after == "silu_gate" else {}
        case |= {"x_scale": torch.tensor([0.03])} if k == 64 else {}
        got = quantize_gpu(x, after, **case)
        want = rows_reference.quantize_rows(x, after, **case)
        assert all(g.is_contiguous() and g.shape == w.shape for g, w in zip(got, want, strict=True))
        # torch's own functions round by the alignment of what they are given.
        torch.testing.assert_close(got[0].int(), want[0].int(), rtol=0, atol=0 if after == "none" else 1)
        torch.testing.assert_close(got[1], want[1], rtol=0 if after == "none" else 2e-6, atol=0)
    fused = extension.calls.count("quantize_rows_after")
    assert fused == (0 if after == "none" else 9)
    assert fused + extension.calls.count("quantize_rows") == len(inputs) - 1  # no rows, no launch


# ---- 2:4, convolutions ------------------------------------------------------------------------------------


@pytest.fixture
def tables(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> Iterator[Extension]:
    """The same for the operators whose weights are always packed."""
    monkeypatch.setattr(_gpu, "facts", lambda index: (90, 132))
    rows = [
        Kernel(op, "cuda", "cuda", lambda p: None) for op in ("sparse_linear", "int8_conv2d", "sparse_conv2d")
    ]
    rows.append(Kernel("sparse_linear", "sp_a", "cuda", lambda p: None))
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
            got = sparse.run(x, (values, None, places), scale, bias, "2:4", n, lib.Tail(**keywords))  # type: ignore[arg-type]
            want = sparse_reference(
                x, values, None, places, scale, bias, pattern="2:4", out_features=n, **keywords
            )  # type: ignore[arg-type]
            assert torch.equal(got, want) and got.is_contiguous()
    assert tables.calls.count("pack") == 1 and tables.calls[:2] == ["pack", "synchronize"]
    assert dispatch.last_used("sparse_linear") == "sp_b"
    with dispatch.force("sparse_linear", "sp_a"):  # it reads another order of the same weight
        assert torch.equal(sparse.run(x, (values, None, places), scale, bias, "2:4", n, lib.Tail()), want[:0])
    assert tables.calls.count("pack") == tables.calls.count("pack for wgmma") == 1
    assert dispatch.last_used("sparse_linear") == "sp_a"
    if k > 1:
        monkeypatch.setattr(_gpu, "MAX_K_LOWEST", k - 1)
        values[0, 0] = -128
        with pytest.raises(ValueError, match=r"values must be in \[-127, 127\]"):
            sparse.run(x, (values, None, places), scale, bias, "2:4", n, lib.Tail())
        values[0, 0] = 1
    with pytest.raises(ValueError, match="strictly ascending"):
        sparse.run(x, (values, None, places.clone().zero_()), scale, bias, "2:4", n, lib.Tail())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n,k", [(1, 1), (5, 17), (9, 100)])
def test_two_of_four_floats(tables: Extension, n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randint(1, 9, (n, k)).float()
    weight.reshape(-1)[torch.arange(n * k) % k % 4 > 1] = 0
    values, _, places = encode(weight, weight != 0, "2:4")
    assert places is not None
    bias = torch.randn(n)
    for keywords in ({}, {"out_dtype": torch.float32, "activation": "relu"}):
        tail = lib.Tail(**keywords)  # type: ignore[arg-type]
        for shape in ((3, k), (2, 1, k), (0, k)):
            x = torch.randint(-8, 9, shape).to(dtype)  # sums are exact
            for rows in (x, x.repeat(2, *[1] * (x.dim() - 1))[::2], x.mT.contiguous().mT):
                got = sparse.run(rows, (values, None, places), None, bias, "2:4", n, tail)
                want = sparse_reference(
                    rows, values, None, places, None, bias, pattern="2:4", out_features=n, **keywords
                )  # type: ignore[arg-type]
                assert torch.equal(got, want) and got.is_contiguous()
    assert tables.calls.count("pack") == 1 and dispatch.last_used("sparse_linear") == "sp_float"


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
            tail = lib.Tail(**keywords, **extra)
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
            tail = lib.Tail(**keywords)  # type: ignore[arg-type]
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
        sparse_conv_gpu.run(whole, (values, None, bad), scale, bias, "2:4", geometry, lib.Tail())


def test_what_the_packed_kernels_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch,
        "cuda",
        SimpleNamespace(
            driver_version=lambda: 13000,
            sparse_linear_supports=lambda *a: f"asked {a}",
            sparse_linear_choose=lambda *a: None,
            sparse_linear_kernels=lambda: ["first", "last", "float"],
            int8_conv2d_supports=lambda *a: f"asked {a}",
            sparse_conv2d_supports=lambda *a: f"asked {a}",
        ),
    )

    def why(op: str, **details: object) -> str | None:
        kernel = next(k for k in dispatch.kernels(op) if k.device == "cuda" and k.name == "cuda")
        return kernel.supports(Problem(op, "cuda", 24, 288, FACTS | details))

    assert why("sparse_linear", pattern="32x32", weight_dtype="int8") == "it is for pattern 2:4"
    floats = {"pattern": "2:4", "weight_dtype": "float32"}
    assert "float16 x; convert x" in str(why("sparse_linear", x_dtype=0, **floats))
    assert why("sparse_linear", x_dtype=2, **floats) == "asked ('float', 90, 1, 24, 288, 2)"
    assert why("sparse_linear", **floats) == "asked ('float', 90, 1, 24, 288, 1)"
    assert "int8 with int8" in str(why("sparse_linear", pattern="2:4", weight_dtype="int8", weight_only=True))
    assert (
        why("sparse_linear", pattern="2:4", weight_dtype="int8", rows=7)
        == "asked ('last', 90, 7, 24, 288, 3)"
    )
    assert "16x16 convolutions have no GPU kernel" in str(why("sparse_conv2d", pattern="16x16", int8=True))
    assert "int8 with int8" in str(why("sparse_conv2d", pattern="2:4", int8=False))
    assert why("sparse_conv2d", pattern="2:4", int8=True, taps=9) == "asked (90, 1, 32, 24, 9)"
    assert "must not" in str(why("int8_conv2d", weight_only=True))
    assert why("int8_conv2d", groups=2, taps=9) == "asked (90, 2, 32, 24, 9)"
    monkeypatch.setattr(dispatch, "cuda", None)
    for op, details in (("sparse_linear", {"pattern": "2:4", "weight_dtype": "int8"}), ("int8_conv2d", {})):
        assert "TAUTORCH_CUDA=on" in str(why(op, **details))


# ---- rows of the kernel table -----------------------------------------------------------------------------


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

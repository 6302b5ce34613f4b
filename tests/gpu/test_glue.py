"""From torch tensors to the CUDA extension's integers: int8_linear and the row quantiser."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.ops import _gpu, caches, tails
from tautorch.ops import _int8_linear_gpu as gpu
from tautorch.ops.quantize_rows import _cuda as quantize_gpu
from tautorch.reference import quantize_rows as rows_reference
from tautorch.reference.int8_linear import int8_linear as reference
from tautorch.reference.quantizer import MAX_K_LOWEST
from tautorch.testing.cases import Case, linear_case
from tautorch.testing.tolerances import assert_close

from .stand_in import OP, Extension


def call(case: Case) -> Tensor:
    """The GPU path on CPU tensors."""
    x, weight, scale, bias = case.args
    return gpu.run(x, weight, scale, bias, tails.Tail(**case.kwargs))


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
    cache, weight = caches.PackCache(), torch.zeros(3)
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
        gpu.run(case.x, torch.zeros(9, dtype=torch.uint8), *case.args[2:], tails.Tail())
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


def test_every_operator_has_a_kernel_on_cuda() -> None:
    """Those of backward graphs too; without one, a gradient fails on a device alone."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("tautorch::")]
    here = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")}
    assert {"tautorch::int8_linear", "tautorch::float_conv2d_weight"} <= here
    there = {n for n in here if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")}
    assert here - there == set()

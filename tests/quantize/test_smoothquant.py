"""SmoothQuant: what absorbs the scales, that nothing moves in float, and what int8 gains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautorch
from tautorch.nn import Int8Linear
from tautorch.quantize import InputScale, Smoothed, smooth

WIDTH = 32


class OwnNorm(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    """One matrix for query, key and value, or three; fused or spelt out; heads of values shared or not."""

    def __init__(self, packed: bool, fused: bool, kv_heads: int = 4) -> None:
        super().__init__()
        self.packed, self.fused, self.kv = packed, fused, kv_heads
        if packed:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q = nn.Linear(WIDTH, WIDTH)
            self.k, self.v = nn.Linear(WIDTH, 8 * kv_heads), nn.Linear(WIDTH, 8 * kv_heads)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.packed:
            q, k, v = self.qkv(x).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        else:
            q = self.q(x).view(b, t, 4, 8).transpose(1, 2)
            k, v = (f(x).view(b, t, self.kv, 8).transpose(1, 2) for f in (self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != 4)
        else:
            k, v = (z.repeat_interleave(4 // self.kv, dim=1) for z in (k, v))
            y = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, norm: type[nn.Module], gated: bool) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.LayerNorm(WIDTH)
        self.norm2 = OwnNorm() if norm is OwnNorm else norm(WIDTH)
        self.attention, self.gated = attention, gated
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        hidden = F.silu(self.gate(y)) * self.up(y) if self.gated else F.gelu(self.up(y))
        return x + self.down(hidden)


def outliers(model: nn.Module) -> None:
    """Every weight moved off its initial value; three channels of each norm 120 times the others."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        for name in ("norm1", "norm2"):
            getattr(model, name).weight[[3, 11, 20]] *= 120


def int8(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return tautorch.convert(model, dict.fromkeys(names, Int8Linear.from_float))


CASES = [
    (True, True, 4, nn.RMSNorm, True),
    (True, False, 4, nn.LayerNorm, False),
    (False, True, 4, OwnNorm, True),
    (False, True, 2, nn.RMSNorm, False),
    (False, False, 2, OwnNorm, True),
]


@pytest.mark.parametrize(("packed", "fused", "kv", "norm", "gated"), CASES)
def test_a_block_computes_the_same_and_quantises_better(
    packed: bool, fused: bool, kv: int, norm: type[nn.Module], gated: bool
) -> None:
    model = Block(Attention(packed, fused, kv), norm, gated)
    outliers(model)
    before = copy.deepcopy(model).double()
    batches = [torch.randn(2, 6, WIDTH) for _ in range(4)]
    report: list[Smoothed] = []
    assert smooth(model, batches, report=report) is model
    into = {name: part.into for part in report for name in part.layers}
    readers = ["attention.qkv"] if packed else ["attention.q", "attention.k", "attention.v"]
    assert all(into[name] == "norm1" for name in readers)
    assert into["attention.out"] == ("attention.qkv" if packed else "attention.v")
    assert into["up"] == "norm2"
    assert into["down"] == ("up" if gated else None)
    with torch.no_grad():
        x = torch.randn(3, 5, WIDTH)
        exact = before(x.double())
        moved = float((model(x).double() - exact).norm() / exact.norm())
        assert moved < 2e-6
        wide = float((copy.deepcopy(model).double()(x.double()) - exact).norm() / exact.norm())
        assert wide < 2e-7  # what is left is the rounding of the scaled weights
        naive = float((int8(before.float())(x).double() - exact).norm() / exact.norm())
        smoothed = float((int8(model)(x).double() - exact).norm() / exact.norm())
    assert smoothed < 0.7 * naive


def test_scales_by_hand() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    outer = copy.deepcopy(model)
    x = torch.randn(50, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0])
    smooth(model, [x[:25], x[25:]], alpha=0.7)
    with torch.no_grad():
        normed = outer[0](x).abs().amax(0).double().numpy()
        hidden = torch.relu(outer[1](outer[0](x))).amax(0).double().numpy()
    w1, w2 = (outer[i].weight.detach().double().numpy() for i in (1, 3))
    s2 = hidden**0.7 / np.abs(w2).max(axis=0) ** 0.3
    w1 = w1 / s2[:, None]  # the rows go first
    s1 = normed**0.7 / np.abs(w1).max(axis=0) ** 0.3
    np.testing.assert_allclose(model[0].weight.detach().numpy(), 1 / s1, rtol=1e-5)
    np.testing.assert_allclose(model[1].weight.detach().numpy(), w1 * s1, rtol=1e-5)
    np.testing.assert_allclose(model[1].bias.detach(), outer[1].bias.detach().numpy() / s2, rtol=1e-5)
    np.testing.assert_allclose(model[3].weight.detach().numpy(), w2 * s2, rtol=1e-5)


class PostNorm(nn.Module):
    """The norm's output is a residual too: nothing can take the scales of `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return self.out(self.norm2(y + self.fc(y)))


def test_a_multiplication_where_nothing_absorbs(tmp_path: Any) -> None:
    model = PostNorm()
    outliers(model)
    before = copy.deepcopy(model)
    x = torch.randn(64, WIDTH)
    skipped: list[Smoothed] = []
    smooth(copy.deepcopy(model), [x], layers=["fc"], explicit=False, report=skipped)
    assert skipped == []
    report: list[Smoothed] = []
    smooth(model, [x], report=report)
    assert [(part.layers, part.into) for part in report] == [(("out",), "norm2"), (("fc",), None)]
    assert isinstance(model.fc, nn.Sequential)
    assert isinstance(model.fc.scale, InputScale)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
    small = int8(model)
    assert isinstance(small.fc.layer, Int8Linear)
    exact = before(x)
    assert (small(x) - exact).norm() < 0.5 * (int8(before)(x) - exact).norm()
    tautorch.save(small, tmp_path / "m.safetensors")
    again = tautorch.load(tmp_path / "m.safetensors", PostNorm)
    assert torch.equal(again(x), small(x))


class Tricky(nn.Module):
    """Readers that refuse; `kind` says which."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "twice":
            return self.b(torch.relu(self.a(torch.relu(self.a(x)))))
        if self.kind == "tied":
            return self.b(torch.relu(self.a(x))) + F.linear(x, self.a.weight)
        y = torch.relu(self.a(x))
        if self.kind == "output":
            return self.b(y), y
        if self.kind == "in place":
            y[:, 0] = 1.0
        if self.kind == "sum":
            return self.b(y) + y.sum(-1, keepdim=True)
        if self.kind == "condition" and y.max() > 1e9:
            return y
        if self.kind == "square":
            y = y * y
        if self.kind == "data":
            y = y + y.data.exp()
        if self.kind == "type":
            return self.b(y) + y.type(torch.float64).exp()
        if self.kind == "gelu":
            y = F.gelu(y)
        if self.kind == "mixed":  # one column would need two scales
            y = torch.cat([y[:, :4], y[:, :4]]).roll(1, 0)
            y = torch.stack([y[: len(x)], y[: len(x)].flip(-1)]).repeat(1, 1, 2)
        return self.b(y)


@pytest.mark.parametrize(
    "kind",
    ["twice", "tied", "output", "in place", "sum", "condition", "square", "gelu", "mixed", "data", "type"],
)
def test_other_readers_refuse(kind: str) -> None:
    model = Tricky(kind)
    state = copy.deepcopy(model.state_dict())
    report: list[Smoothed] = []
    x = [torch.randn(16, 8)]
    smooth(model, x, layers=["b"], explicit=False, report=report)
    assert report == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


class Branches(nn.Module):
    """What a run does depends on the batch; `kind` says what the other way does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm, self.fc = kind, nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if x.sum() < 0:
            return y.exp() if self.kind == "reads" else self.fc(y).exp()
        return self.fc(y)


@pytest.mark.parametrize(("kind", "absorbed"), [("reads", False), ("passes", True), ("skips", True)])
def test_every_way_through_the_model_counts(kind: str, absorbed: bool) -> None:
    model = Branches(kind)
    if kind == "skips":  # a norm that is not read there at all
        model.forward = lambda x: x if x.sum() < 0 else model.fc(model.norm(x))  # type: ignore[method-assign]
    before = copy.deepcopy(model.norm.weight)
    report: list[Smoothed] = []
    first = torch.rand(9, 8)
    smooth(model, [first, first * 2, -first, first * 3], explicit=False, report=report)
    assert [part.into for part in report] == (["norm"] if absorbed else [])
    assert torch.equal(before, model.norm.weight) is not absorbed


def test_alpha_is_chosen_by_the_error_and_none_of_them_may_win() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16))
    plain = copy.deepcopy(model)
    x = torch.randn(128, WIDTH)
    report: list[Smoothed] = []
    with torch.no_grad():
        model[0].weight[5] = 60.0
        model[1].weight[:, 5] *= 10
    smooth(model, [x], alpha=[0.0, 0.05], report=report)  # both make the outlier larger
    assert report[0].alpha is None
    assert torch.equal(model[1].weight, plain[1].weight * (1 + 9 * (torch.arange(WIDTH) == 5)))
    with torch.no_grad():
        model[1].weight[:, 5] /= 10
    errors = {}
    for alpha in (0.25, 0.5, 0.75):
        one: list[Smoothed] = []
        smooth(copy.deepcopy(model), [x], alpha=alpha, report=one)
        errors[alpha] = one[0].error_after
    smooth(model, [x], alpha=[0.25, 0.5, 0.75], report=report)
    assert report[1].alpha == min(errors, key=lambda a: errors[a])
    assert report[1].error_after < 0.3 * report[1].error_before


@dataclass
class Out:
    logits: Tensor
    hidden: Tensor


class Returns(nn.Module):
    """A policy that returns its logits, some of which a mask took away, beside what its head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Out:
        hidden = self.norm(x)
        return Out(self.head(hidden).masked_fill(x[:, :8] < 0, float("-inf")), hidden)


def test_what_an_object_returns_stays_and_masked_logits_are_no_error() -> None:
    model = Returns().eval()
    with torch.no_grad():
        model.norm.weight[::8] *= 50
        x = torch.randn(16, WIDTH)
        expected, report = model(x), list[Smoothed]()
        smooth(model, [x], report=report)
        found = model(x)
    assert [(entry.layers, entry.into) for entry in report] == [(("head",), None)]
    assert report[0].alpha is not None  # it was smoothed, by a multiplication of its own
    torch.testing.assert_close(found.hidden, expected.hidden)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-3)


def test_dead_channels_keep_scale_one() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = 0.0
        model[1].weight[:, 5] = 0.0
    before = copy.deepcopy(model)
    smooth(model, [torch.randn(9, 8)])
    assert torch.equal(model[1].weight[:, 2], before[1].weight[:, 2])
    assert model[0].weight[5] == before[0].weight[5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": []}, r"alpha must be in \[0, 1\]"),
        ({"alpha": "0.5"}, r"alpha must be in \[0, 1\], got '0.5'"),
        ({"alpha": None}, r"alpha must be in \[0, 1\], got None"),
        ({"quant": "int4"}, "quant must be dynamic or static"),
        ({"layers": ["head"]}, "must name layers of the model, got 'head'"),
        ({"batches": []}, "at least one batch"),
        ({"batches": [torch.full((2, 8), torch.inf)]}, "must give finite inputs, got NaN or Inf at layer"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    state = copy.deepcopy(model.state_dict())
    arguments: dict[str, Any] = {"batches": [torch.randn(2, 8)]} | options
    with pytest.raises(ValueError, match=message):
        smooth(model, **arguments)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_moves_the_output_is_taken_back() -> None:
    class Counting(nn.Module):
        """Another computation at every call."""

        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return self.fc(self.norm(x)) * Counting.calls

    model = Counting()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="because the output moved by"):
        smooth(model, [torch.randn(4, 8)])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("alias", [lambda t: t.detach(), lambda t: t.data], ids=["detach", "data"])
def test_a_buffer_that_is_a_weight_does_not_take_the_change_back(alias: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)).eval()
    with torch.no_grad():
        model[0].weight[:4] *= 50
    model.register_buffer("kept", alias(model[1].weight))
    x = torch.randn(64, 32)
    want = model(x).detach()
    smooth(model, [x])
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)

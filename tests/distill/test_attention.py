"""Attention: every way of computing it gives the weights of the formula, and the losses are the papers'."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.distill import AttentionTransfer, Distiller, SoftTarget, SpatialAttention
from tautorch.distill.attention_maps import AttentionMaps

Array = np.ndarray[Any, np.dtype[np.float64]]


def softmax(scores: Array) -> Array:
    """Of scores with -inf; a row of nothing else is all 0."""
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total: Array = e.sum(-1, keepdims=True)
    return np.divide(e, total, out=np.zeros_like(e), where=total > 0)


class Sdpa(nn.Module):
    """Attention with a query and key projection each, and any arguments of the fused function."""

    def __init__(self, heads: int = 2, width: int = 8, kv_heads: int | None = None, **options: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.options = heads, kv_heads or heads, options
        size = width // heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, size * self.kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, k, **self.options)
        return out.transpose(1, 2).flatten(2)

    def by_hand(self, x: Tensor) -> Array:
        q, k = (layer(x).detach().double().numpy() for layer in (self.q, self.k))
        size = q.shape[-1] // self.heads
        q = q.reshape(*q.shape[:2], self.heads, size).transpose(0, 2, 1, 3)
        k = k.reshape(*k.shape[:2], self.kv_heads, size).transpose(0, 2, 1, 3)
        k = np.repeat(k, self.heads // self.kv_heads, axis=1)
        scores = np.einsum("bhld,bhsd->bhls", q, k) * self.options.get("scale", 1 / math.sqrt(size))
        mask = self.options.get("attn_mask")
        if self.options.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = np.where(mask.numpy(), scores, -np.inf)
        elif mask is not None:
            scores = scores + mask.double().numpy()
        return softmax(scores)


class ByHand(Sdpa):
    """The same, written out with a softmax."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k))
        return (self.how(q @ k.transpose(-2, -1) / 2.0) @ k).transpose(1, 2).flatten(2)


def maps_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    model = nn.ModuleDict({"it": module})
    maps = AttentionMaps("test", [("it", "it")])
    with maps.watching(model, model):
        run()
        student, _ = maps.take()[0]
    assert not module._forward_hooks
    return student.exp()


BOOL_MASK = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) > 0.4
BOOL_MASK[2] = False
MODULES: dict[str, Callable[[], Sdpa]] = {
    "plain": Sdpa,
    "causal": lambda: Sdpa(is_causal=True),
    "mask": lambda: Sdpa(attn_mask=BOOL_MASK),
    "bias": lambda: Sdpa(attn_mask=torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(2))),
    "minus_inf": lambda: Sdpa(attn_mask=torch.zeros(5, 5).masked_fill(~BOOL_MASK, -math.inf)),
    "scale": lambda: Sdpa(scale=0.7),
    "dropout": lambda: Sdpa(dropout_p=0.5),
    "grouped": lambda: Sdpa(4, kv_heads=2, enable_gqa=True),
    "F.softmax": lambda: ByHand(lambda scores: F.softmax(scores, dim=-1)),
    "torch.softmax": lambda: ByHand(lambda scores: torch.softmax(scores, 3)),
    "method": lambda: ByHand(lambda scores: scores.softmax(dim=-1)),
    "module": lambda: ByHand(nn.Softmax(-1)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]().to(dtype)
    if (
        isinstance(module.options.get("attn_mask"), Tensor)
        and module.options["attn_mask"].is_floating_point()
    ):
        module.options["attn_mask"] = module.options["attn_mask"].to(dtype)
    x = torch.randn(3, 5, 8, dtype=dtype)
    torch.manual_seed(0)
    alone = module(x)
    seen: list[Tensor] = []
    torch.manual_seed(0)
    weights = maps_of(module, lambda: seen.append(module(x)))
    assert torch.equal(seen[0], alone), "watching changes nothing"
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    np.testing.assert_allclose(weights.detach().double().numpy(), module.by_hand(x), atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(training: bool, need_weights: bool, padding: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=batch_first).train(training)
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    options: dict[str, Any] = {"key_padding_mask": mask} if padding else {}
    call = (x if batch_first else x.transpose(0, 1),) * 3
    expected = module.eval()(*call, average_attn_weights=False, **options)[1]
    module.train(training)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            weights = maps_of(module, lambda: module(*call, need_weights=need_weights, **options))
        assert weights.shape == (3, 2, 5, 5)
        torch.testing.assert_close(weights, expected)
        assert weights.requires_grad == grad


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_in_its_fast_path_and_with_nested_tensors() -> None:
    """In eval mode torch runs whole encoder layers, and packs padded batches, in C++."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    maps = AttentionMaps("test", [("layers.0.self_attn", "layers.1.self_attn")])
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), maps.watching(encoder, encoder):
        out = encoder(x, src_key_padding_mask=padding)
        first, second = (m.exp() for m in maps.take()[0])
    assert torch.backends.mha.get_fastpath_enabled()
    attention = encoder.layers[0].self_attn
    expected = attention(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    torch.testing.assert_close(first, expected)
    assert not torch.equal(first, second)
    assert float(second[1, :, :, 3:].max()) == 0.0
    # The nested path leaves 0 where padding was; elsewhere the outputs agree.
    with torch.no_grad():
        torch.testing.assert_close(out[~padding], encoder(x, src_key_padding_mask=padding)[~padding])


def test_gradients_of_the_student_are_those_of_the_formula() -> None:
    student = nn.ModuleDict({"a": Sdpa(is_causal=True)}).double()
    teacher = nn.ModuleDict({"b": Sdpa(4, kv_heads=2, enable_gqa=True, is_causal=True)}).double()
    loss = AttentionTransfer({"a": "b"})
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with loss.attached(teacher, student):
        student["a"](x), teacher["b"](x)
        found = loss(None, None, None)
    p, q = (m.by_hand(x).mean(1) for m in (teacher["b"], student["a"]))
    kl = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1).mean()
    assert found.item() == pytest.approx(float(kl), rel=1e-12)
    found.backward()
    weight, epsilon = student["a"].q.weight, 1e-6
    numeric = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 2] += sign * epsilon
        q = student["a"].by_hand(x).mean(1)
        numeric.append(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0))
        with torch.no_grad():
            weight[1, 2] -= sign * epsilon
    slope = (numeric[0].sum(-1).mean() - numeric[1].sum(-1).mean()) / (2 * epsilon)
    assert weight.grad is not None
    assert float(weight.grad[1, 2]) == pytest.approx(slope, rel=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_rows_that_attend_to_nothing_count_for_nothing() -> None:
    student, teacher = (nn.ModuleDict({"a": Sdpa(attn_mask=BOOL_MASK)}).double() for _ in range(2))
    loss = AttentionTransfer([("a", "a")], heads="each", weight=2.0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with loss.attached(teacher, student):
        student["a"](x), teacher["a"](x)
        found = loss(None, None, None)
    p, q = teacher["a"].by_hand(x), student["a"].by_hand(x)
    ratio = np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1))
    expected = 2.0 * (p * ratio).sum() / (3 * 2 * 4)
    assert found.item() == pytest.approx(float(expected), rel=1e-12)
    found.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)


def test_mse_of_the_maps() -> None:
    student, teacher = (nn.ModuleDict({"a": Sdpa()}).double() for _ in range(2))
    base = SoftTarget(2.0, 0.0)
    loss = AttentionTransfer({"a": "a"}, distance="mse", heads="each", base=base, weight=3.0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with loss.attached(teacher, student):
        s, t = student["a"](x), teacher["a"](x)
        found = loss(s, t, None)
    expected = 3.0 * ((student["a"].by_hand(x) - teacher["a"].by_hand(x)) ** 2).mean()
    assert found.item() == pytest.approx(expected + base(s, t, None).item(), rel=1e-12)


class Classifier(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, heads, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x).mean(1))


def test_a_distiller_trains_with_it() -> None:
    teacher, student = Classifier(4).eval(), Classifier(2)
    with torch.no_grad():
        teacher.layer.self_attn.in_proj_weight.mul_(4.0)
    loss = AttentionTransfer({"layer.self_attn": "layer.self_attn"})
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    data = [(torch.randn(8, 5, 8), None) for _ in range(2)]
    history = Distiller(teacher, student, loss, optimizer, progress=False).fit(data, 20)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def spatial_by_hand(student: Array, teacher: Array) -> float:
    a, b = (np.square(f).sum(1).reshape(len(f), -1) for f in (student, teacher))
    a, b = (q / np.linalg.norm(q, axis=1, keepdims=True) for q in (a, b))
    return float(np.square(a - b).sum(1).mean() / 2)


def test_spatial_attention(rng: np.random.Generator) -> None:
    student, teacher = rng.standard_normal((4, 3, 6, 4)), rng.standard_normal((4, 7, 12, 8))
    models = [nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()}) for _ in range(2)]
    loss = SpatialAttention([("a", "a"), ("b", "b")], weight=5.0)
    small = rng.standard_normal((4, 7, 6, 4))
    with loss.attached(models[1], models[0]):
        models[0]["a"](torch.from_numpy(student)), models[1]["a"](torch.from_numpy(small))
        models[0]["b"](torch.from_numpy(student)), models[1]["b"](torch.from_numpy(teacher))
        found = loss(None, None, None)
    # The larger map is averaged over blocks of 2 x 2.
    pooled = np.square(teacher).sum(1).reshape(4, 6, 2, 4, 2).mean((2, 4))
    expected = 5.0 * (spatial_by_hand(student, small) + spatial_by_hand(student, np.sqrt(pooled)[:, None]))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def run(loss: Any, student: nn.Module, teacher: nn.Module, s: Tensor, t: Tensor) -> None:
    models = [nn.ModuleDict({"a": m}) for m in (student, teacher)]
    with loss.attached(models[1], models[0]):
        student(s), teacher(t)
        loss(None, None, None)


def test_bad_input_is_named() -> None:
    x, pair = torch.randn(3, 5, 8), {"a": "a"}
    with pytest.raises(ValueError, match='distance must be "kl" or "mse"'):
        AttentionTransfer(pair, distance="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='heads must be "mean" or "each"'):
        AttentionTransfer(pair, heads="all")  # type: ignore[arg-type]
    for wrong in ({}, "a", ["a"], [("a", 1)], None):
        with pytest.raises(ValueError, match=r"layers must be pairs \(student's name, teacher's name\)"):
            AttentionTransfer(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the teacher's layer must be one of its modules, got 'b'; it has a"):
        run(AttentionTransfer({"a": "b"}), Sdpa(), Sdpa(), x, x)
    with pytest.raises(ValueError, match=r"one attention in its forward pass, got 0"):
        run(AttentionTransfer(pair), Sdpa(), nn.Linear(8, 8), x, x)
    with pytest.raises(ValueError, match=r"one attention in its forward pass, got 2"):
        run(AttentionTransfer(pair), nn.Sequential(Sdpa(), Sdpa()), Sdpa(), x, x)
    with pytest.raises(ValueError, match=r"\[3, 2, 5, 5\] from the student .*\[3, 4, 5, 5\].*heads=\"mean\""):
        run(AttentionTransfer(pair, heads="each"), Sdpa(2), Sdpa(4), x, x)
    with pytest.raises(ValueError, match=r"\[3, 1, 5, 5\] from the student and \[3, 1, 4, 4\]"):
        run(AttentionTransfer(pair), Sdpa(2), Sdpa(4), x, x[:, :4])
    with pytest.raises(ValueError, match="mask must show what the teacher attends to"):
        run(AttentionTransfer(pair), Sdpa(is_causal=True), Sdpa(), x, x)
    run(AttentionTransfer(pair, distance="mse"), Sdpa(is_causal=True), Sdpa(), x, x)
    loss = AttentionTransfer(pair)
    with pytest.raises(ValueError, match="got no attention weights of the student's 'a' and the teacher's"):
        loss(None, None, None)
    with pytest.raises(ValueError, match=r"SpatialAttention: the student's feature must be \[B, C, H, W\]"):
        run(SpatialAttention(pair), nn.Identity(), nn.Identity(), x, x)
    with pytest.raises(ValueError, match="teacher must be a module to look into, got None"):
        SpatialAttention(pair).attached(None, nn.ModuleDict({"a": Sdpa()})).__enter__()


def test_a_forward_pass_that_fails_leaves_no_mode_behind() -> None:
    model = nn.ModuleDict({"a": Sdpa()})
    loss = AttentionTransfer({"a": "a"})
    with loss.attached(model, model):
        with pytest.raises(RuntimeError):
            model["a"](torch.randn(3, 5, 7))
        assert torch.overrides._get_current_function_mode() is None
        model["a"](torch.randn(3, 5, 8))
        assert torch.overrides._get_current_function_mode() is None

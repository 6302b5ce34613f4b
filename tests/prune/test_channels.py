"""Whole channels: which go, that the rest computes the same, and that failure leaves no trace."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautorch
from tautorch.prune import ChannelReport, prune_channels

pytest.importorskip("torch_pruning")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.b, self.bn_b = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn_b(self.b(F.relu(self.bn_a(self.a(x))))))


class ResNet(nn.Module):
    """A stem, a residual block, a depthwise and a grouped convolution, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3, padding=1), Block(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise, self.grouped = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, groups=4)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.block(F.relu(self.stem(x))))
        x = F.relu(self.grouped(F.relu(self.pointwise(F.relu(x)))))
        return self.head(x.flatten(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(b, t, self.num_heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(b, t, -1))


class Decoder(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.embed, self.norm_a, self.norm_f = nn.Embedding(20, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = Attention(32, 4, fused)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norm_a(x))
        x = x + self.down(F.gelu(self.up(self.norm_f(x))))
        return self.head(x)


IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(14).reshape(2, 7)
HEADS = {False: {f"attention.{n}": 4 for n in "qkv"}, True: {"attention.qkv": 4}}


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}


def untouched(model: nn.Module, state: dict[str, Any]) -> bool:
    now = model.state_dict(keep_vars=True)
    return list(now) == list(state) and all(
        now[name] is tensor and torch.equal(tensor, copied) for name, (tensor, copied) in state.items()
    )


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}


def test_the_lowest_channels_of_an_mlp_go_and_the_rest_computes_the_same() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    first, second = (model[i].weight.detach().double().numpy() for i in (0, 2))
    rows, columns = np.abs(first).sum(1), np.abs(second).sum(0)
    score = rows / rows.mean() + columns / columns.mean()
    kept = np.sort(np.argsort(score)[4:])
    bias = model[0].bias.detach().double().numpy()[kept]
    x = torch.randn(6, 5)
    assert prune_channels(model, x, 0.5, round_to=1) is model
    np.testing.assert_array_equal(model[0].weight.detach().numpy(), first[kept].astype(np.float32))
    hidden = np.maximum(x.double().numpy() @ first[kept].T + bias, 0)
    expected = hidden @ second[:, kept].T + model[2].bias.detach().double().numpy()
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert (model[0].out_features, model[2].in_features) == (4, 4)


def test_a_residual_network_shrinks_where_it_may() -> None:
    model = ResNet()
    report = ChannelReport()
    prune_channels(model, IMAGE, 0.5, round_to=8, report=report)
    found = shapes(model)
    assert found["stem.weight"] == (8, 3, 3, 3)
    assert found["block.a.weight"] == found["block.b.weight"] == (8, 8, 3, 3)
    assert found["block.bn_b.weight"] == (8,)
    assert found["depthwise.weight"] == (8, 1, 3, 3)
    assert found["pointwise.weight"] == (16, 8, 1, 1)
    assert found["grouped.weight"] == (16, 4, 3, 3)
    assert found["head.weight"] == (10, 16 * 4)
    assert model(IMAGE).shape == (2, 10)
    record = {layer.name: layer for layer in report.layers}["block.a"]
    assert record.outputs == record.inputs == (16, 8)
    assert record.macs == (2 * 16 * 16 * 9 * 16, 2 * 16 * 8 * 9 * 8)
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    assert report.left == {"head": "its channels are outputs of the model"}
    assert "block.a" in str(report)


@pytest.mark.parametrize("fused", [False, True])
def test_whole_heads_go_and_the_code_learns_of_it(fused: bool) -> None:
    model = Decoder(fused)
    dense = copy.deepcopy(model)
    report = ChannelReport()
    prune_channels(model, TOKENS, 0.5, layers=["attention.q*"], round_to=8, heads=HEADS[fused], report=report)
    assert model.attention.num_heads == 2
    assert tuple(model.attention.out.weight.shape) == (32, 16)
    # The heads that stayed are found by their values; the dense model with the others unread gives the same.
    whole = dense.attention.out.weight
    found = [model.attention.out.weight[:, i : i + 8] for i in (0, 8)]
    kept = [h for h in range(4) if any(torch.equal(whole[:, h * 8 : h * 8 + 8], part) for part in found)]
    assert len(kept) == 2
    with torch.no_grad():
        for head in set(range(4)) - set(kept):
            whole[:, head * 8 : head * 8 + 8] = 0
    torch.testing.assert_close(model.eval()(TOKENS), dense.eval()(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_what_would_mix_up_heads_is_left_alone(fused: bool) -> None:
    model = Decoder(fused)
    report = ChannelReport()
    prune_channels(model, TOKENS, 0.5, round_to=8, report=report)
    assert model.up.out_features == 32
    assert model.attention.out.in_features == 32
    assert any("attention" in name for name in report.left)
    with pytest.raises(ValueError, match=r"layers must be cuttable, got .*attention\.q"):
        prune_channels(Decoder(fused), TOKENS, 0.5, layers=["attention.q*"], round_to=8)


def test_verifying_shapes_alone_cuts_the_width_under_layer_norms() -> None:
    model = Decoder()
    prune_channels(model, TOKENS, 0.5, round_to=8, verify="shape", heads=HEADS[False])
    assert model.norm_a.normalized_shape == (16,)
    assert model.embed.embedding_dim == 16
    assert model(TOKENS).shape == (2, 7, 20)


class Joined(nn.Module):
    """A concatenation, two outputs, and one of them read further inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(32, 8)
        self.d = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], -1))
        return {"hidden": hidden, "out": self.d(F.relu(hidden))}


def test_concatenations_and_outputs_read_inside() -> None:
    model = Joined()
    report = ChannelReport()
    prune_channels(model, torch.randn(3, 4), 0.5, round_to=4, report=report)
    assert (model.a.out_features, model.b.out_features, model.c.in_features) == (8, 8, 16)
    assert (model.c.out_features, model.d.in_features) == (8, 8)
    assert set(report.left) == {"c", "d"}


def test_counts_round_up_and_protected_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    report = ChannelReport()
    prune_channels(model, torch.randn(2, 4), 0.5, protect=["2"], report=report)
    assert model[0].out_features == 32  # 20 rounded up to 16s
    assert model[2].out_features == 40
    assert report.left["2"] == "protected with 2"


def test_global_ranking_takes_from_where_the_scores_are_low() -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    with torch.no_grad():
        # Half of the first layer's channels do almost nothing, all of the second's are alike.
        model[0].weight[:16] *= 1e-3
        model[2].weight[:, :16] *= 1e-3
        model[2].weight[:, 16:] = 0.5
        model[4].weight.fill_(0.5)
    prune_channels(model, torch.randn(2, 4), 0.25, ranking="global", round_to=1)
    assert model[0].out_features == 16
    assert model[2].out_features == 32


@pytest.mark.parametrize("importance", ["activation", "mean_activation", "gradient", "gradient_squared"])
def test_other_importances_find_a_dead_channel(importance: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.normal_().abs_()
        model[0].bias.fill_(1.0)
        model[0].bias[5] = -1e4  # never active
    weight = model[0].weight.detach().clone()
    batches = [torch.rand(8, 4)]
    prune_channels(
        model, batches[0], 0.125, importance=importance, round_to=1, calibration=batches,
        loss=lambda m, x: m(x).square().sum(),
    )  # fmt: skip
    assert torch.equal(model[0].weight, torch.cat([weight[:5], weight[6:]]))


def test_flags_stay_as_they_were() -> None:
    model = ResNet()
    model.block.bn_a.eval()
    model.stem.weight.requires_grad_(False)
    prune_channels(model, IMAGE, 0.5, round_to=8)
    assert not model.stem.weight.requires_grad
    assert model.block.a.weight.requires_grad
    assert model.training
    assert not model.block.bn_a.training
    assert not any(m._forward_hooks for m in model.modules())


def test_a_cut_model_is_saved_and_loaded_into_the_old_architecture(tmp_path: Path) -> None:
    model = prune_channels(ResNet(), IMAGE, 0.5, round_to=8).eval()
    tautorch.save(model, tmp_path / "cut.safetensors")
    again = tautorch.load(tmp_path / "cut.safetensors", ResNet).eval()
    assert shapes(again) == shapes(model)
    assert torch.equal(again(IMAGE), model(IMAGE))


class Stop(BaseException):
    pass


def test_an_interrupt_in_the_middle_leaves_the_model_bit_for_bit() -> None:
    model = ResNet()
    model.stem.bias.requires_grad_(False)
    state, count = state_of(model), 0

    def interrupt(_: nn.Module) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise Stop

    with pytest.raises(Stop):
        prune_channels(model, IMAGE, 0.5, round_to=8, adjust=interrupt)
    assert untouched(model, state)
    assert not model.stem.bias.requires_grad
    assert (model.block.a.out_channels, model.stem.out_channels) == (16, 16)
    assert model.block.bn_a.num_features == 16


class Fixed(nn.Module):
    """Its forward relies on a width written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 16)
        self.c = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)).reshape(-1, 16))))


def test_a_cut_that_breaks_the_forward_is_undone_and_others_are_kept() -> None:
    model = Fixed()
    report = ChannelReport()
    prune_channels(model, torch.randn(2, 4), 0.5, round_to=1, report=report)
    assert (model.a.out_features, model.b.in_features) == (16, 16)
    assert (model.b.out_features, model.c.in_features) == (8, 8)
    assert "fails without them" in report.left["a"]


class Tied(nn.Module):
    """Embedding and head share their weight, so the width between them cannot change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.b(F.relu(self.a(x))))


def test_a_tied_width_stays() -> None:
    model = Tied()
    report = ChannelReport()
    prune_channels(model, torch.arange(4), 0.5, round_to=1, verify="shape", report=report)
    assert model.a.out_features == 8
    assert model.b.out_features == 8
    assert model.head.weight is model.embed.weight
    assert "its weight is shared" in report.left["b"]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (ResNet(), {"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\)"),
        (ResNet(), {"importance": "sparsegpt", "calibration": [IMAGE]}, ValueError, "must score weights"),
        (ResNet(), {"importance": "activation"}, ValueError, "calibration must hold batches"),
        (ResNet(), {"importance": "activation", "calibration": []}, ValueError, "at least one batch"),
        (ResNet(), {"ranking": "row"}, ValueError, "ranking must be one of local, global"),
        (ResNet(), {"verify": "no"}, ValueError, "verify must be one of exact, shape"),
        (ResNet(), {"round_to": 0}, ValueError, "round_to must be an int >= 1"),
        (ResNet(), {"layers": ["nowhere"]}, ValueError, "must name layers of the model"),
        (ResNet(), {"protect": ["nowhere"]}, ValueError, "must name layers of the model"),
        (ResNet(), {"heads": {"nowhere": 2}}, ValueError, "must name layers of the model"),
        (ResNet(), {"layers": ["head"]}, ValueError, "head: its channels are outputs"),
        (ResNet(), {"round_to": 64}, ValueError, "at least one channel must be removable, got none"),
        (ResNet(), {"example_input": torch.randn(2, 5)}, RuntimeError, "input"),
        (ResNet(), {"heads": {"stem": 3}}, ValueError, "heads of 'stem' must divide"),
        (Tied(), {"layers": ["b"], "example_input": torch.arange(4)}, ValueError, "its weight is shared"),
    ],
)
def test_bad_input_changes_nothing(
    model: nn.Module, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    state = state_of(model)
    with pytest.raises(error, match=message):
        prune_channels(model, **({"example_input": IMAGE, "sparsity": 0.5, "round_to": 8} | options))
    assert untouched(model, state)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = ResNet()
    model.stem.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight of layer 'stem' must be finite"):
        prune_channels(model, IMAGE)


def test_without_torch_pruning_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'tautorch\[channels\]'"):
        prune_channels(ResNet(), IMAGE)


class InObject(nn.Module):
    """Returns its logits plainly, or in an object, beside what the head reads."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.head, self.wrap = nn.Linear(32, 64), nn.Linear(64, 8), wrap

    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.inner(x))
        return self.wrap(self.head(hidden), hidden)


def test_outputs_in_objects_are_outputs() -> None:
    x = torch.randn(4, 32)
    model = InObject(lambda y, hidden: types.SimpleNamespace(y=y)).eval()
    prune_channels(model, x, sparsity=0.5)
    assert model.inner.out_features == 32
    for wrap in (lambda y, hidden: (y, hidden), lambda y, hidden: (y, types.SimpleNamespace(h=hidden))):
        with pytest.raises(ValueError, match="inner: its channels are outputs of the model"):
            prune_channels(InObject(wrap).eval(), x, sparsity=0.5)

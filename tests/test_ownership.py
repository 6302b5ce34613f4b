"""Whose weight somebody else reads is refused by `convert`, and whose is not is replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tautorch.convert import convert
from tautorch.nn import MODULES, Int8Linear

from .test_convert import assert_same, mlp, snapshot


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class SameStorage(nn.Module):
    """The second layer's weight is a view of the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 4)
        self.b.weight = nn.Parameter(self.a.weight.data[2:6])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[:, :4])


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class HiddenName(nn.Module):
    """Holds the layer once more where PyTorch does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.also = [self.a]

    def forward(self, x: Tensor) -> Tensor:
        return self.also[0](x)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.layers = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = F.linear(x, self.layers[i].weight)
        return F.linear(x, self.a.weight)


class Outer(nn.Module):
    """Reads its grandchild's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner[0].weight.sum()


class Scaled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def parametrised() -> nn.Module:
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Scaled())
    return model


def weight_normed() -> nn.Module:
    model = mlp()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    return model


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    return model


def overridden() -> nn.Module:
    model = mlp()
    model[0].forward = model[0].forward  # as wrappers do that patch instances
    return model


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (mlp, "nowhere", "no such layer"),
        (mlp, "2.weight", "no such layer"),
        (mlp, "", "wrap it in nn.Sequential"),
        (Tied, "head", "shared with parameter 'embed.weight'"),
        (Tied, "embed", "shared with parameter 'head.weight'"),
        (SameStorage, "a", "shared with parameter 'b.weight'"),
        (SameStorage, "b", "shared with parameter 'a.weight'"),
        (TwoNames, "a", "also used as 'b'"),
        (TwoNames, "b", "also used as 'a'"),
        (HiddenName, "a", "in attribute 'also'"),
        (ReadsWeight, "a", "reads a.weight directly in forward"),
        (ReadsWeight, "layers.1", "reads layers.1.weight directly in forward"),
        (Outer, "inner.0", "reads inner.0.weight directly in forward"),
        (parametrised, "0", "remove_parametrizations"),
        (weight_normed, "0", "hook"),
        (hooked, "0", "remove the hook"),
        (overridden, "0", "forward overridden"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0", "lazy"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))), "0", "ScriptModule"),
        (lambda: nn.ModuleDict({"m": nn.MultiheadAttention(8, 2)}), "m.out_proj", "MultiheadAttention"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "linear1", "fast path"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "linear2", "fast path"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "self_attn.out_proj", "fast path"),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2),
            "layers.1.linear2",
            "fast path",
        ),
    ],
)
def test_refuses_a_layer_somebody_else_reads(make: Callable[[], nn.Module], name: str, reason: str) -> None:
    model = make()
    before = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    with pytest.raises(ValueError, match="convert: nothing was changed") as caught:
        convert(model, {name: lambda layer: nn.Identity()})
    assert reason in str(caught.value)
    assert repr(name) in str(caught.value)
    assert [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)] == before


class LoRALinear(nn.Linear):
    """Computes more than its weight says."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.a.T @ self.b.T


class WSConv(nn.Conv2d):
    """Standardises its weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), bias)


class NamedLinear(nn.Linear):
    """Computes what nn.Linear does, whatever else it holds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lr_scale = nn.Parameter(torch.ones(1))


def pointwise(cls: type[nn.Linear | nn.Conv2d]) -> nn.Linear | nn.Conv2d:
    return cls(8, 8) if issubclass(cls, nn.Linear) else cls(8, 8, 1)


@pytest.mark.parametrize("kind", sorted(MODULES))
@pytest.mark.parametrize(("cls", "name"), [(LoRALinear, "forward"), (WSConv, "_conv_forward")])
def test_refuses_a_subclass_that_computes_more(cls: Any, name: str, kind: str) -> None:
    if ("Linear" in kind) != issubclass(cls, nn.Linear):
        return
    settings: dict[str, Any] = {"rank": 2} if kind.startswith("LowRank") else {}
    model = nn.Sequential(pointwise(cls))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"'0': .*{cls.__name__} has a {name} of its own"):
        convert(model, {"0": lambda layer: MODULES[kind].from_float(layer, **settings)})  # type: ignore[attr-defined]
    assert_same(model, before)


def test_a_factory_may_know_a_subclass() -> None:
    def merged(layer: LoRALinear) -> nn.Module:
        plain = nn.Linear(8, 8)
        plain.load_state_dict({"weight": layer.weight + layer.b @ layer.a, "bias": layer.bias})
        return Int8Linear.from_float(plain)

    model = nn.Sequential(LoRALinear(8, 8)).eval()
    x = torch.randn(4, 8)
    expected = model(x).detach()
    got = convert(model, {"0": merged})(x).detach()
    assert float((got - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("cls", [NamedLinear, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_a_subclass_that_computes_the_same_is_replaced(cls: type[nn.Linear]) -> None:
    model = nn.Sequential(cls(8, 8)).eval()
    convert(model, {"0": Int8Linear.from_float}, torch.randn(4, 8))
    assert type(model[0]) is Int8Linear


def test_layers_beside_a_reader_are_not_refused() -> None:
    decoder = nn.TransformerDecoderLayer(8, 2)  # has no fast path: its linears are called
    convert(decoder, {"linear1": Int8Linear.from_float, "linear2": Int8Linear.from_float})
    assert isinstance(decoder.linear1, Int8Linear)


def test_disjoint_views_of_one_buffer_are_not_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flat = torch.randn(32)
    model[0].weight.data, model[1].weight.data = flat[:16].view(4, 4), flat[16:].view(4, 4)
    convert(model, {"0": Int8Linear.from_float})
    assert isinstance(model[0], Int8Linear)


def test_a_repeated_block_is_converted_once_for_all_its_uses() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(block, block)
    convert(model, {"0.0": Int8Linear.from_float})
    assert model[1][0] is model[0][0]
    assert isinstance(model[0][0], Int8Linear)


class Sly(nn.Module):
    """Reads a weight in a way that its source does not show."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        layer = getattr(self, "a")  # noqa: B009 - the source does not say self.a.weight
        return F.linear(self.b(x), layer.weight)


def test_a_read_that_only_shows_at_run_time_is_noticed() -> None:
    model = Sly(4)
    convert(copy.deepcopy(model), {"b": Int8Linear.from_float}, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"'a': its weight is read directly by a call of linear"):
        convert(model, {"b": Int8Linear.from_float, "a": Int8Linear.from_float}, torch.randn(2, 4))
    assert isinstance(model.b, nn.Linear)

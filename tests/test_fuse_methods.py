"""`fuse` and methods beside `forward`: what they run on their own is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch.convert import convert
from tautorch.fuse import fuse
from tautorch.nn import Int8Linear

from .test_fuse import assert_fused, randomise


class Entries(nn.Module):
    """`forward` and, in subclasses, other ways in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.act = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self._init()

    def _init(self) -> None:
        for layer in (self.fc, self.net[0]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.act(self.bn(self.fc(x))))


class Embeds(Entries):
    def embed(s, x: Tensor) -> Tensor:
        return s.fc(x)


class UsedByForward(Entries):
    def embed(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.act(self.bn(self.embed(x))))


class Forwards(Entries):
    def embed(self, x: Tensor) -> Tensor:
        return self.fc.forward(x)


class ThroughPrivate(Entries):
    def _first(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def embed(self, x: Tensor) -> Tensor:
        return self._first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.act(self.bn(self._first(x))))


class Mixed:
    def embed(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[attr-defined, no-any-return]


class Inherits(Entries, Mixed): ...


class HandsOn(Entries):
    def embed(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)


class Walks(Entries):
    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.children():
            x = layer(x)
            found.append(x)
        return found


class ByName(Entries):
    def embed(self, x: Tensor, name: str = "fc") -> Tensor:
        return getattr(self, name)(x)  # type: ignore[no-any-return]


class Slices(Entries):
    def embed(self, x: Tensor, stop: int = 1) -> Tensor:
        return self.net[:stop](x)


class Iterates(Entries):
    def features(self, x: Tensor) -> list[Tensor]:
        return [x := layer(x) for layer in self.net]


class Indexes(Entries):
    def embed(self, x: Tensor) -> Tensor:
        return self.net[0](x)


class Whole(Entries):
    """Other methods that change nothing about what is read."""

    def features(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))

    def body(self, x: Tensor) -> Tensor:
        return self.net(x)

    def predict(self, x: Tensor) -> Tensor:
        return self.forward(x).argmax(-1)

    def freeze(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.eval()

    def decay(self) -> Tensor:
        return self.fc.weight.square().sum() + sum(p.square().sum() for p in self.net.parameters())


@pytest.mark.parametrize(
    ("cls", "kept"),
    [
        *((cls, "bn") for cls in (Embeds, UsedByForward, Forwards, ThroughPrivate, Inherits)),
        *((cls, "bn") for cls in (HandsOn, Walks, ByName)),
        *((cls, "net.1") for cls in (Slices, Iterates, Indexes)),
    ],
)
def test_a_layer_that_another_method_runs_is_left_alone(cls: Any, kept: str) -> None:
    model, x = randomise(cls()), torch.randn(3, 4)
    method = "embed" if hasattr(cls, "embed") else "features"
    expected = getattr(model, method)(x)
    others = [name for name in ("bn", "net.1") if name != kept]
    lines = assert_fused(model, x, *others)
    layer = {"bn": "fc", "net.1": "net.0"}[kept]
    assert f"{kept}: batch norm not folded: {cls.__name__}.{method} may run {layer} without it" in lines
    torch.testing.assert_close(getattr(model, method)(x), expected)


def test_an_activation_that_another_method_leaves_out_stays() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

        def embed(self, x: Tensor) -> Tensor:
            return self.a.fc(x)

    model = convert(Outer().eval(), dict.fromkeys(("a.fc", "b.fc"), Int8Linear.from_float))
    lines = assert_fused(model, torch.randn(3, 4), "b.act")
    assert "a.act: relu not folded: Outer.embed may run a.fc without it" in lines


def test_other_methods_that_keep_the_order_let_fold() -> None:
    model, x = randomise(Whole()), torch.randn(3, 4)
    expected = model.features(x)
    assert_fused(model, x, "bn", "net.1")
    torch.testing.assert_close(model.features(x), expected)


def test_a_method_without_source_may_run_what_it_names() -> None:
    scope: dict[str, Any] = {}
    exec("def embed(self, x): return self.fc(x)", scope)
    model = randomise(type("Typed", (Entries,), {"embed": scope["embed"]})())
    lines = assert_fused(model, torch.randn(3, 4), "net.1")
    assert lines[0].endswith("Typed.embed, whose source cannot be read, may run fc without it")


class Helped(nn.Module):
    """Methods that run none of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.stem, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(self.body(x)))

    def save(self, path: str) -> None:
        torch.save(self.body, path)

    def card(self) -> str:
        return """
# card
"""

    def freeze(self) -> None:
        for layer in [self.stem]:
            layer.requires_grad_(False)

    def init_weights(self) -> None:
        init = nn.init.kaiming_normal_
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                init(layer.weight)


def test_methods_that_run_nothing_let_fold() -> None:
    report: list[str] = []
    fuse(Helped().eval(), torch.randn(2, 3, 8, 8), report=report)
    assert report == [
        "body.1: batch norm folded into body.0",
        "norm: batch norm folded into stem",
    ]


def test_a_list_whose_layers_are_called_keeps_them_apart() -> None:
    class Listed(Helped):
        def features(self, x: Tensor) -> Tensor:
            for layer in [self.body, self.stem]:
                x = layer(x)
            return x

    report: list[str] = []
    fuse(Listed().eval(), torch.randn(2, 3, 8, 8), report=report)
    assert "Listed.features may run stem without it" in report[1] and "not folded" in report[1]

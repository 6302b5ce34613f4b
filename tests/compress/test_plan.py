"""What is offered to which layer, what becomes of it, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tautorch import storage
from tautorch.compress.plan import compilable, compile_layers, describe_layer
from tautorch.factorize import factorize
from tautorch.nn import Int8Conv2d, Int8Linear, LowRankLinear, PackedModule, SparseConv2d, SparseLinear
from tautorch.prune import prune


def make_model() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(
        *body, nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 5)
    ).eval()


def make_batches() -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def compress(model: nn.Module) -> nn.Module:
    prune(model, pattern="4x1", sparsity=0.75, layers=["2", "7"])
    return factorize(model, rank=12, layers=["5"])


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_each_layer_gets_its_kind() -> None:
    original, model, batches = make_model(), compress(make_model()), make_batches()
    expected = model(batches[0])
    layers = compile_layers(model, batches, [batches[0][:1], batches[0]], gate=False, original=original)
    assert [type(model.get_submodule(layer.name)) for layer in layers] == [
        Int8Conv2d, SparseConv2d, LowRankLinear, SparseLinear, Int8Linear,
    ]  # fmt: skip
    assert [layer.name for layer in layers] == ["0", "2", "5", "7", "9"]
    assert all(layer.replaced and layer.reason == "replaced: planned, not measured" for layer in layers)
    # Activations went into the layers before them.
    assert [model.get_submodule(name).activation for name in ("0", "2", "5", "7", "9")] == [
        "relu", "relu", "relu", "gelu", "none",
    ]  # fmt: skip
    assert (model(batches[0]) - expected).norm() / expected.norm() < 0.05


def test_counts_the_layer_as_it_was_before_compression() -> None:
    original, model, batches = make_model(), compress(make_model()), make_batches()
    layers = compile_layers(model, batches, batches[:1], gate=False, original=original)
    low_rank = next(layer for layer in layers if layer.name == "5")
    assert low_rank.parameters == 144 * 64 + 64
    assert low_rank.bytes_before == 4 * low_rank.parameters
    assert 12 * (144 + 64) < low_rank.bytes_after < low_rank.bytes_before / 2
    assert low_rank.before == "Linear 144→12→64"
    assert low_rank.error is not None and 0 < low_rank.error < 0.05


def test_gate_gives_each_layer_times_and_a_reason() -> None:
    model, batches = compress(make_model()), make_batches()
    decided: list[str] = []
    layers = compile_layers(
        model, batches, [batches[0][:1], batches[0]], seconds=0.005, progress=decided.append
    )
    assert sorted(decided) == ["0", "2", "5", "7", "9"]
    for layer in layers:
        assert set(layer.before_s) == set(layer.after_s) == {1, 16}
        assert isinstance(model.get_submodule(layer.name), PackedModule) is layer.replaced
        assert layer.reason.rpartition("; ")[2].startswith("replaced" if layer.replaced else "kept")
        assert (layer.kernel == "torch") is not layer.replaced


def test_a_sparse_layer_that_loses_is_offered_dense_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(50):
                y = self.layer(x)
            return y  # type: ignore[no-any-return]

    monkeypatch.setattr(SparseConv2d, "from_float", classmethod(lambda _, layer, **__: Slow(layer)))
    model, batches = compress(make_model()), make_batches()
    layers = compile_layers(model, batches, batches[:1], seconds=0.005)
    layer = next(layer for layer in layers if layer.name == "2")
    first, _, second = layer.reason.partition("; ")
    assert first.startswith("kept: Slow is slower")
    assert second.startswith(("replaced", "kept: Int8Conv2d"))


def test_a_kept_pair_can_be_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRankLinear, "from_float", classmethod(lambda _, layer, **__: layer))
    model, batches = compress(make_model()), make_batches()
    layers = compile_layers(model, batches, batches[:1], gate=False)
    assert next(layer for layer in layers if layer.name == "5").replaced is False
    storage.save(model, tmp_path / "m.safetensors")
    again = storage.load(tmp_path / "m.safetensors", make_model).eval()
    assert torch.equal(again(batches[1]), model(batches[1]))


def test_a_factorised_pair_counts_as_one_layer() -> None:
    assert compilable(compress(make_model())) == ["0", "2", "5", "7", "9"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(3, 4), "Linear 3→4"),
        (nn.Conv2d(3, 4, (3, 1)), "Conv2d 3→4, 3×1"),
        (nn.ReLU(), "ReLU"),
        (Int8Linear(3, 4, activation="relu"), "Int8Linear 3→4 + relu"),
        (SparseLinear.from_float(nn.Linear(8, 8), pattern="4x1"), "SparseLinear 8→8, 4x1"),
        (LowRankLinear.from_float(nn.Linear(9, 8), rank=2), "LowRankLinear 9→2→8"),
    ],
)
def test_describe_layer(layer: nn.Module, expected: str) -> None:
    assert describe_layer(layer) == expected


class Doubled(nn.Linear):
    """Computes more than its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_subclass_that_computes_more_is_not_replaced() -> None:
    model = nn.Sequential(Doubled(16, 16), nn.ReLU()).eval()
    x = torch.randn(4, 16)
    expected = model(x)
    with suppress(ValueError):  # that names the layer
        compile_layers(model, [x], [x], gate=False)
    assert type(model[0]) is Doubled
    assert torch.equal(model(x), expected)

"""What is offered to which layer, what becomes of it, and how it is told."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tautorch import storage
from tautorch.compress import Report, plan
from tautorch.compress.plan import compilable, compile_layers, describe_layer
from tautorch.convert_report import ConvertReport
from tautorch.factorize import FactorizedLinear, factorize
from tautorch.nn import Int8Conv2d, Int8Linear, LowRankLinear, PackedModule, SparseConv2d, SparseLinear
from tautorch.prune import prune
from tautorch.quantize import FakeQuantInput, finalize, prepare_qat

from ..test_ownership import Sly


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
        assert list(layer.before_s) == list(layer.after_s)
        assert [shape.partition("x")[0] for shape in layer.before_s] == ["1", "16"]
        assert isinstance(model.get_submodule(layer.name), PackedModule) is layer.replaced
        assert layer.reason.rpartition("; ")[2].startswith("replaced" if layer.replaced else "kept")
        assert (layer.kernel == "torch") is not layer.replaced


def test_inputs_of_one_batch_size_are_timed_apart() -> None:
    torch.manual_seed(0)
    model, prefill = nn.Sequential(nn.Linear(48, 32)).eval(), torch.randn(1, 32, 48)
    (layer,) = compile_layers(model, [prefill], [prefill, prefill[:, :1]], seconds=0.005)
    assert list(layer.before_s) == list(layer.after_s) == ["1x32x48", "1x1x48"]


def test_errors_are_told_and_limited() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    x[:, 0] = 1e4
    first = nn.Linear(64, 64)
    first.weight[:, 0] = 0  # so that what the outlier drowns is all there is

    def make() -> nn.Module:
        return copy.deepcopy(nn.Sequential(first, nn.ReLU(), nn.Linear(64, 8)).eval())

    report, model, limited = Report("outlier"), make(), make()
    expected = model(x)
    layers = compile_layers(model, [x], [x], gate=False, report=report)
    assert report.layers is layers and layers[0].error is not None and layers[0].error > 0.5
    assert report.model_error == pytest.approx(
        float((model(x) - expected).norm() / expected.norm()), rel=1e-4
    )
    console = Console(file=io.StringIO(), width=80)
    report.print(console)
    assert f"model error {100 * report.model_error:.3g} %" in console.file.getvalue()  # type: ignore[attr-defined]
    layers = compile_layers(limited, [x], [x], gate=False, max_error=0.05, report=report)
    assert [layer.replaced for layer in layers] == [False, True]
    assert "max_error is 5 %" in layers[0].reason
    assert report.model_error is not None and report.model_error < 0.05


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


def test_scales_that_qat_learned_are_kept() -> None:
    x = torch.randn(256, 32).pow(3)
    pair = factorize(nn.Sequential(nn.Linear(8, 32)), rank=4)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8), *pair).eval()
    prepare_qat(model, 4, "static", [x], observer="minmax")
    for module in model.modules():
        if isinstance(module, FakeQuantInput) and module.step is not None:
            module.step.mul_(0.37)
    expected = model[:3](x)
    finalize(model)
    learned = [float(layer.x_scale) for layer in (model[0], model[2], model[3].down)]
    compile_layers(model, [x], [x], gate=False)
    assert [type(model[i]) for i in (0, 2, 3)] == [Int8Linear, Int8Linear, LowRankLinear]
    assert [float(model[i].x_scale) for i in (0, 2, 3)] == learned
    torch.testing.assert_close(model[:3](x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Attended(nn.Module):
    """Layers that others read, and one that nobody does."""

    def __init__(self, free: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.inner = nn.Linear(32, 32) if free else nn.Identity()
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = self.inner(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("free", [True, False])
def test_layers_that_others_read_stay(free: bool) -> None:
    model, tokens = Attended(free).eval(), torch.randint(0, 50, (4, 7))
    expected = model(tokens)
    decided: list[str] = []
    layers = compile_layers(model, [tokens], [tokens], gate=False, progress=decided.append)
    names = ["attention.out_proj", "inner", "head"] if free else ["attention.out_proj", "head"]
    assert [layer.name for layer in layers] == names
    assert sorted(decided) == sorted(names)
    found = {layer.name: layer for layer in layers}
    for name, why in (
        ("attention.out_proj", "kept: its parent 'attention' (MultiheadAttention) reads out_proj.weight"),
        ("head", "kept: its weight is shared with parameter 'words.weight'"),
    ):
        assert found[name].reason.startswith(why)
        assert not found[name].replaced and found[name].kernel == "torch"
        assert found[name].bytes_after == found[name].bytes_before
    assert isinstance(model.inner, Int8Linear) is free
    assert model.head.weight is model.words.weight
    assert (model(tokens) - expected).norm() <= 0.05 * expected.norm()


def test_a_layer_that_is_seen_to_be_read_when_the_model_runs_stays() -> None:
    model, x = Sly(32).eval(), torch.randn(8, 32)
    expected = model(x)
    a, b = compile_layers(model, [x], [x], gate=False)
    assert not a.replaced and a.reason == "kept: its weight is read directly by a call of linear"
    assert b.replaced and isinstance(model.b, Int8Linear) and isinstance(model.a, nn.Linear)
    assert (model(x) - expected).norm() <= 0.05 * expected.norm()


def test_a_convolution_that_no_kernel_pads_stays() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 8, 6, 6)
    first, second = compile_layers(model, [x], [x], gate=False)
    assert not first.replaced and "padding_mode must be" in first.reason and type(model[0]) is nn.Conv2d
    assert second.replaced and isinstance(model[1], Int8Conv2d)


def test_an_empty_layer_stays() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0)).eval(), torch.randn(4, 8)
    full, empty = compile_layers(model, [x], [x], gate=False)
    assert full.replaced and not empty.replaced and empty.reason == "kept: its weight is empty"


def test_layers_in_compiled_code_stay() -> None:
    """What they get does not show there, so that nothing can be said of how they are read."""
    model = nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 8)).eval()
    x = torch.randn(4, 8)
    compiled, plain = compile_layers(model, [x], [x], gate=False)
    assert not compiled.replaced and compiled.reason.startswith("kept: it is compiled; convert before")
    assert plain.replaced


class Doubts(nn.Module):
    """A layer in float64, one of too many inputs, and one that sees what a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.exact = nn.Linear(32, 16), nn.Linear(16, 8, dtype=torch.float64)
        self.wide, self.masked = nn.Linear(66_312, 1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.a(x)
        wide = self.wide(h.new_ones(1, 66_312))
        return self.exact(h.double()), wide, self.masked(h.masked_fill(h < 0, float("-inf")))


def test_what_no_kernel_takes_stays_and_layers_not_chosen_are_not_calibrated() -> None:
    model, x = Doubts().eval(), torch.randn(4, 32)
    a, exact, wide = compile_layers(model, [x], [x], layers=["a", "exact", "wide"], gate=False)
    assert a.replaced and isinstance(model.a, Int8Linear)
    assert not exact.replaced and exact.reason.startswith("kept: its weight is torch.float64")
    assert not wide.replaced and "K must be at most 66311" in wide.reason
    with pytest.raises(ValueError, match=r"compile_layers: calibration must give finite .* 'masked'"):
        compile_layers(Doubts().eval(), [x], [x], gate=False)


def state_of(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, Tensor]]]:
    """Every module and tensor there is, themselves; but of packed layers, which pack when they run."""
    modules = list(model.named_modules())
    tensors = [
        (f"{name}.{key}", tensor)
        for name, module in modules
        if not isinstance(module, PackedModule)
        for slots in (module._parameters, module._buffers)
        for key, tensor in slots.items()
        if tensor is not None
    ]
    return modules, tensors


def assert_same(now: Any, before: Any) -> None:
    for these, those in zip(now, before, strict=True):
        assert [name for name, _ in these] == [name for name, _ in those]
        assert all(a is b for (_, a), (_, b) in zip(these, those, strict=True))


ONE = make_batches()[0]


@pytest.mark.parametrize(
    ("example_inputs", "options", "error", "match"),
    [
        ((x for x in [ONE]), {}, TypeError, "a batch or a list of batches, got generator"),
        ([], {}, ValueError, "example_inputs must hold at least one batch"),
        (None, {}, TypeError, "a batch or a list of batches, got NoneType"),
        (ONE, {"original": nn.Linear(3, 3)}, ValueError, "the model's layers, got none named '0'"),
        (ONE, {"original": "model"}, TypeError, "original must be an nn.Module, got str"),
        (ONE, {"layers": "5"}, TypeError, "layers must be a list of names, got the string '5'"),
        (ONE, {"layers": ["head"]}, ValueError, "got 'head'; it has 0, 2, 5, 7, 9"),
        (ONE, {"max_error": -1.0}, ValueError, "max_error must be at least 0"),
        (ONE, {"pattern": "3x3"}, ValueError, "sparse_linear: pattern must be one of .* got '3x3'"),
        (ONE, {"report": ConvertReport()}, TypeError, "report must be a Report, got ConvertReport"),
        (ONE[:, :2], {}, RuntimeError, "expected input"),
    ],
)  # fmt: skip
def test_wrong_arguments_change_nothing(
    example_inputs: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = compress(make_model())
    before = state_of(model)
    with pytest.raises(error, match=match):
        compile_layers(model, make_batches(), example_inputs, gate=False, **options)
    assert_same(state_of(model), before)


def test_a_model_in_training_mode_is_refused() -> None:
    model = make_model().train()
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"compile_layers: model must be in eval mode, .* call model.eval\(\)"
    ):
        compile_layers(model, make_batches(), ONE, gate=False)
    assert_same(state_of(model), before)
    with pytest.raises(TypeError, match="compile_layers: model must be an nn"):
        compile_layers("model", make_batches(), ONE)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["progress", "the whole model's error", "the records"])
def test_what_fails_late_leaves_the_model_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then layers were replaced, batch norms folded into those that were kept, and activations fused."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    x = ONE.flatten(1)
    packed = Int8Linear.from_float(nn.Linear(32, 32))
    kept, pair = nn.Linear(192, 192), factorize(nn.Sequential(nn.Linear(192, 32)), rank=4)[0]
    model = nn.Sequential(
        kept, nn.BatchNorm1d(192), pair, nn.ReLU(), packed, nn.GELU(), nn.Linear(32, 5)
    ).eval()
    model[1].running_mean.fill_(0.5)
    expected = model(x)
    before, keys = state_of(model), sorted(model.state_dict())
    progress = fail if where == "progress" else None
    if where != "progress":
        monkeypatch.setattr(plan, "_error" if where == "the whole model's error" else "_layer", fail)
    with pytest.raises(KeyboardInterrupt):
        compile_layers(model, [x], x, layers=["2", "6"], gate=False, progress=progress)
    assert_same(state_of(model), before)
    assert model[4] is packed and packed.activation == "none" and sorted(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    monkeypatch.undo()
    compile_layers(model, [x], x, layers=["2", "6"], gate=False)
    assert model[2].activation == "relu" and type(model[3]) is nn.Identity
    assert packed.activation == "none" and type(model[1]) is nn.BatchNorm1d  # of layers that were not chosen
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_one_tensor_is_one_batch() -> None:
    model = make_model()
    layers = compile_layers(model, make_batches(), ONE, seconds=0.005)
    assert list(layers[0].before_s) == ["16x3x8x8"]


def test_layers_are_chosen_and_activations_left() -> None:
    model = make_model()
    layers = compile_layers(model, make_batches(), ONE, layers=["[57]", "9"], gate=False, fuse=False)
    assert [layer.name for layer in layers] == ["5", "7", "9"]
    kinds = [type(module) for module in model]
    assert kinds[0] is kinds[2] is nn.Conv2d
    assert kinds[5:] == [Int8Linear, nn.ReLU, Int8Linear, nn.GELU, Int8Linear]
    assert model[5].activation == "none"


class Peeked(nn.Module):
    """The method beside forward reads what the activation would be folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)))

    def embed(self, x: Tensor) -> Tensor:
        return self.one(x)


def test_the_report_notes_what_was_not_folded() -> None:
    report, x = Report("peeked"), torch.randn(4, 8)
    model = Peeked().eval()
    compile_layers(model, [x], x, gate=False, report=report)
    assert type(model.act) is nn.ReLU
    assert len(report.notes) == 1 and report.notes[0].startswith("fuse: act: relu not folded: ")
    report = Report("folded")
    compile_layers(nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval(), [x], x, gate=False, report=report)
    assert report.notes == []


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


def test_layers_that_were_not_chosen_keep_their_batch_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 8)).eval()
    x, norm = torch.randn(4, 3, 4, 4), model[1]
    compile_layers(model, [x], [x], gate=False, layers=["3"])
    assert model[1] is norm and isinstance(model[3], Int8Linear)


@pytest.mark.parametrize("pair", [False, True])
def test_a_model_that_is_itself_a_layer_stays_and_the_report_says_why(pair: bool) -> None:
    model: nn.Module = nn.Linear(8, 8)
    if pair:
        model = FactorizedLinear(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
    model, x = model.eval(), torch.randn(4, 8)
    (layer,) = compile_layers(model, [x], [x], gate=False)
    assert not layer.replaced and layer.name == ""
    assert layer.reason.startswith("kept: the model itself cannot be replaced in place; wrap it in")
    wrapped = nn.Sequential(model).eval()
    assert compile_layers(wrapped, [x], [x], gate=False)[0].replaced


def test_an_error_beside_a_scripted_part_comes_through() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8)).eval()), nn.Linear(8, 8)).eval()
    before = model[1]

    def progress(name: str) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        compile_layers(model, [torch.randn(2, 8)], [torch.randn(2, 8)], gate=False, progress=progress)
    assert model[1] is before


def test_a_chosen_layer_that_calibration_does_not_reach_is_no_error() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.main(x)

    x = torch.randn(4, 8)
    for chosen in (["aux"], ["main", "aux"]):
        layers = compile_layers(Two().eval(), [x], x, layers=chosen, gate=False)
        assert [layer.name for layer in layers] == chosen

"""`fuse`: what is folded computes the same, and what cannot be folded is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tautorch.convert import convert
from tautorch.fuse import fuse
from tautorch.nn import MODULES, Int8Linear


def randomise(model: nn.Module) -> nn.Module:
    """Batch norms that change something; eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def assert_fused(model: nn.Module, x: Tensor, *names: str, tolerance: float = 1e-5) -> list[str]:
    """Fuses and checks: `names` are identities now, no other class has changed, the output is the same."""
    expected = model(x)
    kinds = {name: type(m) for name, m in model.named_modules()}
    lines: list[str] = []
    assert fuse(model, report=lines) is model
    changed = [name for name, m in model.named_modules() if type(m) is not kinds[name]]
    assert changed == list(names)
    assert all(type(model.get_submodule(name)) is nn.Identity for name in names)
    got = model(x)
    assert (got - expected).norm() / expected.norm() < tolerance
    return lines


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda b: nn.Linear(6, 8, bias=b), nn.BatchNorm1d, (5, 6)),
        (lambda b: nn.Conv1d(6, 8, 3, bias=b), nn.BatchNorm1d, (2, 6, 7)),
        (lambda b: nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=b), nn.BatchNorm2d, (2, 6, 7, 7)),
        (lambda b: nn.Conv2d(6, 12, 3, groups=3, dilation=2, bias=b), nn.BatchNorm2d, (2, 6, 7, 7)),
        (lambda b: nn.Conv3d(6, 4, 2, bias=b), nn.BatchNorm3d, (2, 6, 3, 3, 3)),
    ],
)
def test_batch_norm(layer: Any, norm: Any, shape: tuple[int, ...], bias: bool, affine: bool) -> None:
    first = layer(bias)
    width = first.weight.shape[0]
    model = randomise(nn.Sequential(first, norm(width, affine=affine, eps=0.1), nn.Tanh()))
    lines = assert_fused(model, torch.randn(shape), "1")
    assert lines == ["1: batch norm folded into 0"]
    assert model[0] is first and first.bias is not None


def test_reduced_precision_folds_in_float64() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    reference = copy.deepcopy(model).double()
    model.bfloat16()
    x = torch.randn(2, 3, 5, 5).bfloat16()
    fuse(model)
    assert model[0].weight.dtype == torch.bfloat16
    expected = reference(x.double())
    assert (model(x) - expected).norm() / expected.norm() < 2e-2


def test_frozen_parameters_stay_frozen() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model[0].weight.requires_grad = False
    fuse(model)
    assert not model[0].weight.requires_grad


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def test_on_the_graph_of_a_module() -> None:
    assert_fused(randomise(Residual()), torch.randn(2, 4, 5, 5), "bn1", "bn2")


@pytest.mark.parametrize(
    ("activation", "name", "tolerance"),
    [
        (nn.ReLU(), "relu", 1e-5),
        (nn.ReLU(inplace=True), "relu", 1e-5),
        (nn.GELU(), "gelu", 1e-5),
        (nn.GELU("tanh"), "gelu_tanh", 1e-5),
        (nn.SiLU(), "silu", 1e-5),
    ],
)
def test_activations(activation: nn.Module, name: str, tolerance: float) -> None:
    model = nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 4)).eval()
    convert(model, {"0": Int8Linear.from_float})
    x = torch.randn(3, 8)
    model(x)  # packed and planned with the old activation
    lines = assert_fused(model, x, "1", tolerance=tolerance)
    assert lines == [f"1: {name} folded into 0"]
    assert model[0].activation == name


@pytest.mark.parametrize("kind", sorted(MODULES))
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_every_compiled_layer_takes_an_activation(kind: str, activation: nn.Module) -> None:
    linear = kind.endswith("Linear")
    layer: nn.Module = nn.Linear(40, 24) if linear else nn.Conv2d(5, 24, 3, padding=1)
    norm: nn.Module = nn.BatchNorm1d(24) if linear else nn.BatchNorm2d(24)
    model = randomise(nn.Sequential(layer, norm, activation))
    x = torch.randn(3, 40) if linear else torch.randn(2, 5, 6, 6)
    fuse(model, x)
    options = {"rank": 7} if "LowRank" in kind else {}
    convert(model, {"0": lambda la: MODULES[kind].from_float(la, **options)})  # type: ignore[attr-defined]
    assert_fused(model, x, "2")


@pytest.mark.parametrize("follower", [nn.Sigmoid(), nn.LeakyReLU(), nn.ReLU6(), nn.Dropout(), nn.Softmax(-1)])
def test_other_followers_stay(follower: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 16), follower).eval()
    convert(model, {"0": Int8Linear.from_float})
    assert_fused(model, torch.randn(3, 8))


def test_a_float_layer_keeps_its_activation() -> None:
    assert_fused(nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval(), torch.randn(3, 8))


def test_identities_are_looked_through() -> None:
    model = randomise(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Identity(), nn.ReLU()))
    x = torch.randn(3, 8)
    assert_fused(model, x, "1")
    convert(model, {"0": Int8Linear.from_float})
    assert_fused(model, x, "3")


def test_a_taken_activation_is_reported() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.ReLU()).eval()
    convert(model, {"0": lambda la: Int8Linear.from_float(la, activation="silu")})
    lines = assert_fused(model, torch.randn(3, 8))
    assert lines == ["1: relu not folded: its layer already applies silu"]


def test_a_layer_with_int8_output_keeps_its_follower() -> None:
    """Below zero, codes stand for numbers above it where the zero point is lower still."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval()
    convert(model, {"0": lambda la: Int8Linear.from_float(la, out_scale=0.05, out_zero_point=-30)})
    x, lines = torch.randn(3, 8), list[str]()
    expected = model(x)
    fuse(model, report=lines)
    assert torch.equal(model(x), expected)
    assert lines == ["1: relu not folded: its layer gives int8 codes"]


class Shared(nn.Module):
    """One activation module for two layers; `extra` uses it once more on something else."""

    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.a, self.b, self.act, self.extra = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), extra

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.act(self.a(x))))
        return self.act(-x) + 1 if self.extra else x + 1


def test_a_shared_activation_goes_only_if_every_use_does() -> None:
    plan = {"a": Int8Linear.from_float, "b": Int8Linear.from_float}
    x = torch.randn(3, 4)
    model = convert(Shared(False).eval(), plan)
    assert_fused(model, x, "act")
    assert [model.a.activation, model.b.activation] == ["relu", "relu"]
    assert_fused(convert(Shared(True).eval(), plan), x)
    assert_fused(convert(Shared(False).eval(), {"a": Int8Linear.from_float}), x)


class Tapped(nn.Module):
    """Something else reads the convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.mean()


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.fc(x)))


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)) + self.fc.weight.sum()


class TiedFollower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.other.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.bn(self.fc(x)))


class OptionalArgument(nn.Module):
    """With a mask the norm sees something else than the layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.fc(x)
        if mask is not None:
            y = y * mask
        return self.bn(y)


@pytest.mark.parametrize(
    "make",
    [
        Tapped,
        CalledTwice,
        ReadsWeight,
        TiedFollower,
        OptionalArgument,
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)),
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
    ],
)
def test_left_alone(make: Any) -> None:
    model = randomise(make())
    parameters = next(iter(model.parameters()))
    x = torch.randn(5, 3, 6, 6) if parameters.dim() == 4 else torch.randn(5, 4)
    state = copy.deepcopy(model.state_dict())
    assert_fused(model, x, tolerance=1e-12)
    after = model.state_dict()
    assert all(torch.equal(after[k], state[k]) for k in state)


@pytest.mark.parametrize("which", [0, 1])
def test_hooks_keep_their_module(which: int) -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model[which].register_forward_hook(lambda *_: None)
    lines = assert_fused(model, torch.randn(2, 4))
    assert "hook" in lines[0]


class Untraceable(nn.Module):
    """Control flow on values; `walk` goes through the parts by itself and keeps what the layer gives."""

    def __init__(self, walk: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.walk = walk

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) if x.sum() > 0 else self.features(-x)


class Walker(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        total = torch.zeros(())
        for layer in self.features:
            x = layer(x)
            total = total + x.sum()
        return total


def test_parts_of_a_model_that_cannot_be_traced() -> None:
    assert_fused(randomise(Untraceable(False)), torch.randn(3, 4), "features.1")


def test_a_part_whose_inside_is_read_is_left_alone() -> None:
    model = randomise(Walker(True))
    assert_fused(model, torch.randn(3, 4))
    state = copy.deepcopy(model.state_dict())
    features = list(model.features)
    with pytest.raises(ValueError, match="the output moved by"):
        fuse(model, torch.randn(3, 4))
    assert all(a is b for a, b in zip(model.features, features, strict=True))
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in state)


def test_undo_of_an_activation() -> None:
    """The converted layer runs without the activation again after a failed fuse."""
    model = convert(nn.Sequential(Walker(True)).eval(), {"0.features.0": Int8Linear.from_float})
    model[0].features[1] = nn.ReLU()
    x = torch.randn(3, 4)
    expected = model(x)
    with pytest.raises(ValueError, match="the output moved by"):
        fuse(model, x)
    assert model[0].features[0].activation == "none"
    assert torch.equal(model(x), expected)


def test_sequential_with_an_untraceable_child() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Untraceable(False)))
    assert_fused(model, torch.randn(3, 4), "1", "2.features.1")


class WSConv(nn.Conv2d):
    """Standardises its weight: a scale of the rows is lost."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), bias)


class NamedConv(nn.Conv2d):
    """Computes what nn.Conv2d does."""


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_subclasses_in_a_sequential_that_cannot_be_traced() -> None:
    model = randomise(nn.Sequential(NamedConv(3, 4, 3), nn.BatchNorm2d(4), Branching()))
    assert_fused(model, torch.randn(2, 3, 5, 5), "1")
    model = randomise(nn.Sequential(WSConv(3, 4, 3), nn.BatchNorm2d(4), Branching()))
    (line,) = assert_fused(model, torch.randn(2, 3, 5, 5), tolerance=1e-12)
    assert "WSConv has a _conv_forward of its own" in line


def test_tracing_leaves_nothing_behind() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.last: object = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.fc(x)
            self.new = 1
            return self.last

    model = Remembers().eval()
    fuse(model)
    assert model.last is None and not hasattr(model, "new")


def test_functional_activations_stay() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x))

    model = convert(Functional().eval(), {"fc": Int8Linear.from_float})
    assert_fused(model, torch.randn(2, 4))
    assert model.fc.activation == "none"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"fuse: model must be an nn[.]Module, got int"):
        fuse(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fuse: model must be in eval mode.*model.eval\(\)"):
        fuse(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="fuse: a batch must be a tensor"):
        fuse(nn.Sequential(nn.Linear(2, 2)).eval(), [torch.randn(2, 2)])  # type: ignore[arg-type]


def test_graph_modules_fold() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval()
    report: list[str] = []
    fuse(model, torch.randn(2, 3, 8, 8), report=report)
    assert report == ["1: batch norm folded into 0"]


def test_only_what_follows_the_layers_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    report: list[str] = []
    fuse(model, torch.randn(2, 3, 8, 8), layers=["2"], report=report)
    assert report == ["3: batch norm folded into 2"] and isinstance(model[1], nn.BatchNorm2d)

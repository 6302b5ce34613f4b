"""QAT: values and gradients by hand, training under masks, and the way into compiled layers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tautorch
from tautorch import distill
from tautorch.nn import Int8Conv2d, Int8Linear, LowRankLinear, SparseLinear
from tautorch.prune import apply_masks, compute_masks, hold_masks, prune
from tautorch.quantize import (
    FakeQuantInput,
    FakeQuantWeight,
    calibrate,
    cluster,
    finalize,
    gptq,
    prepare_qat,
    quantize_weight,
    step_parameters,
)


class Net(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).flatten(1))


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 2, 4, 4)


def compiled(model: nn.Module, quant: str) -> nn.Module:
    plan: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            plan[name] = partial(Int8Linear.from_float, quant=quant)
        elif isinstance(module, nn.Conv2d):
            plan[name] = partial(Int8Conv2d.from_float, quant=quant)
    return tautorch.convert(model, plan)


def shaken(model: nn.Module) -> nn.Module:
    """Steps and weights moved as training would."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.1 * torch.rand_like(p))
    return model


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("quant", ["dynamic", "static", "weight_only"])
def test_compiled_layers_compute_the_eval_forward(bits: int, quant: str) -> None:
    calibration = [images(), images()] if quant == "static" else None
    model = shaken(prepare_qat(Net(), bits=bits, quant=quant, calibration=calibration)).eval()
    x = images(16)
    with torch.no_grad():
        expected = model(x)
    weights = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "parametrizations")
    }
    finalize(model)
    assert {type(m) for m in model.modules()} <= {Net, nn.Identity, nn.Conv2d, nn.Linear}
    assert not any(m._forward_pre_hooks for m in model.modules())
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    got = compiled(model, quant)(x)
    # Every layer's integers are equal but where a value lies on a half within float rounding: no such here.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    top = 2 ** (bits - 1) - 1
    assert all(int(m.state_dict()["weight"].abs().max()) <= top for m in (model.conv1, model.conv2, model.fc))


def test_batch_norm_folds_into_the_steps() -> None:
    model = prepare_qat(Net(norm=True), bits=4)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1, 0.0, 1.0, 1.0, -3.0]))
    for _ in range(3):
        model(images())
    model.eval()
    x = images(16)
    with torch.no_grad():
        expected = model(x)
    q = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}["conv1"]
    steps = model.conv1.parametrizations.weight[0].scale().detach()
    q = (q / steps.reshape(-1, 1, 1, 1)).round()
    small = compiled(tautorch.fuse(finalize(model)), "dynamic")
    signs = torch.tensor([1, -1, 1, 1, 0, 1, 1, -1]).reshape(-1, 1, 1, 1)
    assert torch.equal(small.conv1.state_dict()["weight"].float(), q * signs)
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_weight_gradients_by_hand() -> None:
    weight = torch.tensor([[0.31, -0.9, 2.4, 0.0], [5.0, -5.0, 0.26, 0.1]], requires_grad=True)
    quantizer = FakeQuantWeight(
        4, torch.tensor([0.2, 0.5]), mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]) > 0
    )
    up = torch.randn(2, 4)
    out = quantizer(weight)
    (out * up).sum().backward()
    w, s, g = weight.detach().double().numpy(), np.array([[0.2], [0.5]]), up.double().numpy()
    v = w / s
    q = np.clip(np.rint(v), -7, 7)
    np.testing.assert_allclose(out.detach().numpy(), q * s, rtol=1e-6)
    inside = np.abs(v) <= 7
    kept = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(weight.grad, g * inside * kept, rtol=1e-6)
    slope = np.where(inside, q - v, q)
    np.testing.assert_allclose(quantizer.step.grad, (g * slope).sum(1) / np.sqrt(4 * 7), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_at_the_end_of_the_grid_learn(bits: int) -> None:
    """top * step over step is a rounding above top for one step in twelve."""
    top = 2 ** (bits - 1) - 1
    step = torch.rand(1000) + 0.01
    weight = (step * top).unsqueeze(1).requires_grad_()
    assert bool((weight.detach() / step.unsqueeze(1) > top).any())
    FakeQuantWeight(bits, step)(weight).sum().backward()
    assert weight.grad is not None and bool((weight.grad == 1).all())


def test_static_input_gradients_by_hand() -> None:
    quantizer = FakeQuantInput(samples=False, scale=0.1, zero_point=-100)
    x = torch.tensor([[0.26, -4.0, 30.0], [1.0, 22.0, -2.74]], requires_grad=True)
    up = torch.randn(2, 3)
    out = quantizer(x)
    (out * up).sum().backward()
    v, g = x.detach().double().numpy() / 0.1, up.double().numpy()
    q = np.clip(np.rint(v) - 100, -128, 127) + 100
    np.testing.assert_allclose(out.detach().numpy(), q * 0.1, rtol=1e-5)
    inside = (v >= -28) & (v <= 227)
    np.testing.assert_allclose(x.grad, g * inside, rtol=1e-6)
    expected = (g * np.where(inside, q - v, q)).sum() / np.sqrt(3 * 127)
    np.testing.assert_allclose(quantizer.step.grad, [expected], rtol=1e-3)


@pytest.mark.parametrize("samples", [False, True])
def test_dynamic_inputs_are_the_kernels(samples: bool) -> None:
    x = torch.randn(3, 4, 5, 5) if samples else torch.randn(3, 7, 9)
    x.requires_grad_()
    out = FakeQuantInput(samples)(x)
    amax = x.detach().numpy().reshape(3, -1) if samples else x.detach().numpy().reshape(21, 9)
    rows, top = amax, np.abs(amax).max(1, keepdims=True)
    expected = np.rint(rows * (np.float32(127) / top)) * (top / np.float32(127))
    np.testing.assert_allclose(out.detach().numpy().reshape(rows.shape), expected, rtol=1e-6)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    if samples:
        assert torch.equal(FakeQuantInput(True)(x[0]), out[0])


def test_before_training_it_is_rounding_to_the_best_scales() -> None:
    net = Net()
    plain = copy.deepcopy(net)
    prepare_qat(net, bits=4, quant="weight_only")
    for name in ("conv1", "conv2", "fc"):
        q, scale = quantize_weight(plain.get_submodule(name).weight, search=True, bits=4)
        shape = (-1, *[1] * (q.dim() - 1))
        assert torch.equal(net.get_submodule(name).weight, q.float() * scale.reshape(shape))
    ranges = calibrate(plain, [images()], "minmax")
    prepare_qat(plain, quant="static", calibration=[images()], observer="minmax", layers=["fc"])
    assert plain.fc.input_quantizer.zero_point.item() == -128
    assert set(ranges) == {"conv1", "conv2", "fc"}


def loss(student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def mistakes(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x) - teacher(x)).square().mean())


def pruned_teacher() -> nn.Sequential:
    teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        teacher[2].weight[:, 1::4] = 0.0
    return teacher


def test_training_recovers_what_four_bits_lose() -> None:
    """Of one network of this size 0.4 to 1.2 of the mistakes are left; the median says more."""
    left = []
    for _ in range(5):
        teacher = pruned_teacher()
        student = prepare_qat(copy.deepcopy(teacher), bits=4)
        x = torch.randn(512, 16)
        before = mistakes(student, teacher, x)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
        for _ in range(300):
            batch = x[torch.randint(0, 512, (128,))]
            optimizer.zero_grad()
            loss(student(batch), teacher(batch), batch).backward()
            optimizer.step()
            schedule.step()
        left.append(mistakes(student, teacher, x) / before)
    assert sorted(left)[2] < 0.96, left


@pytest.mark.parametrize("learn", [True, False])
def test_distilled_with_zeros_kept(learn: bool) -> None:
    teacher = pruned_teacher()
    student = prepare_qat(copy.deepcopy(teacher), bits=4, learn_steps=learn)
    x = torch.randn(64, 16)
    steps = [p.detach().clone() for p in step_parameters(student)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    distill.Distiller(teacher, student, loss, optimizer, progress=False).fit([(x, x)] * 8, epochs=2)
    moved = [not torch.equal(a, b) for a, b in zip(steps, step_parameters(student), strict=True)]
    assert moved == [learn, learn]
    student.eval()
    expected = student(x)
    finalize(student)
    assert torch.equal(student[2].weight[:, 1::4], torch.zeros(4, 8))
    plan: Any = {"0": Int8Linear.from_float, "2": partial(SparseLinear.from_float, pattern="unstructured")}
    tautorch.convert(student, plan)
    torch.testing.assert_close(student(x), expected, rtol=1e-5, atol=1e-5)


def test_state_dict_and_copies() -> None:
    x, batches = torch.randn(4, 2, 4, 4), [images()]
    model = shaken(prepare_qat(Net(), quant="static", calibration=batches)).eval()
    twin = prepare_qat(Net(), quant="static", calibration=[images()]).eval()
    twin.load_state_dict(model.state_dict())
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    names = set(model.state_dict())
    assert {"fc.parametrizations.weight.original", "fc.parametrizations.weight.0.step"} <= names
    assert {"fc.input_quantizer.step", "fc.input_quantizer.zero_point"} <= names
    assert set(finalize(model).state_dict()) == set(Net().state_dict())


@pytest.mark.parametrize("prepare", [prepare_qat, cluster])
def test_parameters_keep_their_order(prepare: Any) -> None:
    model = Net(norm=True)
    order = [name for name, _ in model.named_parameters()]
    model = finalize(prepare(model))
    assert [name for name, _ in model.named_parameters()] == order
    assert list(model.state_dict()) == list(Net(norm=True).state_dict())


def test_a_frozen_layer_stays_as_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 16)
    model[0].requires_grad_(False)
    prepare_qat(model, bits=4, quant="static", calibration=[x])
    assert [p.requires_grad for p in step_parameters(model)] == [False, False, True, True]
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    expected = model[:2](x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight, before[0]) and torch.equal(model[:2](x), expected)
    assert not torch.equal(model[2].weight, before[1])
    finalize(model)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def gaussian(sparsity: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.normal_()
    # Not the small ones, which would round to zero.
    scores = {"importance": lambda _, layer: torch.rand_like(layer.weight)}
    return prune(model, sparsity=sparsity, **scores) if sparsity else model


def masks(model: nn.Sequential) -> list[Tensor | None]:
    return [model[i].parametrizations.weight[0].mask for i in (0, 2)]


ON_GRID: dict[str, Any] = {
    "gptq": lambda model: gptq(model, [torch.randn(256, 64)], bits=4),
    "finalize": lambda model: finalize(prepare_qat(model, bits=4)),
    "both": lambda model: gptq(finalize(prepare_qat(model, bits=4)), [torch.randn(256, 64)], bits=4),
}


@pytest.mark.parametrize("on_grid", ON_GRID)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("copied", [False, True])
def test_only_what_was_pruned_is_held_on_a_grid(on_grid: str, sparsity: float, copied: bool) -> None:
    model = gaussian(sparsity)
    kept = [model[i].weight != 0 for i in (0, 2)]
    names = set(model.state_dict())
    model = ON_GRID[on_grid](model)
    assert set(model.state_dict()) == names
    zeros = [model[i].weight == 0 for i in (0, 2)]
    assert all(int((z & k).sum()) > 0.02 * k.sum() for z, k in zip(zeros, kept, strict=True))  # by rounding
    model = prepare_qat(copy.deepcopy(model) if copied else model, bits=4)
    expected: list[Tensor | None] = kept if sparsity else [None, None]
    for mask, wanted in zip(masks(model), expected, strict=True):
        assert mask is wanted or (mask is not None and wanted is not None and torch.equal(mask, wanted))
    model[0].weight.sum().backward()
    weight = model[0].parametrizations.weight
    inner = weight.original.abs() < 6.5 * weight[0].scale()[:, None]  # at the ends rounding decides
    assert torch.equal(weight.original.grad[inner], kept[0].float()[inner])


def test_pruning_on_a_grid_is_held_too() -> None:
    model = gptq(gaussian(0.0), [torch.randn(256, 64)], bits=4)
    once = compute_masks(model, pattern="4x1", sparsity=0.25)
    twice = {name: mask & (torch.rand(mask.shape) < 0.9) for name, mask in once.items()}
    apply_masks(model, once)
    hold_masks(model, twice).remove()
    assert any(int((model.get_submodule(name).weight[mask] == 0).sum()) for name, mask in twice.items())
    for mask, wanted in zip(masks(prepare_qat(model)), twice.values(), strict=True):
        assert torch.equal(mask, wanted)


def test_zeros_of_unknown_origin_count_as_pruned() -> None:
    model = gptq(gaussian(0.0), [torch.randn(256, 64)], bits=4)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0  # by hand
    for name in ("weight_kept", "weight_zeros"):  # as an older version left it
        del model[2]._buffers[name]
    wanted = [model[i].weight != 0 for i in (0, 2)]
    for mask, nonzero in zip(masks(prepare_qat(model)), wanted, strict=True):
        assert torch.equal(mask, nonzero)


def test_masks_travel_in_the_state_dict() -> None:
    model, plain, x = prepare_qat(gaussian(0.5)).eval(), prepare_qat(gaussian(0.0)).eval(), torch.randn(4, 64)
    other = copy.deepcopy(model)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(x), plain(x)) and masks(other) == [None, None]
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(masks(plain), masks(model), strict=True))


def test_a_later_dynamic_qat_takes_the_static_ranges_off() -> None:
    model = finalize(prepare_qat(gaussian(0.0), quant="static", calibration=[torch.randn(32, 64)]))
    assert float(model[0].x_scale) > 0
    finalize(prepare_qat(model))
    assert model[0].x_scale is None and model[0].x_zero_point is None


def test_mixed_bits_and_factors() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    tautorch.factorize.factorize(model, rank=6, layers=["0"])
    prepare_qat(model, bits=8, layers=["2"])
    prepare_qat(model, bits=4)  # the rest
    model.eval()
    x = torch.randn(9, 32)
    expected = model(x)
    finalize(model)
    plan: Any = {"0": partial(LowRankLinear.from_float, weight_dtype=torch.int8), "2": Int8Linear.from_float}
    tautorch.convert(model, plan)
    assert int(model[0].state_dict()["down"].abs().max()) == 7
    assert int(model[2].state_dict()["weight"].abs().max()) > 60
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_and_keyword_calls() -> None:
    layer = prepare_qat(nn.Sequential(nn.Linear(8, 4).to(torch.bfloat16)))[0]
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    out = layer(input=x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prepare_qat(nn.Sequential(nn.Linear(8, 4)))(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("quant", ["dynamic", "static"])
def test_torch_compile_takes_it_whole(quant: str) -> None:
    x = torch.randn(4, 16)
    model = prepare_qat(
        nn.Sequential(nn.Linear(16, 8)), quant=quant, calibration=[x] if quant == "static" else None
    )
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x), model(x))
    fast(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    assert got.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


def test_what_convert_refuses_is_left_alone() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(encoder, nn.Linear(8, 8))
    prepare_qat(model)
    assert type(encoder.linear1) is nn.Linear
    with pytest.raises(ValueError, match=r"layer '0\.linear1' cannot be used: its parent"):
        prepare_qat(model, layers=["0.linear1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be a whole number from 4 to 8, got 3"),
        ({"quant": "int8"}, "quant must be one of dynamic, static, weight_only"),
        ({"quant": "static"}, "calibration must hold batches for quant='static' alone, got None"),
        ({"calibration": [images()]}, "got it with quant='dynamic'"),
        ({"quant": "static", "calibration": []}, "at least one batch"),
        ({"layers": ["head"]}, "must name layers of the model, got 'head'"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, **options)
    assert set(model.state_dict()) == set(Net().state_dict())


def test_a_weight_with_nan_changes_nothing() -> None:
    model = Net()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of layer 'fc' must be finite"):
        prepare_qat(model)
    assert type(model.conv1) is nn.Conv2d

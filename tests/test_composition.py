"""Every ordered pair of distil, prune, factorise and quantise, to compiled layers.

Each step is checked for what it did to the model, and the pair for the first step's work still being there:
zeros, ranks, grids. Where a second step would undo the first, it must refuse and say the right order.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tautorch as tt
from tautorch import distill, factorize, prune, quantize
from tautorch.factorize import FactorizedConv2d, FactorizedLinear
from tautorch.nn import Int8Conv2d, Int8Linear, LowRankConv2d, LowRankLinear, SparseConv2d, SparseLinear

COMPILED = (Int8Conv2d, Int8Linear, LowRankConv2d, LowRankLinear, SparseConv2d, SparseLinear)
#: Where the second step may not touch what the first did, the two share the layers out.
APART = {("prune", "factorise"), ("quantise", "factorise")}
FIRST_HALF, SECOND_HALF = ["conv", "fc1"], ["conv2", "fc2"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def images(seed: int = 0, count: int = 16) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


# ---- the steps ----


def distilled(model: nn.Module, layers: list[str] | None, **options: Any) -> nn.Module:
    teacher = net().eval()
    with torch.no_grad():
        teacher.fc2.bias += 1.0
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loader = [(images(seed), torch.zeros(16, dtype=torch.long)) for seed in range(3)]
    trainer = distill.Distiller(teacher, model, distill.SoftTarget(), optimizer, progress=False, **options)
    trainer.fit(loader, 2)
    return model


def pruned(model: nn.Module, layers: list[str] | None) -> nn.Module:
    return prune.prune(model, pattern="4x1", sparsity=0.5, layers=layers)


def factorised(model: nn.Module, layers: list[str] | None) -> nn.Module:
    return factorize.factorize(model, "whitened", budget=0.5, layers=layers, calibration=[images()])


def quantised(model: nn.Module, layers: list[str] | None) -> nn.Module:
    return quantize.gptq(model, [images()], bits=4, layers=layers)


STEPS: dict[str, Callable[..., nn.Module]] = {
    "distil": distilled,
    "prune": pruned,
    "factorise": factorised,
    "quantise": quantised,
}


# ---- what a step leaves ----


def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: m.weight == 0
        for n, m in plain_layers(model).items()
        if float((m.weight == 0).float().mean()) > 0.2
    }


def pairs(model: nn.Module) -> dict[str, int]:
    return {
        n: m.rank for n, m in model.named_modules() if isinstance(m, (FactorizedLinear, FactorizedConv2d))
    }


def grids(model: nn.Module) -> dict[str, Tensor]:
    """The steps of the layers whose weights are whole numbers of them, in [-7, 7]."""
    found = {}
    for name, layer in plain_layers(model).items():
        steps = layer._buffers.get("weight_scale")
        if steps is not None:
            q = layer.weight.detach().double().flatten(1) / steps.double()[:, None]
            assert float((q - q.round()).abs().max()) < 1e-4 and float(q.abs().max()) < 7.5
            found[name] = steps
    return found


def compiled(model: nn.Module) -> nn.Module:
    """Every layer by the kernel that fits what was done to it."""
    plan: dict[str, Any] = {}
    on_grid, sparse = grids(model), zeros(model)
    for name, module in model.named_modules():
        conv = isinstance(module, (nn.Conv2d, FactorizedConv2d))
        if isinstance(module, (FactorizedLinear, FactorizedConv2d)):
            dtype = torch.int8 if f"{name}.down" in on_grid else torch.float32
            plan[name] = partial((LowRankConv2d if conv else LowRankLinear).from_float, weight_dtype=dtype)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and name.rpartition(".")[0] not in plan:
            if name in sparse:
                dtype = torch.int8 if name in on_grid else torch.float32
                kind: Any = SparseConv2d if conv else SparseLinear
                plan[name] = partial(kind.from_float, pattern="4x1", weight_dtype=dtype)
            else:
                plan[name] = (Int8Conv2d if conv else Int8Linear).from_float
    return tt.convert(copy.deepcopy(model).eval(), plan)


@pytest.mark.parametrize(("first", "second"), list(permutations(STEPS, 2)))
def test_pair(first: str, second: str) -> None:
    apart = (first, second) in APART
    model = net()
    start = copy.deepcopy(model.state_dict())
    STEPS[first](model, FIRST_HALF if apart else None)
    before = {"prune": zeros(model), "factorise": pairs(model), "quantise": grids(model)}
    if first in before:
        assert before[first]
    if first == "distil":
        assert all(not torch.equal(v, start[k]) for k, v in model.state_dict().items())
    weights = {n: m.weight.detach().clone() for n, m in plain_layers(model).items()}

    if second == "distil":
        if first == "quantise":
            model = quantised_training(model)
        else:
            distilled(model, None, keep_zeros=True if first == "prune" else None)
        moved = [
            n
            for n, m in plain_layers(model).items()
            if n in weights and not torch.equal(m.weight, weights[n])
        ]
        assert moved
    else:
        STEPS[second](model, None)  # which passes over what it would undo

    if first == "prune":
        after = zeros(model)
        assert all(bool((after[name] >= mask).all()) for name, mask in before["prune"].items())
    if first == "factorise":
        assert pairs(model) == before["factorise"]
    if first == "quantise":
        kept = grids(model)
        assert set(before["quantise"]) <= set(kept)
    if "prune" in (first, second):
        assert zeros(model)
    if "factorise" in (first, second):
        assert pairs(model)
    if "quantise" in (first, second):
        assert grids(model)

    model.eval()
    fast = compiled(model)
    assert sum(isinstance(m, COMPILED) for m in fast.modules()) == 4
    with torch.no_grad():
        expected, got = model(images(9)), fast(images(9))
    assert got.shape == expected.shape
    assert float((got - expected).norm() / expected.norm()) < 0.05  # int8 inputs


def quantised_training(model: nn.Module) -> nn.Module:
    """Training leaves the grid: refused on plain layers; `prepare_qat` starts from the grid."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer .conv. .* lies on the grid .*quantize.prepare_qat"):
        distilled(model, None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    quantize.prepare_qat(model, bits=4)
    distilled(model, None)
    return quantize.finalize(model)


# ---- what would undo an earlier step ----


def test_training_a_pruned_model_must_say_what_becomes_of_its_zeros() -> None:
    model = pruned(net(), None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"50% of the weights of the student's layer 'conv' .* keep_zeros=True"
    ):
        distilled(model, None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    held = copy.deepcopy(model)
    distilled(held, None, callbacks=[prune.hold_masks(held)])
    assert all(torch.equal(zeros(held)[n], mask) for n, mask in zeros(model).items())
    hooked = copy.deepcopy(model)
    optimizer = torch.optim.SGD(hooked.parameters(), 0.05)
    with prune.hold_masks(hooked, optimizer=optimizer):
        distill.Distiller(net().eval(), hooked, distill.SoftTarget(), optimizer, progress=False).fit(
            [(images(), torch.zeros(16, dtype=torch.long))], 1
        )
    assert all(torch.equal(zeros(hooked)[n], mask) for n, mask in zeros(model).items())
    distilled(model, None, keep_zeros=False)
    assert not zeros(model)


def test_masks_hold_the_zeros_of_every_layer_beside_a_schedule() -> None:
    for schedule in ({"begin": 100, "end": 200}, {"end": 4}):
        model = pruned(net(), None)
        before = zeros(model)
        callbacks = [prune.Schedule(model, 0.8, pattern="4x1", **schedule)]
        distilled(model, None, callbacks=callbacks, keep_zeros=True)
        assert all(bool(zeros(model)[layer][mask].all()) for layer, mask in before.items())


def test_a_schedule_goes_on_with_what_it_pruned() -> None:
    model = net()
    schedule = prune.Schedule(model, 0.5, pattern="4x1", end=4)
    distilled(model, None, callbacks=[schedule])
    before = zeros(model)
    distilled(model, None, callbacks=[schedule])
    assert len(before) == 4 and all(torch.equal(zeros(model)[layer], mask) for layer, mask in before.items())


NOT_HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "a schedule that has not begun": lambda m: prune.Schedule(m, 0.8, pattern="4x1", begin=100, end=200),
    "masks of other layers": lambda m: prune.hold_masks(m, {"conv": m.conv.weight != 0}),
    "nobody": lambda _: lambda run: None,
}


@pytest.mark.parametrize("name", NOT_HOLDERS)
def test_zeros_of_a_layer_that_nothing_holds_are_an_error(name: str) -> None:
    model = pruned(net(), None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"student's layer 'conv2?' are pruned"):
        distilled(model, None, callbacks=[NOT_HOLDERS[name](model)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_soft_thresholds_hold_no_zeros_but_may_make_them() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    data = [(images(), torch.zeros(16, dtype=torch.long))]

    def run(**options: Any) -> distill.Distiller:
        return distill.Distiller(
            net().eval(), model, distill.SoftTarget(), optimizer, progress=False, **options
        )

    with_zeros = run(callbacks=[prune.SoftThreshold(model, optimizer, sparsity=0.5)])
    with_zeros.fit(data, 2)
    with_zeros.fit(data, 1)  # its own zeros are its business
    assert len(zeros(model)) == 4
    with pytest.raises(ValueError, match="keep_zeros=True"):
        run(callbacks=[prune.SoftThreshold(model, optimizer, lam=1e-4)]).fit(data, 1)
    before = zeros(model)
    run(callbacks=[prune.SoftThreshold(model, optimizer, lam=1e-4)], keep_zeros=True).fit(data, 1)
    assert all(bool(zeros(model)[layer][mask].all()) for layer, mask in before.items())


def test_keep_zeros_holds_a_layer_of_few_zeros_too() -> None:
    model = net()
    with torch.no_grad():
        model.fc1.weight.view(-1)[::50] = 0.0  # 2 %
    pruned(model, ["fc2"])
    distilled(model, None, keep_zeros=True)
    assert int((model.fc1.weight == 0).sum()) == -(-model.fc1.weight.numel() // 50)


@pytest.mark.parametrize("then", [quantize.prepare_qat, quantize.cluster, prune.L0Gates])
def test_masks_leave_the_zeros_to_what_comes_after_them(then: Callable[[nn.Module], Any]) -> None:
    model = pruned(net(), None)
    before = zeros(model)
    handle = prune.hold_masks(model)
    made = then(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the gradient of a weight that is no parameter
        distilled(model, None, callbacks=[handle])
    if isinstance(made, prune.L0Gates):
        made.finalize()
    else:
        quantize.finalize(model)
    assert all(bool(zeros(model)[layer][mask].all()) for layer, mask in before.items())


@pytest.mark.parametrize("watch", [prune.Movement, partial(prune.SoftThreshold, sparsity=0.5)])
def test_what_watches_plain_weights_says_that_they_are_no_more(watch: Callable[..., Any]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    watching = watch(model, optimizer)
    quantize.prepare_qat(model, layers=["fc1"])
    model(images()).square().sum().backward()
    with pytest.raises(ValueError, match=r"layer 'fc1' must keep the plain weight .* call remove\(\)"):
        optimizer.step()
    watching.remove()
    optimizer.step()


def test_a_resumed_run_keeps_the_zeros_of_its_start(tmp_path: Path) -> None:
    data = [(images(), torch.zeros(16, dtype=torch.long)) for _ in range(3)]
    start = pruned(net(), ["conv"])

    def run(epochs: int, **options: Any) -> nn.Module:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        shrink = prune.SoftThreshold(model, optimizer, sparsity=0.5)  # its zeros come and go
        distill.Distiller(
            None,
            model,
            lambda out, _, target: F.cross_entropy(out, target),
            optimizer,
            callbacks=[shrink],
            keep_zeros=True,
            progress=False,
        ).fit(data, epochs, **options)
        return model

    run(1, checkpoint=tmp_path)
    resumed, whole = run(3, checkpoint=tmp_path, resume=True), run(3)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())
    assert all(bool(zeros(resumed)[layer][mask].all()) for layer, mask in zeros(start).items())


def test_keep_zeros_lets_go_after_the_fit() -> None:
    model = distilled(pruned(net(), None), None, keep_zeros=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model(images()).square().sum().backward()
    optimizer.step()
    assert not zeros(model)


def test_factors_of_a_pruned_layer() -> None:
    model = pruned(net(), ["fc1"])
    with pytest.raises(ValueError, match=r"layer 'fc1' .* 50% of its weights are pruned, .* factorise first"):
        factorize.factorize(model, rank=4, layers=["fc1"])
    assert isinstance(model.fc1, nn.Linear)
    factorize.factorize(model, rank=4, layers=["fc1"], ignore_zeros=True)
    assert isinstance(model.fc1, FactorizedLinear)
    model = pruned(net(), None)
    with pytest.raises(
        ValueError, match=r"none that may be replaced \('conv': 50% of its weights are pruned"
    ):
        factorize.factorize(model, rank=4)


def test_factors_of_a_quantised_layer() -> None:
    model = quantised(net(), None)
    with pytest.raises(ValueError, match=r"its weight is quantised, .* factorise first, then quantise"):
        factorize.factorize(model, rank=4, layers=["fc1"])


@pytest.mark.parametrize(
    "prepare",
    [lambda m: quantize.prepare_qat(m, bits=4), lambda m: quantize.cluster(m, bits=4)],
    ids=["qat", "cluster"],
)
def test_prepared_layers_are_left_alone_and_the_order_is_said(prepare: Callable[[nn.Module], Any]) -> None:
    model = net()
    prepare(model)
    state = copy.deepcopy(model.state_dict())
    order = r"prune and factorise before quantize\.\w+, or call quantize.finalize first"
    for options in ({}, {"layers": ["fc1"]}):
        with pytest.raises(ValueError, match=order):
            prune.prune(model, sparsity=0.5, **options)
        with pytest.raises(ValueError, match=order):
            factorize.factorize(model, rank=4, **options)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    prune.prune(quantize.finalize(model), sparsity=0.5)
    assert zeros(model)


def test_compensation_would_leave_the_grid() -> None:
    model = quantised(net(), None)
    with pytest.raises(ValueError, match=r"sparsegpt moves weights off their grid; prune first"):
        prune.prune(model, "sparsegpt", sparsity=0.5, calibration=[images()])
    with pytest.raises(ValueError, match=r"layer 'conv' must not be quantised yet; remove channels first"):
        prune.prune_channels(model, images(), 0.5)

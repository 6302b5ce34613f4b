"""Every compiled layer through `save` and `load`, and files that lie about what is in it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tautorch import storage_file
from tautorch.nn import MODULES
from tautorch.storage import CheckpointError, load, save

Make = Callable[[nn.Module], nn.Module]
STATIC = {"quant": "static", "x_scale": 0.05, "x_zero_point": -3}
DTYPES = (torch.int8, torch.float32)
PATTERNS = ("unstructured", "4x1", "2:4", "16x16", "32x32")


def thin(layer: nn.Module, pattern: str) -> Tensor:
    """A mask that every pattern allows: a chessboard of 32x32, the first two of each four for 2:4."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rows, cols = weight.shape[0], weight[0].numel()
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    if pattern == "2:4":
        mask[:, torch.arange(cols) % 4 < 2] = True
    else:
        mask |= (torch.arange(rows)[:, None] // 32 + torch.arange(cols) // 32) % 2 == 0
    return mask.reshape(weight.shape)


CASES: dict[str, list[dict[str, Any]]] = {
    "Int8Linear": [{}, {"activation": "gelu"}, {"quant": "weight_only"}, STATIC],
    "Int8Conv2d": [{}, {"activation": "relu"}, STATIC],
    "SparseLinear": [{"pattern": p, "weight_dtype": d} for p, d in itertools.product(PATTERNS, DTYPES)],
    "SparseConv2d": [{"pattern": p, "weight_dtype": d} for p, d in itertools.product(PATTERNS, DTYPES)],
    "LowRankLinear": [{"rank": 5, "weight_dtype": d, "activation": "silu"} for d in DTYPES],
    "LowRankConv2d": [{"rank": 5, "weight_dtype": d} for d in DTYPES],
}
EVERY = [
    pytest.param(name, options, bias, id=f"{name}-{i}-{'bias' if bias else 'plain'}")
    for name, cases in CASES.items()
    for i, options in enumerate(cases)
    for bias in (True, False)
]


def float_model(name: str, bias: bool) -> nn.Sequential:
    if name.endswith("Linear"):
        return nn.Sequential(nn.Linear(72, 68, bias=bias))
    return nn.Sequential(nn.Conv2d(8, 72, 3, stride=2, padding=1, bias=bias))


def inputs(name: str) -> Tensor:
    return torch.randn(3, 72) if name.endswith("Linear") else torch.randn(2, 8, 7, 6)


def packed_model(name: str, options: dict[str, Any], bias: bool) -> nn.Module:
    model = float_model(name, bias)
    if "pattern" in options:
        options = {**options, "mask": thin(model[0], options["pattern"])}
    model[0] = MODULES[name].from_float(model[0], **options)  # type: ignore[attr-defined]
    return model.eval()


def test_every_compiled_layer_is_here() -> None:
    assert set(CASES) == set(MODULES)


@pytest.mark.parametrize(("name", "options", "bias"), EVERY)
@pytest.mark.parametrize("ran", [False, True])
def test_round_trip(tmp_path: Path, name: str, options: dict[str, Any], bias: bool, ran: bool) -> None:
    """Saved before and after the layer packed itself: the same predictions to the bit, the same tensors."""
    model, x = packed_model(name, options, bias), inputs(name)
    if ran:
        model(x)
    path = tmp_path / "m.safetensors"
    save(model, path)
    expected = model(x)
    loaded = load(path, lambda: float_model(name, bias)).eval()
    assert type(loaded[0]) is MODULES[name]
    assert torch.equal(loaded(x), expected)
    assert loaded[0].get_config() == model[0].get_config()
    before, after = model.state_dict(), loaded.state_dict()
    assert sorted(before) == sorted(after) == sorted(load_file(path))
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


def test_the_file_is_as_small_as_its_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    model[0] = MODULES["Int8Linear"].from_float(model[0])  # type: ignore[attr-defined]
    save(model, tmp_path / "m.safetensors")
    assert 0 < (tmp_path / "m.safetensors").stat().st_size - 1024 * (1024 + 4 + 4) < 2048


def rewritten(path: Path, name: str, value: Tensor) -> None:
    """Puts other values under a tensor's name, with all checksums right."""
    document, _ = storage_file.read(path)
    tensors = load_file(path)
    tensors[name] = value.contiguous()
    document["sha256"][name] = storage_file.digest(tensors[name])
    storage_file.write(path, tensors, document)


def save_case(path: Path, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    save(packed_model(name, options, True), path)
    return load_file(path)


def assert_rejected(path: Path, name: str, match: str | None = None) -> None:
    skeleton = float_model(name, True)
    before = (skeleton[0], skeleton[0].weight.detach().clone())
    with pytest.raises(CheckpointError, match=match):
        load(path, skeleton)
    assert skeleton[0] is before[0]
    assert torch.equal(skeleton[0].weight, before[1])


SPARSE = [
    pytest.param(name, pattern, id=f"{name}-{pattern}")
    for name in ("SparseLinear", "SparseConv2d")
    for pattern in PATTERNS
    if pattern != "2:4"
]


@pytest.mark.parametrize(("name", "pattern"), SPARSE)
@pytest.mark.parametrize("kind", ["beyond", "negative", "falling", "first", "last", "equal"])
def test_indices_that_point_elsewhere(tmp_path: Path, name: str, pattern: str, kind: str) -> None:
    path = tmp_path / "m.safetensors"
    tensors = save_case(path, name, {"pattern": pattern})
    col, crow = tensors["0.col_indices"].clone(), tensors["0.crow_indices"].clone()
    assert len(col) > 1 and len(crow) > 2
    match kind:
        case "beyond":
            col[-1] = 20_000
        case "negative":
            col[0] = -1
        case "falling":
            crow[1] = crow[-1] + 5
        case "first":
            crow[0] = -4
        case "last":
            crow[-1] = 30_000
        case "equal":
            col[1] = col[0]
    changed = "0.col_indices" if kind in ("beyond", "negative", "equal") else "0.crow_indices"
    rewritten(path, changed, col if changed == "0.col_indices" else crow)
    assert_rejected(path, name, "indices")


@pytest.mark.parametrize(("name", "options", "bias"), [p for p in EVERY if p.values[2]])
def test_values_and_shapes_that_cannot_be(
    tmp_path: Path, name: str, options: dict[str, Any], bias: bool
) -> None:
    """Each tensor in turn: another shape, another kind, not finite."""
    path = tmp_path / "m.safetensors"
    tensors = save_case(path, name, options)
    for key, value in tensors.items():
        wrong = [torch.cat([value, value]), value.double() if not value.is_floating_point() else value.int()]
        if value.is_floating_point():
            wrong += [
                value.clone().fill_(float("nan")),
                value.clone().index_fill_(0, torch.tensor(0), -torch.inf),
            ]
        for bad in wrong:
            rewritten(path, key, bad)
            assert_rejected(path, name)
        rewritten(path, key, value)
    load(path, lambda: float_model(name, bias))


@pytest.mark.parametrize("name", CASES)
def test_any_number_in_a_configuration(tmp_path: Path, name: str) -> None:
    """A false size is an error and not an allocation; a true one in another form still loads."""
    path = tmp_path / "m.safetensors"
    save_case(path, name, CASES[name][0])
    document, _ = storage_file.read(path)
    tensors = load_file(path)
    config = document["modules"]["0"]["config"]
    wrong: list[Any] = [0, -1, 2**31, 2**40, 2**70, 1e30, "x", None, [], [2**40, 2**40], {"a": 1}]
    loads: set[str] = set()
    for key, value in list(config.items()):
        for other in random.sample(wrong, len(wrong)):
            config[key] = other
            storage_file.write(path, tensors, document)
            try:
                loaded = load(path, lambda: float_model(name, True))
            except CheckpointError:
                continue
            loaded.eval()(inputs(name))  # what loads must run
            loads.add(key)
        config[key] = value
    assert "bias" in loads  # any true value


@pytest.mark.parametrize("name", CASES)
def test_random_bytes_under_right_checksums_never_crash(tmp_path: Path, name: str) -> None:
    """What a forger can do to the integers: an error, or a layer that runs."""
    path = tmp_path / "m.safetensors"
    for options in CASES[name]:
        tensors = save_case(path, name, options)
        for key, value in tensors.items():
            if value.is_floating_point():
                continue
            info = torch.iinfo(value.dtype)
            noise = torch.randint(info.min, info.max, value.shape, dtype=torch.int64).to(value.dtype)
            rewritten(path, key, noise)
            try:
                loaded = load(path, lambda: float_model(name, True))
            except CheckpointError:
                continue
            finally:
                rewritten(path, key, value)
            assert loaded.eval()(inputs(name)).isfinite().all()

"""Block by block: the same as the whole model at once, from files, in the memory of about a block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tautorch.layerwise import layerwise
from tautorch.prune import prune
from tautorch.quantize import calibrate, gptq

BLOCKS, WIDTH = 3, 8


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.register_buffer("gain", torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
        y: Tensor = self.down(torch.relu(self.up(self.norm(x) + shift))) * scale * self.gain
        return x + y, None


class Model(nn.Module):
    """The root reads a parameter of its own, blocks take a keyword and give tuples, the head is tied."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS, form: str = "mixed") -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.randn(5, width))
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.form = form

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        shift = self.position.mean(0)
        for layer in self.layers:
            if self.form == "mixed":
                x = layer(x, shift, scale=0.5)[0]
            elif self.form == "named":
                x = layer(shift=shift, x=x)[0]
            else:
                x = layer(x, shift)[0]
        out: Tensor = self.head(self.norm(x))
        return out


def build(form: str = "mixed") -> Model:
    torch.manual_seed(1)
    return Model(form=form).eval()


def empty(form: str = "mixed") -> Model:
    with torch.device("meta"):
        return Model(form=form).eval()


def batches() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randint(0, 11, (rows, 5)) for rows in (4, 3, 4)]


def saved(model: nn.Module, folder: Path) -> Path:
    """As large models are shipped: two shards, an index, and tied weights once."""
    state = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    folder.mkdir()
    for file, part in parts.items():
        save_file({name: state[name].clone() for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def written(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {file: load_file(folder / file) for file in set(index.values())}
    assert sorted(index) == sorted(name for part in found.values() for name in part)
    return {name: found[file][name] for name, file in index.items()}


def wanda(name: str, block: nn.Module, inputs: Sequence[Any]) -> int:
    prune(block, "activation", "2:4", calibration=inputs)
    return len(inputs)


def by_hand(model: Model, work: Callable[[str, nn.Module, Any], Any]) -> None:
    """The definition: block after block, each given what the changed ones before it make."""
    with torch.no_grad():
        xs = [model.embed(tokens) + model.position for tokens in batches()]
        shift = model.position.mean(0)
        for index, block in enumerate(model.layers):
            work(f"layers.{index}", block, [{"x": x, "shift": shift, "scale": 0.5} for x in xs])
            xs = [block(x, shift, scale=0.5)[0] for x in xs]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("importance", ["activation", "sparsegpt"])
def test_pruning_from_files_is_block_after_block(tmp_path: Path, importance: str, cached: bool) -> None:
    def work(name: str, block: nn.Module, inputs: Any) -> str:
        prune(block, importance, "2:4", calibration=inputs)
        return name.upper()

    expected = build()
    source = saved(expected, tmp_path / "in")
    by_hand(expected, work)
    model, out, cache = empty(), tmp_path / "out", tmp_path / "cache" if cached else None
    found = layerwise(model, "layers", batches(), work, weights=source, output=out, cache=cache)
    assert found == {f"layers.{index}": f"LAYERS.{index}" for index in range(BLOCKS)}
    state = written(out)
    for name, value in expected.state_dict().items():
        if name != "head.weight":
            assert torch.equal(state.pop(name), value), name
    assert not state
    assert all(value.is_meta for value in model.state_dict().values()), "all was let go"
    assert cache is None or not list(cache.iterdir())
    loaded = build()
    loaded.load_state_dict(written(out), strict=False)
    assert torch.equal(loaded(batches()[0]), expected(batches()[0]))


@pytest.mark.parametrize("form", ["mixed", "named", "positional"])
def test_original_inputs_are_those_of_the_whole_model(form: str) -> None:
    expected, found = build(form), build(form)
    prune(expected, "activation", "2:4", layers=["layers.*"], calibration=batches())
    assert layerwise(found, "layers", batches(), wanda, inputs="original") == dict.fromkeys(
        [f"layers.{index}" for index in range(BLOCKS)], 3
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_gptq_is_that_of_the_whole_model(tmp_path: Path) -> None:
    expected, found = build(), empty()
    source = saved(expected, tmp_path / "in")
    gptq(expected, batches(), layers=["layers.*"])

    def work(name: str, block: nn.Module, inputs: Any) -> dict[str, Tensor]:
        gptq(block, inputs)
        return {key: value for key, value in block.named_buffers() if key.endswith("weight_scale")}

    steps = layerwise(found, "layers", batches(), work, weights=source, output=tmp_path / "out")
    state = written(tmp_path / "out")
    for index, block in enumerate(expected.layers):
        for name in ("up", "down"):
            layer, key = block.get_submodule(name), f"layers.{index}.{name}.weight"
            torch.testing.assert_close(state[key], layer.weight, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(steps[f"layers.{index}"][f"{name}.weight_scale"], layer.weight_scale)


def test_calibration_of_a_file_writes_nothing(tmp_path: Path) -> None:
    model = build()
    save_file({k: v for k, v in model.state_dict().items() if k != "head.weight"}, tmp_path / "m.safetensors")
    scales = layerwise(
        empty(),
        "layers",
        batches(),
        lambda name, block, inputs: calibrate(block, inputs, "minmax"),
        weights=tmp_path / "m.safetensors",
    )
    whole = calibrate(model, batches(), "minmax")
    assert {f"{a}.{b}": q for a, part in scales.items() for b, q in part.items()} == {
        name: q for name, q in whole.items() if name.startswith("layers.")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_modes_gradients_and_forwards_are_as_before() -> None:
    model = build()
    model.layers[1].train()
    seen: list[bool] = []
    layerwise(model, "layers", batches(), lambda *_: seen.append(torch.is_grad_enabled()))
    assert seen == [True] * BLOCKS
    assert [block.training for block in model.layers] == [False, True, False]
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Adding(nn.Linear):
    """Adds to its input in place, as residual blocks do."""

    def forward(self, input: Tensor) -> Tensor:
        input += super().forward(input)
        return input


def test_inputs_stay_where_blocks_work_in_place(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(Adding(4, 4), Adding(4, 4)))

    def work(name: str, block: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
        with torch.no_grad():
            return [block(*batch).clone() for _ in range(2) for batch in inputs]

    x = [torch.randn(3, 4)]
    held = layerwise(model, "1", x, work)
    for first, second in held.values():
        assert torch.equal(first, second)
    read = layerwise(model, "1", x, work, cache=tmp_path)
    assert all(torch.equal(a, b) for name in held for a, b in zip(held[name], read[name], strict=True))


def test_a_forward_of_the_instance_stays() -> None:
    model = build()
    model.layers[0].forward = own = model.layers[0].forward
    layerwise(model, "layers", batches(), lambda *_: None)
    assert vars(model.layers[0])["forward"] is own


def test_a_failure_names_the_block_and_leaves_no_index(tmp_path: Path) -> None:
    source = saved(build(), tmp_path / "in")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    model = empty()

    def work(name: str, block: nn.Module, inputs: Any) -> None:
        if name == "layers.1":
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as caught:
        layerwise(
            model,
            "layers",
            batches(),
            work,
            weights=source,
            output=tmp_path / "out",
            cache=tmp_path / "cache",
        )
    assert caught.value.__notes__ == ["layerwise: in the work on 'layers.1'; 1 blocks before it are done"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["layers.0.safetensors"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert not list((tmp_path / "cache").iterdir())
    assert all(value.is_meta for value in model.state_dict().values())


def test_bad_input(tmp_path: Path) -> None:
    source = saved(build(), tmp_path / "in")
    nothing: Any = lambda *_: None  # noqa: E731

    def refuse(
        message: str, model: nn.Module, blocks: str = "layers", data: Any = None, **options: Any
    ) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            layerwise(model, blocks, batches() if data is None else data, nothing, **options)

    refuse(r"blocks must name .* got 'layer' \(no such module\); the model has layers", build(), "layer")
    refuse(r"got 'head' \(Linear\)", build(), "head")
    refuse("inputs must be", build(), inputs="new")
    refuse("position is on the meta device: weights must be given", empty())
    refuse("calibration must hold at least one batch, got none", build(), data=[])
    refuse("calibration must be an iterable of batches, got Tensor", build(), data=batches()[0])
    refuse("weights must be a .safetensors file or a folder", empty(), weights=tmp_path / "none")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    refuse("weights must be safetensors", empty(), weights=tmp_path / "bad.safetensors")
    with torch.device("meta"):
        wide, more = Model(2 * WIDTH), Model(blocks=4)
        volatile = Model()
        volatile.register_buffer("table", torch.ones(2), persistent=False)
    refuse(r"position must be \[5, 16\] as in the model, got \[5, 8\] in weights", wide, weights=source)
    refuse(r"layers.3.gain is on the meta device: weights must hold it", more, weights=source)
    refuse("table is on the meta device and in no state_dict", volatile, weights=source)
    skipping = build()
    skipping.form = "skip"
    skipping.forward = lambda tokens: tokens  # type: ignore[method-assign]
    refuse("the model must call its first block", skipping)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from tautorch.layerwise import layerwise
from tautorch.prune import prune
from tests.test_layerwise import Model
folder = Path(sys.argv[1])
torch.set_num_threads(1)
with torch.device("meta"):
    model = Model(512, 24)
tokens = [torch.randint(0, 11, (2, 5)) for _ in range(4)]
# What the first use of each function costs once, in a model of one block.
prune(torch.nn.Linear(512, 1024), "activation", "2:4", calibration=[torch.randn(8, 512)])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work = lambda name, block, inputs: prune(block, "activation", "2:4", calibration=inputs)
layerwise(model, "layers", tokens, work, weights=folder / "in", output=folder / "out", cache=folder / "cache")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


@pytest.mark.slow  # a model of 100 MB is written, pruned and written again
def test_peak_memory_is_that_of_a_few_blocks(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    block = {key: torch.randn_like(value) for key, value in Block(512).state_dict().items()}
    size = sum(value.nbytes for value in block.values())
    torch.manual_seed(0)
    for index in range(24):
        save_file(
            {f"layers.{index}.{k}": v for k, v in block.items()}, tmp_path / "in" / f"{index}.safetensors"
        )
    rest = {k: v for k, v in Model(512, 1).state_dict().items() if k[:6] not in ("layers", "head.w")}
    save_file(rest, tmp_path / "in" / "rest.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        # What is freed goes back at once: what the allocator keeps for later is not the point.
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * 1024
    assert size == 4_206_592
    # The weights, the file's buffer, and float64 scores and their ranks of a layer: 43 MB at any depth.
    assert grown < 12 * size, f"{grown / size:.1f} blocks"
    assert len(written(tmp_path / "out")) == 24 * 7 + 4

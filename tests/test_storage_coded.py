"""Entropy-coded files: what comes back is what was saved, and a bad file changes nothing."""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tautorch as tt
from tautorch import storage_coded
from tautorch.coding import CodingError
from tautorch.storage import CheckpointError

START = 13


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 40),
        nn.Linear(40, 10),
    )


def clustered() -> nn.Module:
    """Pruned and clustered, as Deep Compression leaves a model."""
    torch.manual_seed(0)
    model = tt.prune.prune(net().eval(), sparsity=0.8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                step = module.weight.abs().max() / 7
                module.weight.copy_((module.weight / step).round() * step + 0.0)
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.tt"


def same_state(a: nn.Module, b: nn.Module) -> bool:
    there, here = a.state_dict(), b.state_dict()
    return there.keys() == here.keys() and all(
        torch.equal(there[k], here[k]) and there[k].dtype == here[k].dtype for k in there
    )


def test_round_trip(path: Path) -> None:
    model = clustered()
    tt.save(model, path, encode="entropy", info={"accuracy": 0.97})
    for skeleton in (net, net()):
        assert same_state(tt.load(path, skeleton), model)
    told = tt.describe(path)
    assert told["info"] == {"accuracy": 0.97}
    assert told["tensors"]["4.weight"] == {"dtype": "torch.float32", "shape": [40, 288]}
    assert path.read_bytes()[:8] == b"TAUTCODE"


def test_report_and_file_agree(path: Path) -> None:
    model = clustered()
    tt.save(model, path, encode="entropy")
    report = tt.size_report(model)
    assert report.file == path.stat().st_size
    assert report.dense == sum(v.nbytes for v in model.state_dict().values())
    assert report.ratio == report.dense / report.file
    row = next(t for t in report.tensors if t.name == "4.weight")
    weight = model[4].weight.detach()
    assert (row.nonzero, row.distinct) == (int(weight.count_nonzero()), len(weight.unique()))
    assert row.coded == tt.describe(path)["coded"]["4.weight"][2]
    assert row.dense > row.pruned > row.clustered > row.coded
    assert "smaller" in str(report) and "4.weight" in str(report)


def test_a_model_in_training_loads_into_its_like_alone(path: Path) -> None:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

    model = tt.quantize.cluster(mlp(), bits=2)
    tt.save(model, path, encode="entropy")
    assert same_state(tt.load(path, tt.quantize.cluster(mlp(), bits=2)), model)
    with pytest.raises(tt.CheckpointError, match=r"'0', where .* Linear; .* or finalize before saving"):
        tt.load(path, mlp())


def test_deep_compression_end_to_end(path: Path) -> None:
    """Prune, cluster, train the centroids, store: the stages of the paper, and the bytes of the file."""

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 10))

    torch.manual_seed(1)
    model = tt.quantize.cluster(tt.prune.prune(mlp(), sparsity=0.9), bits=4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-4)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(32, 400)).square().mean().backward()
        optimizer.step()
    tt.quantize.finalize(model)
    tt.save(model, path, encode="entropy")
    row = next(t for t in tt.size_report(model).tensors if t.name == "0.weight")
    assert (row.nonzero, row.distinct, row.negative_zeros) == (8000, 16, 0)
    # 0.47 bits a place for where one in ten is kept, at most 4 bits each for which value.
    assert row.coded < 80_000 * 0.47 / 8 + 8000 * 4 / 8 + 150
    assert tt.size_report(model).ratio > 30
    assert same_state(tt.load(path, mlp), model)


def test_signs_of_zeros_are_reported_and_kept(path: Path) -> None:
    model = clustered()
    with torch.no_grad():
        model[4].weight.mul_(torch.where(model[4].weight == 0, -1.0, 1.0))
    report = tt.size_report(model)
    row = next(t for t in report.tensors if t.name == "4.weight")
    assert row.negative_zeros == int((model[4].weight == 0).sum())
    assert "zeros have a minus sign" in str(report) and "minus sign" not in str(tt.size_report(clustered()))
    tt.save(model, path, encode="entropy")
    assert torch.equal(tt.load(path, net)[4].weight.signbit(), model[4].weight.signbit())


def test_compressed_layers_and_tied_weights(path: Path) -> None:
    def skeleton() -> nn.Module:
        model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        model[3].weight = model[2].weight
        return model.eval()

    model = tt.prune.prune(skeleton(), sparsity=0.5, layers=["0"])
    tt.convert(model, {"0": tt.nn.SparseLinear.from_float, "1": tt.nn.Int8Linear.from_float})
    tt.save(model, path, encode="entropy")
    loaded = tt.load(path, skeleton).eval()
    x = torch.randn(5, 32)
    assert torch.equal(loaded(x), model(x))
    assert loaded[3].weight is loaded[2].weight
    assert {type(m).__name__ for m in loaded} == {"SparseLinear", "Int8Linear", "Linear"}


def test_encode_must_be_known(path: Path) -> None:
    with pytest.raises(ValueError, match="save: encode must be None or \"entropy\", got 'zip'"):
        tt.save(net(), path, encode="zip")  # type: ignore[arg-type]
    assert not path.exists()


def test_without_the_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tt.save(clustered(), path, encode="entropy")
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r'pip install "tautorch\[coding\]"'):
        tt.save(clustered(), path, encode="entropy")
    with pytest.raises(ImportError, match=r'pip install "tautorch\[coding\]"'):
        tt.load(path, net)
    assert path.read_bytes() == before


def test_a_coder_that_loses_bits_writes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_coded, "decode", lambda data, dtype, shape: torch.zeros(shape, dtype=dtype))
    with pytest.raises(RuntimeError, match="does not decode to itself"):
        tt.save(clustered(), path, encode="entropy")
    assert list(path.parent.iterdir()) == []


# ---- bad files ----


def refused(path: Path, match: str) -> None:
    """The file is refused, and the module that should take it is as it was."""
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        tt.load(path, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def parts(path: Path) -> tuple[dict[str, Any], bytes, bytes]:
    """The document, the tensors' bytes and their digest."""
    data = path.read_bytes()
    end = START + int.from_bytes(data[9:START], "little")
    return json.loads(zlib.decompress(data[START:end])), data[end:-64], data[-64:-32]


def forge(path: Path, document: dict[str, Any], body: bytes, content: bytes, squeezed: bytes = b"") -> None:
    """A file whose checksums are right, whatever it says."""
    squeezed = squeezed or zlib.compress(json.dumps(document).encode())
    data = b"TAUTCODE\1" + len(squeezed).to_bytes(4, "little") + squeezed + body + content
    path.write_bytes(data + hashlib.sha256(data).digest())


@pytest.fixture
def saved(path: Path) -> Path:
    tt.save(clustered(), path, encode="entropy")
    return path


def test_truncated_anywhere(saved: Path) -> None:
    data = saved.read_bytes()
    for length in [8, 9, 12, 13, 60, len(data) // 2, len(data) - 33, len(data) - 1]:
        saved.write_bytes(data[:length])
        refused(saved, "truncated|corrupted")
    saved.write_bytes(data + b"\0")
    refused(saved, "1 bytes are over")


def test_any_flipped_bit_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    for at in [*range(8, 40), *range(40, len(data), 97), len(data) - 1]:
        bad = bytearray(data)
        bad[at] ^= 4
        saved.write_bytes(bad)
        refused(saved, "corrupted|malformed|truncated|version")


def test_other_versions(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[8] = 2
    saved.write_bytes(data)
    refused(saved, "is of version 2, this tautorch reads 1")


def test_a_false_size_costs_nothing(saved: Path) -> None:
    """Billions of weights out of a few bytes are refused before they are made."""
    document, body, content = parts(saved)
    document["coded"]["4.weight"][1] = [2**20, 2**20]
    forge(saved, document, body, content)
    refused(saved, "it decodes to .* bytes, the skeleton has")


def test_a_document_that_inflates_without_end(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, body, content = parts(saved)
    monkeypatch.setattr(storage_coded, "MAX_HEADER", 10_000)
    forge(saved, document, body, content, zlib.compress(b" " * 100_000 + json.dumps(document).encode()))
    refused(saved, "over the limit of 10000 bytes")


def test_forged_documents(saved: Path) -> None:
    document, body, content = parts(saved)

    def with_coded(name: str, said: object) -> dict[str, Any]:
        return document | {"coded": document["coded"] | {name: said}}

    for bad, match in (
        (with_coded("4.weight", ["F32", [40, 288]]), "must have a dtype, a shape"),
        (with_coded("4.weight", ["F31", [40, 288], 7]), "must have a dtype, a shape"),
        (with_coded("4.weight", ["F32", [-40, 288], 7]), "must have a dtype, a shape"),
        (with_coded("4.weight", ["F32", [40, 288], -7]), "must have a dtype, a shape"),
        (with_coded("4.weight", ["F32", [40, 288], 1 << 40]), "bytes are missing"),
        (document | {"coded": []}, "must have the object 'coded'"),
        (document | {"modules": 3}, "must have the object 'modules'"),
        (document | {"format": 9}, "is of format 9"),
    ):
        forge(saved, bad, body, content)
        refused(saved, match)


def test_swapped_and_changed_tensors(saved: Path) -> None:
    """Well-formed bytes that decode to something else: the tensors' own digest notices."""
    document, body, content = parts(saved)
    sizes = document["coded"]
    at = sum(said[2] for name, said in list(sizes.items())[: list(sizes).index("4.weight")])
    size = sizes["4.weight"][2]
    forge(saved, document, body[:at] + b"\0" + body[at + 1 :], content)
    refused(saved, "'4.weight' cannot be decoded|decodes to other tensors")
    flipped = bytearray(body)
    flipped[at + size - 1] ^= 64
    forge(saved, document, bytes(flipped), content)
    refused(saved, "cannot be decoded|decodes to other tensors")


def test_a_decoders_error_is_a_checkpoint_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise CodingError("a number must be smaller")

    monkeypatch.setattr(storage_coded, "decode", fails)
    refused(saved, "is malformed: '0.weight' cannot be decoded: a number must be smaller")

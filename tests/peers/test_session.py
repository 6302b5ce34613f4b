"""Cases of every part at small sizes, with a fake peer: contestants are checked, timed, and may fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benches.peers.parts import PARTS, conv, dense, fp32, pruned, sparse
from benches.peers.parts.common import a_linear, check_int8, random_x
from benches.peers.session import Session

from tautorch.nn import Int8Linear


@pytest.fixture
def rows(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the session has measured."""
    return session.results.rows


def behave(session: Session, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Have the fake peer misbehave in every case."""
    remote = session.remote

    def misled(case: Any, peer: str, title: str, about: dict[str, Any], *rest: Any) -> Any:
        return remote(case, peer, title, {**about, "behave": how}, *rest)

    monkeypatch.setattr(session, "remote", misled)


def test_dense(session: Session, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "QUICK_SHAPES", ((40, 24),))
    monkeypatch.setattr(dense, "QUICK_ROWS", (1, 130))
    dense.run(session)
    assert [row["case"] for row in rows] == ["1x40x24", "130x40x24"]
    peers = rows[0]["peers"]
    assert {"OpenVINO int8", "ONNX Runtime int8", "torch bf16", "torch fp32"} <= set(peers)
    assert any(name.startswith("torch.ao") for name in peers)
    assert all("ratio" in figures for figures in peers.values())
    assert peers["OpenVINO int8"]["way"] == "fast" and peers["torch bf16"]["error"] > 0
    assert rows[0]["empty_us"] > 0 and rows[0]["share"] > 0 and rows[0]["targets"][0]["what"] == "best peer"
    assert session.results.path is not None
    assert len(json.loads(session.results.path.read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("wrong", "OpenVINO int8 (fast): output is off by"),
        ("crash on load", "Fake: its process ended with signal SIGABRT"),
        ("refuse", "ValueError: no such layer"),
        ("crash later", "Fake: its process ended with exit code 3"),
    ],
)
def test_a_peer_that_fails_is_said_and_the_rest_is_measured(
    session: Session, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, how: str, why: str
) -> None:
    monkeypatch.setattr(dense, "QUICK_SHAPES", ((40, 24),))
    monkeypatch.setattr(dense, "QUICK_ROWS", (2,))
    del session.workers["onnxruntime"]
    behave(session, monkeypatch, how)
    dense.run(session)
    assert rows[0]["peers"]["OpenVINO int8"]["lost"].startswith(why)
    assert rows[0]["peers"]["torch fp32"]["ratio"] > 0 and rows[0]["us"] > 0
    assert "ONNX Runtime int8" not in rows[0]["peers"]


def test_sparse(session: Session, rows: list[dict[str, Any]]) -> None:
    sparse.unstructured(session, 40, 24, 0.8, (3,))
    sparse.against_dense(session, 40, 24, 0.9, (3,), "4x1", 8.0)
    sparse.batch_1(session, 64, 64, 0.5)
    assert [row["pattern"] for row in rows] == ["unstructured", "4x1", "best pattern"]
    assert set(rows[0]["own"]) == {"ours static", "Int8Linear"} and rows[0]["best"] == "DeepSparse int8"
    assert [t["what"] for t in rows[0]["targets"]] == ["DeepSparse", "DeepSparse, both static"]
    assert rows[1]["targets"][0]["want"] == 8.0
    assert set(rows[2]["own"]) == {"unstructured", "4x1", "16x16", "32x32", "2:4"}
    assert rows[2]["targets"][0]["by"] in rows[2]["own"]


def test_two_layers_are_checked_as_a_whole(session: Session, rows: list[dict[str, Any]]) -> None:
    sparse.two_layers(session, 40, 24, 0.8, 3)  # the fake peer knows one layer only, so its output is off
    assert "output" in rows[0]["peers"]["DeepSparse int8"]["lost"] and rows[0]["us"] > 0


def test_trained_masks(session: Session, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(pruned, "SHAPE", (24, 40))
    sparse.trained(session, (0.9,), (3,))
    assert rows[0]["case"] == "trained, unstructured 90% 3x24x40"


def test_pruned_layers_have_the_sparsity_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(pruned, "SHAPE", (24, 40))
    with torch.inference_mode():
        [(sparsity, layer)] = pruned.layers([0.75])
    assert sparsity == 0.75 and (layer.weight == 0).float().mean() == pytest.approx(0.75, abs=0.01)


def test_fp32(session: Session, rows: list[dict[str, Any]]) -> None:
    fp32._case(session, 40, 24, 3, 0.8)
    assert set(rows[0]["peers"]) == {"DeepSparse fp32", *fp32.DENSE}
    assert all("ratio" in figures for figures in rows[0]["peers"].values())
    assert len(rows[0]["targets"]) == 3 and set(rows[0]["own"]) == {"ours 4x1"}


@pytest.mark.parametrize("kind", ["int8", "float"])
@pytest.mark.parametrize("layer", [conv.Layer(8, 16, 1, 1, 6), conv.Layer(8, 16, 3, 2, 6)])
def test_conv(session: Session, rows: list[dict[str, Any]], layer: conv.Layer, kind: str) -> None:
    session.workers.clear()  # the fake peer has no convolution
    conv._case(session, layer, 3, kind)
    peers = rows[0]["peers"]
    assert any(name.startswith("torch.ao") and "ratio" in peers[name] for name in peers)
    assert ("torch fp32" in peers) == (kind == "float")
    assert ("4x1 80%" in rows[0]["own"]) == (kind == "int8" and layer.kernel == 1)
    what = {t["what"] for t in rows[0]["targets"]}
    asked = kind == "int8" and layer.kernel == 3 and rows[0]["kernel"] != "amx"
    assert ("share of peak" in what) == asked


def test_conv_layers_are_those_of_the_network() -> None:
    assert len(conv.LAYERS) == 22 and len(set(map(str, conv.LAYERS))) == 22
    assert str(conv.LAYERS[0]) == "1x1 64->64 56x56 /1"
    assert conv.Layer(512, 512, 3, 1, 7) in conv.LAYERS and conv.Layer(1024, 2048, 1, 2, 14) in conv.LAYERS


def test_only_wanted_cases_run(session: Session, rows: list[dict[str, Any]]) -> None:
    session.only = "no such case"
    for part in PARTS.values():
        part(session)
    assert rows == []


def test_our_wrong_integers_stop_the_run() -> None:
    linear = a_linear(40, 24)
    layer, x = Int8Linear.from_float(linear), random_x(5, 40)
    check_int8(layer, linear, x)
    layer.weight = layer.weight.clone()
    layer.weight[3, 7] += 1
    with pytest.raises(AssertionError, match="elements off"):
        check_int8(layer, linear, x)

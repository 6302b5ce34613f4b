"""Setting up a peer, where the package index has it and where it has not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benches.peers import __main__ as command
from benches.peers import environments
from benches.peers.environments import PEERS, NotHad, Peer, prepare


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a peer called "fake"."""
    (tmp_path / "requirements").mkdir()
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    return tmp_path / "requirements" / "peers-fake.txt"


def test_installed_once_and_again_when_the_pins_change(
    requirements: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements.write_text("--no-index\n")
    python = prepare(Peer("fake", "Fake"), tmp_path / "venvs")
    assert python.exists()

    def refuse(*_: object) -> None:
        raise NotHad("installs again")

    monkeypatch.setattr(environments, "_run", refuse)
    assert prepare(Peer("fake", "Fake"), tmp_path / "venvs") == python
    requirements.write_text("--no-index\n# another pin\n")
    with pytest.raises(NotHad, match="installs again"):
        prepare(Peer("fake", "Fake"), tmp_path / "venvs")


def test_what_cannot_be_had_is_said_in_one_line(requirements: Path, tmp_path: Path) -> None:
    requirements.write_text("--no-index\nthere-is-no-such-package==1.0\n")
    with pytest.raises(NotHad) as caught:
        prepare(Peer("fake", "Fake"), tmp_path / "venvs")
    assert str(caught.value).startswith("Fake: not installable: ERROR:") and "\n" not in str(caught.value)


def test_a_peer_without_a_python_for_it(requirements: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements.write_text("")
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    with pytest.raises(NotHad, match=r"needs Python 3\.5 or older"):
        prepare(Peer("fake", "Fake", python=5), requirements.parent)


@pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
def test_pins_and_worker_are_there(peer: Peer) -> None:
    pins = [line for line in peer.requirements.read_text().splitlines() if not line.startswith("#")]
    assert any(pin.startswith(f"{peer.name}==") for pin in pins) and all("==" in pin for pin in pins)
    assert peer.worker.is_file()


def test_the_run_goes_on_without_a_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cannot(peer: Peer) -> Path:
        if peer.name == "openvino":
            raise NotHad("OpenVINO: not installable: offline")
        return Path(sys.executable)  # which has no deepsparse

    monkeypatch.setattr(command, "prepare", cannot)
    assert command.start(["openvino", "deepsparse"]) == ({}, {})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "without OpenVINO: OpenVINO: not installable: offline"
    assert said[1].startswith("without DeepSparse: ModuleNotFoundError")


@pytest.mark.parametrize("arguments", [["nonsense"], ["--peers", "nonsense"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert "nonsense" in capsys.readouterr().err

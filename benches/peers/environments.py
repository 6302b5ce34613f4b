"""A virtual environment for each peer: their pins exclude each other (DeepSparse needs numpy below 2)."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-peers"


@dataclass(frozen=True)
class Peer:
    """A peer that runs in a process of its own; `python`: newest minor version of Python 3 it serves."""

    name: str
    title: str
    python: int | None = None

    @property
    def requirements(self) -> Path:
        return ROOT / "requirements" / f"peers-{self.name}.txt"

    @property
    def worker(self) -> Path:
        return Path(__file__).with_name("workers") / f"peer_{self.name}.py"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("openvino", "OpenVINO"),
        Peer("onnxruntime", "ONNX Runtime"),
        Peer("deepsparse", "DeepSparse", python=11),
    )
}


class NotHad(Exception):
    """A peer that cannot be installed here, in one line."""


def prepare(peer: Peer, folder: Path = FOLDER) -> Path:
    """The peer's Python, installed on the first call and when its requirements change.

    Raises:
        NotHad: no fitting Python, or the package index does not have it.
    """
    home = folder / peer.name
    python = home / "bin" / "python"
    stamp = home / ".requirements"
    wanted = hashlib.sha256(peer.requirements.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    print(f"installing {peer.title} into {home}", flush=True)
    _run(peer, [_python(peer), "-m", "venv", str(home)], "no virtual environment")
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(peer.requirements)]
    _run(peer, [str(python), *install], "not installable")
    stamp.write_text(wanted)
    return python


def _python(peer: Peer) -> str:
    if peer.python is None or sys.version_info[:2] <= (3, peer.python):
        return sys.executable
    for minor in range(peer.python, 9, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise NotHad(f"{peer.title}: needs Python 3.{peer.python} or older, none found on PATH")


def _run(peer: Peer, command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        why = next((line for line in errors if "ERROR" in line), errors[-1] if errors else "no message")
        raise NotHad(f"{peer.title}: {what}: {' '.join(why.split())[:200]}")

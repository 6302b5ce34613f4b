"""Load a saved model in a process that knows nothing but its architecture's code, and compare what it says.

`in_fresh_process` starts ``python -m tautorch.demo.verify MODEL EXPECTED``, which is this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tautorch.demo.digits import Student
from tautorch.storage import load

BATCH = 64
TIMEOUT_S = 120


@dataclass(frozen=True)
class Reload:
    """How a reloaded model compares: images whose logits are the same bit for bit, and whose digit is."""

    images: int
    same_logits: int
    same_digits: int

    @property
    def identical(self) -> bool:
        return self.same_logits == self.same_digits == self.images


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of [n, 1, 8, 8] images, in batches of `BATCH`, the last one shorter."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.split(images, BATCH)])


def write_expected(path: Path, images: Tensor, logits: Tensor) -> None:
    """Keep what the model in memory said, for `in_fresh_process` to compare with."""
    save_file({"images": images.contiguous(), "logits": logits.contiguous()}, path)


def in_fresh_process(model: Path, expected: Path) -> Reload:
    """Compare in a new interpreter, with as many threads as this one.

    Raises:
        RuntimeError: the process failed; the message has what it wrote.
    """
    # The suffix of a sum over threads depends on how many there are, in the layers that were kept as floats.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "tautorch.demo.verify", str(model), str(expected)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the fresh process that loads {model} failed:\n{done.stderr or done.stdout}")
    return Reload(**json.loads(done.stdout.splitlines()[-1]))


def compare(model: Path, expected: Path) -> Reload:
    """Load ``model`` into the student's architecture and compare it with the logits in ``expected``."""
    tensors = load_file(expected)
    reloaded = load(model, Student).eval()
    logits, wanted = predict(reloaded, tensors["images"]), tensors["logits"]
    return Reload(
        images=len(wanted),
        same_logits=int((logits.view(torch.int32) == wanted.view(torch.int32)).all(1).sum()),
        same_digits=int((logits.argmax(1) == wanted.argmax(1)).sum()),
    )


def main(arguments: Sequence[str]) -> None:
    """``MODEL EXPECTED``: print the comparison as one line of JSON."""
    model, expected = map(Path, arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    print(json.dumps(asdict(compare(model, expected))))


if __name__ == "__main__":
    main(sys.argv[1:])

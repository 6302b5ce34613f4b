"""The examples of training run as they are: on one device, and by torchrun on two processes."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from tests.distributed.torchrun import ROOT, command, environment

EXAMPLES = ROOT / "examples"


def test_one_gpu(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "distil_on_one_gpu.py"))["main"]
    found = main(str(tmp_path), epochs=6)
    assert found["sparsity"] == 0.5
    assert found["student"] > 0.5, "chance is 0.25"
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    again = main(str(tmp_path), epochs=6)
    assert again == found, "a finished run is not done again"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(steps) == found["epochs"] * 33


@pytest.mark.slow  # torchrun starts three processes that import torch
@pytest.mark.parametrize("option", [[], ["--fsdp"]])
def test_many_gpus(tmp_path: Path, option: list[str]) -> None:
    script = str(EXAMPLES / "distil_on_many_gpus.py")
    done = subprocess.run(
        command(["-m", "tests.distributed.torchrun", script, str(tmp_path), *option]),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees with the teacher on") == 1
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    weight = end["student"]["2.weight"]
    assert weight.shape == (32, 32)
    assert float((weight == 0).float().mean()) == 0.5
    assert set(end["input_scales"]) == {"0", "2", "4"}
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["global_step"] == 6 * 2048 // 64

"""Two ranks with half the batches each quantise as one process with all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tautorch import distributed
from tautorch.quantize import cluster, correct_bias, finalize, gptq, prepare_qat, sensitivity, smooth
from tests.distributed.torchrun import on_two_ranks


class Net(nn.Module):
    """`rare` runs only for batches whose first value is large: on one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.rare = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(self.norm(x))))
        return self.rare(y) if float(x[0, 0]) > 5 else y


class Drifting(Net):
    """Another computation at every call, if it is told to."""

    drift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.factor = getattr(self, "factor", 1.0) + self.drift
        return super().forward(x) * self.factor


def build(kind: type[Net] = Net) -> Net:
    torch.manual_seed(3)
    model = kind()
    with torch.no_grad():
        model.norm.weight[5] = 30.0
    return model


def batches() -> list[Tensor]:
    torch.manual_seed(4)
    parts = [torch.randn(20, 16) * 2.0**scale for scale in range(4)]
    for index, part in enumerate(parts):
        part[0, 0] = 9.0 if index == 3 else 1.0
    return parts


def results(data: list[Tensor]) -> dict[str, Any]:
    rounded = gptq(build(), data)
    corrected = correct_bias(copy.deepcopy(rounded), build(), data)
    return {
        "smooth": smooth(build(), data, explicit=False).state_dict(),
        "gptq": rounded.state_dict(),
        "steps": {n: m.weight_scale for n, m in rounded.named_modules() if isinstance(m, nn.Linear)},
        "bias": corrected.state_dict(),
        "costs": {cost.layer: cost for cost in sensitivity(build(), data, quant="static").layers},
    }


def sharded(rank: int) -> tuple[dict[str, Tensor], list[str]]:
    """A sharded student after two steps, and who refused it; the test trains the same in one process."""
    student: Any = prepare_qat(build(), bits=4)
    fully_shard(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for x in batches()[:2]:
        student(x.chunk(2)[rank] / 9).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    refused = []
    for call in (
        lambda: finalize(student),
        lambda: cluster(student),
        lambda: gptq(student, batches()),
        lambda: smooth(student, batches()),
    ):
        with pytest.raises(ValueError, match="must be whole on each rank") as error:
            call()
        refused.append(str(error.value).partition(":")[0])
    return {name: p.full_tensor().detach() for name, p in student.named_parameters()}, refused


def worker(folder: Path) -> dict[str, Any]:
    rank = distributed.rank()
    found = results(batches()[rank::2])
    student = prepare_qat(build(), quant="static", calibration=batches()[rank::2])
    wrapped = DistributedDataParallel(student, find_unused_parameters=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for x in batches()[rank::2]:
        wrapped(x / 9).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found["trained"] = student.state_dict()
    found["final"] = finalize(student).state_dict()
    found["sharded"], found["refused"] = sharded(rank)
    bad = [torch.full((2, 16), float("nan"))] if rank == 1 else batches()
    for name, call in {"gptq": gptq, "smooth": smooth}.items():
        try:
            call(build(), bad)
        except Exception as error:
            found[f"{name} failed"] = str(error)
    drifting = build(Drifting)
    drifting.drift = float(rank == 1)
    try:
        smooth(drifting, batches()[rank::2])
    except Exception as error:
        found["smooth moved"] = str(error)
    found["smooth undone"] = drifting.state_dict()
    return found


def close(got: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    one, two = on_two_ranks(worker, tmp_path)
    for name in ("smooth", "gptq", "steps", "bias", "trained", "final"):
        assert all(torch.equal(a, b) for a, b in zip(one[name].values(), two[name].values(), strict=True))
    whole = results(batches())
    student = prepare_qat(build(), bits=4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for x in batches()[:2]:
        (sum(student(part / 9).square().mean() for part in x.chunk(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    close(one["sharded"], dict(student.named_parameters()), 1e-5)
    assert one["refused"] == ["finalize", "cluster", "gptq", "smooth"]
    close(one["smooth"], whole["smooth"], 1e-6)
    assert not torch.equal(whole["smooth"]["norm.weight"], build().norm.weight)
    # sums in another order: the same integers, steps and biases to float rounding
    close(one["gptq"], whole["gptq"], 1e-5)
    close(one["steps"], whole["steps"], 1e-5)
    close(one["bias"], whole["bias"], 1e-4)
    for name, cost in whole["costs"].items():
        assert abs(one["costs"][name].output_sqnr - cost.output_sqnr) < 0.01
        assert one["costs"][name] == two["costs"][name]
    for name in ("gptq", "smooth"):
        assert "NaN or Inf" in two[f"{name} failed"]
        assert one[f"{name} failed"].startswith("rank 1 failed")
    assert "the output moved by" in two["smooth moved"]
    assert one["smooth moved"].startswith("rank 1 failed")
    for found in (one, two):
        close(found["smooth undone"], build().state_dict(), 0.0)

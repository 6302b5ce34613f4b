"""Two ranks with half the batches each calibrate, prune and factorise as one process with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch import distributed
from tautorch._gram import input_grams
from tautorch.factorize import factorize
from tautorch.prune import compute_masks, importance_scores, input_norms
from tautorch.quantize import calibrate
from tests.distributed.torchrun import on_two_ranks

OBSERVERS = ("minmax", "percentile", "mse", "kl")


class Net(nn.Module):
    """`rare` runs only for batches whose first value is positive: on one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(16, 8)
        self.rare = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x.reshape(-1, 1, 4, 3))
        y = self.head(self.body(x))
        return self.rare(y) if float(x[0, 0]) > 5 else y


def build() -> Net:
    torch.manual_seed(3)
    return Net()


def batches() -> list[Tensor]:
    torch.manual_seed(4)
    parts = [torch.randn(7, 12) * 4.0**scale for scale in range(4)]
    for index, part in enumerate(parts):
        part[0, 0] = 9.0 if index == 3 else 1.0
    return parts


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


def statistics(data: list[Tensor]) -> dict[str, Any]:
    model = build()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {
        **{observer: calibrate(model, data, observer) for observer in OBSERVERS},
        "grams": input_grams("test", model, layers, data),
        "norms": input_norms("test", model, layers, data),
        "masks": compute_masks(model, "activation", "unstructured", 0.5, calibration=data),
        "scores": importance_scores("test", model, layers, "gradient", data, False, squared),
        "means": importance_scores("test", model, layers, "mean_activation", data),
        "factors": factorize(build(), "whitened", rank=3, layers=["head"], calibration=data).state_dict(),
    }


def worker(folder: Path) -> dict[str, Any]:
    rank = distributed.rank()
    mine = batches()[rank::2]
    results = statistics(mine)
    with distributed.local():
        results["alone"] = calibrate(build(), mine, "minmax")
        results["alone_world"] = distributed.world_size()
    bad = [torch.full((2, 12), float("nan"))] if rank == 1 else mine
    for name, data in (("nan", bad), ("empty", [] if rank == 0 else mine)):
        try:
            calibrate(build(), data)
        except Exception as error:
            results[name] = (type(error).__name__, str(error))
    mask = torch.tensor([rank == 0, True])
    floats = torch.full((3,), float(rank))
    distributed.broadcast_tensors([mask, floats])
    results["broadcast"] = (mask, floats, distributed.broadcast_value(f"from {rank}"))
    results["reduced"] = {
        how: distributed.all_reduce(torch.tensor([rank + 1.0, -rank], dtype=torch.float64), how)
        for how in ("sum", "max", "min")
    }
    results["once"] = distributed.main_process_only(lambda: rank)()
    results["world"] = (rank, distributed.world_size(), distributed.is_main())
    distributed.barrier()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(worker, tmp_path_factory.mktemp("statistics"))


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return statistics(batches())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_scales_are_those_of_one_process(
    ranks: list[dict[str, Any]], whole: dict[str, Any], observer: str
) -> None:
    assert set(whole[observer]) == {"body.0", "conv", "head", "rare"}
    assert ranks[0][observer] == ranks[1][observer] == whole[observer]
    assert ranks[0]["alone"] != whole["minmax"], "the test's two halves must differ"


@pytest.mark.parametrize("what", ["grams", "norms", "scores", "means"])
def test_sums_are_those_of_one_process(ranks: list[dict[str, Any]], whole: dict[str, Any], what: str) -> None:
    for name, value in whole[what].items():
        assert torch.equal(ranks[0][what][name], ranks[1][what][name])
        # Only the order of float64 additions differs.
        torch.testing.assert_close(ranks[0][what][name], value, rtol=1e-13, atol=1e-12)


def test_masks_and_factors_are_those_of_one_process(
    ranks: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    for name, mask in whole["masks"].items():
        assert torch.equal(ranks[0]["masks"][name], ranks[1]["masks"][name])
        assert torch.equal(ranks[0]["masks"][name], mask)
    for name, value in whole["factors"].items():
        assert torch.equal(ranks[0]["factors"][name], ranks[1]["factors"][name])
        torch.testing.assert_close(ranks[0]["factors"][name], value, rtol=1e-4, atol=1e-5)


def test_a_failure_of_one_rank_ends_them_all(ranks: list[dict[str, Any]]) -> None:
    kind, text = ranks[1]["nan"]
    assert kind == "ValueError"
    assert "NaN or Inf at layer 'body.0'" in text or "NaN or Inf at layer 'conv'" in text
    assert ranks[0]["nan"] == ("RuntimeError", f"rank 1 failed: ValueError: {text}")
    assert ranks[0]["empty"][0] == "ValueError"
    assert ranks[1]["empty"][0] == "RuntimeError"


def test_helpers(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["world"] == (rank, 2, rank == 0)
        assert found["alone_world"] == 1
        assert found["once"] == (0 if rank == 0 else None)
        mask, floats, text = found["broadcast"]
        assert mask.tolist() == [True, True]
        assert floats.tolist() == [0.0, 0.0, 0.0]
        assert text == "from 0"
        assert found["reduced"]["sum"].tolist() == [3.0, -1.0]
        assert found["reduced"]["max"].tolist() == [2.0, 0.0]
        assert found["reduced"]["min"].tolist() == [1.0, -1.0]


def test_one_process_exchanges_nothing() -> None:
    value = torch.arange(3.0)
    assert distributed.world_size() == 1
    assert distributed.rank() == 0
    assert torch.equal(distributed.all_reduce(value), value)
    assert distributed.all_reduce(value) is not value
    assert distributed.sum_over_ranks({"a": value})["a"] is value
    assert distributed.union(["b", "a"]) == {"a", "b"}
    distributed.broadcast_tensors([value])
    distributed.barrier()
    distributed.raise_together(None)
    with pytest.raises(ValueError, match="mine"):
        distributed.raise_together(ValueError("mine"))
    assert not distributed.is_sharded(nn.Linear(2, 2))
    assert distributed.full_tensor(value) is distributed.local_part(value, value) is value

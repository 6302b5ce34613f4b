"""Two ranks train, prune and resume as one process does with the same global batches; DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tautorch import distributed
from tautorch.distill import Distiller, FeatureHint, JsonLog, SoftTarget
from tautorch.distill.state import unwrapped
from tautorch.prune import Schedule, hold_masks, prune
from tests.distributed.torchrun import on_two_ranks

# Some forty small runs of two ranks, in one launch of torchrun.
pytestmark = pytest.mark.slow

WRAPPERS = ("ddp", "fsdp")
GLOBAL_BATCH = 8


class Killed(Exception):
    pass


def data() -> TensorDataset:
    x = torch.arange(48 * 6, dtype=torch.float32).reshape(48, 6).sin()
    return TensorDataset(x, torch.arange(48) % 4)


def loader() -> DataLoader[Any]:
    """Each rank's share; together the ranks' batches are those of one process, epoch by epoch."""
    ranks, rank = distributed.world_size(), distributed.rank()
    sampler: DistributedSampler[Any] = DistributedSampler(data(), ranks, rank, shuffle=True, seed=1)
    return DataLoader(data(), GLOBAL_BATCH // ranks, sampler=sampler)


def wrap(student: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(student)
    if kind == "fsdp":
        for layer in student:  # type: ignore[attr-defined]
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        return fully_shard(student)  # type: ignore[return-value]
    return student


def build(kind: str, dropout: float = 0.0, folder: Path | None = None) -> tuple[Distiller, Schedule]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    student = wrap(
        nn.Sequential(
            nn.Linear(6, 13), nn.LayerNorm(13), nn.ReLU(), nn.Dropout(dropout), nn.Linear(13, 4, bias=False)
        ),
        kind,
    )
    # Its own weights differ by rank until the Distiller shares rank 0's.
    torch.manual_seed(distributed.rank())
    loss = FeatureHint("2", "1", channels=(13, 20), base=SoftTarget(2.0, 0.3))
    optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], 0.02)
    inputs = data().tensors[0][distributed.rank() :: distributed.world_size()]
    schedule = Schedule(
        unwrapped(student), 0.5, importance="activation", end=6, every=2, calibration=[inputs]
    )
    torch.manual_seed(100 + distributed.rank())
    callbacks = [schedule, *([JsonLog(folder / "log.jsonl")] if folder is not None else [])]
    run = Distiller(
        teacher, student, loss, optimizer, accumulate=2, clip_norm=0.5, callbacks=callbacks, progress=False
    )
    return run, schedule


def score(model: nn.Module) -> float:
    """Over this rank's share."""
    x, y = (part[distributed.rank() :: distributed.world_size()] for part in data().tensors)
    return -float(nn.functional.cross_entropy(model(x), y))


def results(run: Distiller, schedule: Schedule) -> dict[str, Any]:
    student = unwrapped(run.student).state_dict()
    return {
        "student": {name: distributed.full_tensor(value).clone() for name, value in student.items()},
        "loss": {name: value.clone() for name, value in run.loss.state_dict().items()},  # type: ignore[attr-defined]
        "history": run.history,
        "masks": schedule.masks,
        "steps": run.global_step,
    }


def train(kind: str, epochs: int = 4, dropout: float = 0.0, **options: Any) -> dict[str, Any]:
    folder = options.get("checkpoint")
    run, schedule = build(kind, dropout, folder)
    run.fit(loader(), epochs, evaluate=score, **options)
    return results(run, schedule)


def train_and_break(kind: str, folder: Path, step: int) -> None:
    run, _ = build(kind, 0.3, folder)

    def kill(run: Distiller) -> None:
        if run.global_step == step:
            raise Killed

    run.callbacks.append(kill)
    try:
        run.fit(loader(), 4, evaluate=score, checkpoint=folder, checkpoint_every=2)
    except Killed:
        return
    raise AssertionError("the run should have been broken off")


def resume_broken(kind: str, folder: Path) -> dict[str, Any]:
    run, schedule = build(kind, 0.3, folder)
    run.callbacks.append(lambda run: None)
    run.fit(loader(), 4, evaluate=score, checkpoint=folder, checkpoint_every=2, resume=True)
    return results(run, schedule)


def nan_on_one_rank(kind: str) -> dict[str, Any]:
    run, _ = build(kind)
    before = results(run, _)["student"]
    bad = torch.full((4, 6), float("nan") if distributed.rank() == 1 else 1.0)
    try:
        run.fit([(bad, torch.zeros(4, dtype=torch.int64))], 1)
    except FloatingPointError as error:
        after = results(run, _)["student"]
        return {"error": str(error), "same": all(torch.equal(before[name], after[name]) for name in before)}
    return {}


def hold(kind: str) -> float:
    """Prunes by magnitude, then trains with the masks held by the optimizer's hook alone."""
    run, _ = build(kind)
    model = unwrapped(run.student)
    prune(model, sparsity=0.5)
    handle = hold_masks(model, optimizer=run.optimizer)
    assert set(handle.masks) == {"0", "4"}
    run.callbacks = []
    run.fit(loader(), 2)
    return share_of_zeros(run)


def keep(kind: str) -> dict[str, Any]:
    """Refuses what training would undo, then trains a pruned student with keep_zeros."""
    run, _ = build(kind)
    model = unwrapped(run.student)
    run.callbacks, found = [], {}
    steps = torch.full((4,), 0.01)
    last = model.get_submodule("4")
    dense = distributed.full_tensor(last.weight).clone()
    for what, weight in (("grid", torch.full((4, 13), 0.05)), ("pruned", dense * (dense > 0))):
        with torch.no_grad():
            distributed.local_tensor(last.weight).copy_(distributed.local_part(weight, last.weight))
        if what == "grid":
            last.register_buffer("weight_scale", steps, persistent=False)
        try:
            run.fit(loader(), 1)
        except ValueError as error:
            found[what] = str(error)
    prune(model, sparsity=0.5)
    run.keep_zeros = True
    run.fit(loader(), 2)
    return {**found, "share": share_of_zeros(run)}


def share_of_zeros(run: Distiller) -> float:
    """Of both layers' weights."""
    model = unwrapped(run.student)
    zeros = [distributed.full_tensor(model.get_submodule(name).weight) == 0 for name in ("0", "4")]
    return float(sum(int(zero.sum()) for zero in zeros) / sum(zero.numel() for zero in zeros))


def refused(kind: str) -> list[str]:
    messages = []
    plain, _ = build("alone")
    short, _ = build(kind)
    uneven = [(torch.ones(4, 6), torch.zeros(4, dtype=torch.int64))] * (1 + distributed.rank())
    for run, batches in ((plain, loader()), (short, uneven)):
        try:
            run.fit(batches, 1)
        except ValueError as error:
            messages.append(str(error))
    return messages


def worker(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in WRAPPERS:
        found[f"{kind} plain"] = train(kind)
        found[f"{kind} best"] = train(kind, keep_best=True, patience=1, min_delta=0.05)
        found[f"{kind} whole"] = train(
            kind, dropout=0.3, checkpoint=folder / f"{kind} whole", checkpoint_every=2
        )
        for step in (4, 7):
            place = folder / f"{kind} {step}"
            train_and_break(kind, place, step)
            found[f"{kind} resumed {step}"] = resume_broken(kind, place)
        train(kind, 2, checkpoint=folder / kind)
        found[f"{kind} from one"] = train(kind, checkpoint=folder / "alone", resume=True)
        found[f"{kind} nan"] = nan_on_one_rank(kind)
        found[f"{kind} held"] = hold(kind)
        found[f"{kind} kept"] = keep(kind)
        found[f"{kind} refused"] = refused(kind)
    try:
        resume_broken("ddp", folder / "alone within")
    except ValueError as error:
        found["within"] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    train("alone", 2, checkpoint=folder / "alone")
    train_and_break("alone", folder / "alone within", 5)
    return on_two_ranks(worker, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train("alone")


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To float32 rounding, carried through 12 steps of AdamW."""
    for part in ("student", "loss"):
        for name, value in expected[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=2e-4, atol=2e-5)
    for mine, theirs in zip(found["history"], expected["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["history"] == expected["history"]
    for part in ("student", "loss", "masks"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), name


@pytest.mark.parametrize("kind", WRAPPERS)
def test_trains_and_prunes_as_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any], kind: str
) -> None:
    assert_equal(ranks[0][f"{kind} plain"], ranks[1][f"{kind} plain"])
    found = ranks[0][f"{kind} plain"]
    assert_close(found, alone)
    assert found["steps"] == alone["steps"] == 12
    assert alone["history"][-1]["loss"] < 0.9 * alone["history"][0]["loss"]
    for name, mask in alone["masks"].items():
        assert torch.equal(found["masks"][name], mask)
        assert not bool(found["student"][f"{name}.weight"][~mask].any())


@pytest.mark.parametrize("kind", WRAPPERS)
def test_best_and_early_stopping_are_agreed(ranks: list[dict[str, Any]], kind: str) -> None:
    expected = train("alone", keep_best=True, patience=1, min_delta=0.05)
    assert len(expected["history"]) < 4, "the case must stop early"
    assert_equal(ranks[0][f"{kind} best"], ranks[1][f"{kind} best"])
    assert_close(ranks[0][f"{kind} best"], expected)


@pytest.mark.parametrize("step", [4, 7])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_resume_is_exact(ranks: list[dict[str, Any]], folder: Path, kind: str, step: int) -> None:
    for rank in ranks:
        assert_equal(rank[f"{kind} resumed {step}"], rank[f"{kind} whole"])
    whole, resumed = ((folder / f"{kind} {name}" / "log.jsonl").read_text() for name in ("whole", step))
    assert resumed == whole
    assert len(whole.splitlines()) == 12 + 4, "rank 0 alone writes"


@pytest.mark.parametrize("kind", WRAPPERS)
def test_one_process_and_many_read_each_others_checkpoints(
    ranks: list[dict[str, Any]], folder: Path, alone: dict[str, Any], kind: str
) -> None:
    assert_close(ranks[0][f"{kind} from one"], alone)
    assert_close(train("alone", checkpoint=folder / kind, resume=True), alone)


def test_within_an_epoch_the_ranks_must_be_as_many(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "from within an epoch must be resumed by 1 ranks, as it was written, got 2" in rank["within"]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_nan_on_one_rank_stops_both(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        found = rank[f"{kind} nan"]
        assert "loss must be finite, got nan at step 0" in found["error"]
        assert found["same"]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_masks_are_held(ranks: list[dict[str, Any]], kind: str) -> None:
    assert [rank[f"{kind} held"] for rank in ranks] == [0.5, 0.5]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_zeros_are_kept(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        found = rank[f"{kind} kept"]
        assert found["share"] == 0.5
        assert "layer '4' of the student lies on the grid" in found["grid"]
        assert "of the weights of the student's layer '4' are pruned" in found["pruned"]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_would_drift_apart_or_hang_is_refused(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        bare, uneven = rank[f"{kind} refused"]
        assert "with 2 ranks the student must be wrapped in DistributedDataParallel or by fully_shard" in bare
        assert "loader must have as many batches on each rank, got [1, 2]" in uneven

"""A run that is killed and resumed ends with the very same weights."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tautorch.distill import Distiller, FeatureHint, SoftTarget
from tautorch.distill.checkpoint import save_atomic
from tautorch.prune import Schedule


class Killed(Exception):
    pass


class Noisy(nn.Module):
    """Draws from every global generator, as augmentations do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.01 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
        return x


def build(seed: int = 0, **options: Any) -> Distiller:
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    torch.manual_seed(seed + 1)
    student = nn.Sequential(
        Noisy(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
    )
    loss = FeatureHint("3", "1", channels=(16, 32), base=SoftTarget(4.0, 0.1))
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], 1e-2)
    schedule = Schedule(student, 0.75, pattern="4x1", end=12, every=3)
    return Distiller(
        teacher,
        student,
        loss,
        optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20),
        scheduler_interval="step",
        callbacks=[schedule],
        progress=False,
        **options,
    )


def data(own_generator: bool) -> DataLoader[Any]:
    x = torch.arange(50 * 8, dtype=torch.float32).reshape(50, 8).sin()
    generator = torch.Generator().manual_seed(5) if own_generator else None
    return DataLoader(TensorDataset(x, torch.arange(50) % 4), 10, shuffle=True, generator=generator)


def score(model: nn.Module) -> float:
    return float(model[5].weight.detach().double().sum().sin())


def train(
    folder: Path | None, kill_at: int | None, own_generator: bool, resume: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    distiller = build()
    if kill_at is not None:

        def kill(run: Distiller) -> None:
            if run.global_step == kill_at:
                raise Killed

        distiller.callbacks.append(kill)
    else:
        distiller.callbacks.append(lambda run: None)
    torch.manual_seed(100 if not resume else 200)
    random.seed(100 if not resume else 200)
    np.random.seed(100 if not resume else 200)  # noqa: NPY002
    history = distiller.fit(
        data(own_generator),
        4,
        checkpoint=folder,
        resume=resume,
        checkpoint_every=2 if folder is not None else None,
        evaluate=score,
        keep_best=True,
        best_from=1,
    )
    return copy.deepcopy(distiller.student.state_dict()), history


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("kill_at", [3, 5, 6, 11, 20])
def test_resume_is_exact(tmp_path: Path, kill_at: int, own_generator: bool) -> None:
    whole, history = train(None, None, own_generator)
    with pytest.raises(Killed):
        train(tmp_path, kill_at, own_generator)
    resumed, again = train(tmp_path, None, own_generator, resume=True)
    assert again == history
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt"}


def test_resume_without_a_checkpoint_starts_and_with_a_finished_one_ends(tmp_path: Path) -> None:
    first = build()
    history = first.fit(data(False), 2, checkpoint=tmp_path, resume=True)
    assert len(history) == 2
    second = build(seed=7)
    assert second.fit(data(False), 2, checkpoint=tmp_path, resume=True) == history
    for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_best_is_a_state_dict_of_its_own(tmp_path: Path) -> None:
    distiller = build()
    distiller.fit(data(False), 3, checkpoint=tmp_path, evaluate=score, keep_best=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    for name, value in distiller.student.state_dict().items():
        assert torch.equal(value, best[name])


def seeded_run(folder: Path, kill_at: int | None) -> dict[str, Tensor]:
    """A whole run in this process, ended at once, without any clean-up, after step `kill_at`."""
    distiller = build()
    distiller.callbacks.append(lambda run: os._exit(9) if run.global_step == kill_at else None)
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    distiller.fit(data(False), 3, checkpoint=folder, resume=True, checkpoint_every=1)
    return distiller.student.state_dict()


def test_a_killed_process_is_resumed_exactly_by_another(tmp_path: Path) -> None:
    script = (
        f"import sys, torch; torch.set_num_threads({torch.get_num_threads()}); "
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_checkpoint; "
        f"test_checkpoint.seeded_run({str(tmp_path / 'broken')!r}, 7)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == 9
    assert torch.load(tmp_path / "broken" / "last.pt", weights_only=True)["global_step"] == 6
    expected = seeded_run(tmp_path / "whole", None)
    found = seeded_run(tmp_path / "broken", None)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path: Path) -> None:
    build().fit(data(False), 1, checkpoint=tmp_path)
    saved = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="pass resume=True"):
        build().fit(data(False), 1, checkpoint=tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == saved


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_atomic({"a": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        save_atomic({"a": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_weight_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["student"]["5.weight"].numpy().tobytes()
    raw[raw.index(weight) + 6] ^= 0x10
    path.write_bytes(bytes(raw))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, path)


def hostile(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {path.parent / 'ran'}",))

    torch.save({"format": 2, "student": Evil()}, path)


@pytest.mark.parametrize("damage", [truncate, flip_a_weight_bit, empty, foreign, hostile])
def test_a_bad_file_is_refused_and_changes_nothing(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    build().fit(data(False), 1, checkpoint=tmp_path)
    damage(tmp_path / "last.pt")
    distiller = build(seed=3)
    before = copy.deepcopy(distiller.student.state_dict())
    with pytest.raises(ValueError, match=r"last.pt must be a (readable|Distiller) checkpoint"):
        distiller.fit(data(False), 2, checkpoint=tmp_path, resume=True)
    assert not (tmp_path / "ran").exists()
    for name, value in distiller.student.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    build().fit(data(False), 1, checkpoint=tmp_path)

    def refuse(distiller: Distiller, message: str, loader: Any = None) -> None:
        before = copy.deepcopy(distiller.student.state_dict())
        with pytest.raises(ValueError, match=message):
            distiller.fit(loader or data(False), 2, checkpoint=tmp_path, resume=True)
        for name, value in distiller.student.state_dict().items():
            assert torch.equal(value, before[name])

    wider = build()
    wider.student[5] = nn.Linear(16, 5)
    refuse(wider, r"5.weight of the student must be \[4, 16\] as in the checkpoint, got \[5, 16\]")
    longer = build()
    longer.student.append(nn.Linear(4, 4))
    refuse(longer, "student must be the checkpoint's, got other tensors: 6.bias, 6.weight")
    alone = build()
    alone.callbacks = []
    refuse(alone, "callbacks and scheduler must be as at the checkpoint")
    refuse(build(), "loader must have 0 random generators as at the checkpoint, got 1", data(True))
    other_masks = build()
    other_masks.callbacks = [_Refusing()]
    refuse(other_masks, "not this one")


class _Refusing:
    def on_step(self, distiller: Distiller) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        raise ValueError("not this one")

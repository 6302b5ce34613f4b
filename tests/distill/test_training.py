"""What goes on around a step: accumulation, clipping, precision, schedulers, stopping, logs, NaN."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch import prune
from tautorch.distill import Distiller, JsonLog, SoftTarget, TensorBoardLog


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count: int, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(0, 3, (rows,))) for _ in range(count)]


def plain_loss(out: Tensor, _: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(out, target)


def sgd(student: nn.Module, loss: Any = plain_loss, lr: float = 0.5, **options: Any) -> Distiller:
    optimizer = torch.optim.SGD(student.parameters(), lr)
    return Distiller(None, student, loss, optimizer, **({"progress": False} | options))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numpy_linear_sgd(
    weight: np.ndarray,
    data: list[tuple[Tensor, Tensor]],
    groups: list[list[int]],
    lr: float,
    clip: float | None,
) -> tuple[np.ndarray, list[float]]:
    """SGD in float64 on y = x W^T under mean squared error, gradients averaged over each group of batches."""
    norms = []
    for group in groups:
        gradient = np.zeros_like(weight)
        for index in group:
            x, y = (value.double().numpy() for value in data[index])
            gradient += 2 * (x @ weight.T - y).T @ x / y.size / len(group)
        norm = float(np.sqrt((gradient**2).sum()))
        norms.append(norm)
        if clip is not None and norm > clip:
            gradient *= clip / norm
        weight = weight - lr * gradient
    return weight, norms


@pytest.mark.parametrize("clip", [None, 0.3])
def test_accumulation_and_clipping_against_numpy(clip: float | None) -> None:
    data = [(torch.randn(5, 4), torch.randn(5, 2)) for _ in range(5)]
    student = nn.Linear(4, 2, bias=False).double()
    start = student.weight.detach().numpy().copy()
    norms: list[float] = []
    run = sgd(student, lambda out, _, y: F.mse_loss(out, y), 0.4, accumulate=2, clip_norm=clip)
    run.callbacks.append(lambda run: norms.append(run.record["grad_norm"]))
    history = run.fit([(x.double(), y.double()) for x, y in data], 1)
    expected, expected_norms = numpy_linear_sgd(start, data, [[0, 1], [2, 3], [4]], 0.4, clip)
    # clip_grad_norm_ divides by norm + 1e-6.
    np.testing.assert_allclose(student.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    assert run.global_step == run.total_steps == 3
    assert len(history) == 1
    if clip is not None:
        assert max(expected_norms) > clip, "the case must clip"


@pytest.mark.parametrize("holder", ["keep_zeros", "callback", "hook", "schedule"])
def test_clipping_goes_by_the_gradients_that_are_used(holder: str) -> None:
    student = nn.Linear(50, 1, bias=False)
    prune.prune(student, sparsity=0.9)
    kept = student.weight.detach() != 0
    before = student.weight.detach().clone()
    options: dict[str, Any] = {}
    run = sgd(student, lambda out, _, y: 1e3 * F.mse_loss(out, y), 1.0, clip_norm=1.0)
    if holder == "keep_zeros":
        run.keep_zeros = True
    elif holder == "hook":
        options["handle"] = prune.hold_masks(student, optimizer=run.optimizer)
    elif holder == "schedule":
        run.callbacks.append(schedule := prune.Schedule(student, 0.9, kind="oneshot", begin=1))
        schedule.step()
    else:
        run.callbacks.append(prune.hold_masks(student))
    x, y = torch.randn(8, 50), torch.randn(8, 1)
    run.fit([(x, y)], 1)
    gradient = torch.autograd.grad(
        1e3 * F.mse_loss(F.linear(x, weight := before.clone().requires_grad_()), y), weight
    )[0].masked_fill(~kept, 0.0)
    torch.testing.assert_close(run.record["grad_norm"], float(gradient.norm()), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(student.weight.detach() - before, -gradient / gradient.norm())


def test_accumulated_batches_are_one_large_batch() -> None:
    data = batches(4)
    one = net()
    many = copy.deepcopy(one)
    sgd(one).fit([(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))], 1)
    sgd(many, accumulate=4).fit(data, 1)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_epoch_loss_is_the_mean_over_batches_whatever_the_groups() -> None:
    data = batches(3)
    losses = [sgd(net(), lr=0.0, accumulate=n) for n in (1, 2, 3)]
    for run in losses[1:]:
        run.student.load_state_dict(losses[0].student.state_dict())
    values = [run.fit(data, 1)[0]["loss"] for run in losses]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_bfloat16_runs_teacher_student_and_loss_under_autocast() -> None:
    seen: dict[str, Any] = {}

    class Loss(SoftTarget):
        def forward(self, student: Any, teacher: Any, target: Any) -> Tensor:
            seen.update(student=student.dtype, teacher=teacher.dtype, on=torch.is_autocast_enabled("cpu"))
            return super().forward(student, teacher, target)

    student = net()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    run = Distiller(net().eval(), student, Loss(), optimizer, amp=torch.bfloat16, progress=False)
    history = run.fit(batches(3), 2)
    assert seen == {"student": torch.bfloat16, "teacher": torch.bfloat16, "on": True}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in student.parameters())
    assert history[1]["loss"] < history[0]["loss"]
    assert not torch.is_autocast_enabled("cpu")


def test_float16_skips_a_step_that_overflows_and_lowers_its_scale() -> None:
    student = nn.Linear(6, 1, bias=False)
    before = student.weight.detach().clone()
    run = sgd(student, lambda out, _, y: (out.float() * y).mean(), 1e-3, amp=torch.float16)
    scales: list[tuple[float, bool]] = []
    run.callbacks.append(
        lambda run: scales.append((run.scaler.get_scale(), torch.equal(student.weight, before)))
    )
    run.fit([(torch.ones(1, 6), torch.tensor(value)) for value in (100.0, 1e-2)], 1)
    # 65536 * 100 is beyond float16; 32768 * 0.01 is not.
    assert scales == [(32768.0, True), (32768.0, False)]
    torch.testing.assert_close(student.weight, before - 1e-3 * 1e-2, rtol=1e-3, atol=1e-7)


def test_float16_that_always_overflows_is_an_error() -> None:
    run = sgd(nn.Linear(6, 1), lambda out, _, y: (out.float() * 1e30).mean(), amp=torch.float16)
    before = state_of(run.student)
    with pytest.raises(FloatingPointError, match="gradients must be finite"):
        run.fit(batches(40), 1)
    assert equal(before, state_of(run.student))


class Poisoned(nn.Module):
    """A finite loss whose gradient is NaN, or a loss of that value, at one step; running statistics move."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (lambda out: out * float("nan"), "loss must be finite, got nan at step 2"),
        (lambda out: out + float("inf"), "loss must be finite, got inf at step 2"),
        (lambda out: (out - out.detach()).abs().sqrt(), "gradients must be finite, got NaN or Inf at step 2"),
    ],
)
def test_nan_leaves_the_student_as_it_was_before_that_step(
    poison: Any, message: str, accumulate: int
) -> None:
    states: list[dict[str, Tensor]] = []
    count = 0

    def loss(out: Tensor, _: Any, target: Tensor) -> Tensor:
        nonlocal count
        count += 1
        bad = count == 3 * accumulate
        return poison(out).mean() if bad else F.cross_entropy(out, target)

    run = sgd(Poisoned(), loss, accumulate=accumulate)
    run.callbacks.append(lambda run: states.append(state_of(run.student)))
    with pytest.raises(FloatingPointError, match=message):
        run.fit(batches(8), 1)
    assert len(states) == 2
    assert equal(states[-1], state_of(run.student))
    assert all(p.grad is None for p in run.student.parameters())
    assert run.student.training, "as it was before fit"


def test_outputs_that_do_not_match_leave_the_student_as_it_was() -> None:
    student = Poisoned()
    teacher = nn.Linear(6, 5).eval()
    before = state_of(student)
    run = Distiller(
        teacher, student, SoftTarget(), torch.optim.SGD(student.parameters(), 0.1), progress=False
    )
    with pytest.raises(ValueError, match=r"logits of one shape, got \[4, 3\] and \[4, 5\]"):
        run.fit(batches(2), 1)
    assert equal(before, state_of(student)), "running statistics too"
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "epochs"),
    [
        ([1, 2, 3, 2, 2.5, 9], 2, 0.0, 5),
        ([1, 2, 3, 2, 4, 4, 4, 9], 2, 0.0, 7),
        ([1.0, 1.05, 1.2, 1.25, 9], 1, 0.1, 2),
        ([3, 2, 1], 5, 0.0, 3),
    ],
)
def test_early_stopping_on_the_score(
    scores: list[float], patience: int, min_delta: float, epochs: int
) -> None:
    given = iter(scores)
    run = sgd(net())
    history = run.fit(
        batches(1), len(scores), evaluate=lambda _: next(given), patience=patience, min_delta=min_delta
    )
    assert [record["score"] for record in history] == scores[:epochs]


def test_early_stopping_on_the_loss_and_not_before_best_from() -> None:
    values = iter([1.0, 5.0, 4.0, 3.0, 3.0, 3.0, 1.0])
    run = sgd(net(), lambda out, _, y: out.sum() * 0 + next(values))
    history = run.fit(batches(1), 7, patience=2, best_from=1)
    assert [record["loss"] for record in history] == [1.0, 5.0, 4.0, 3.0, 3.0, 3.0]


def test_stopped_runs_stay_stopped_when_resumed(tmp_path: Path) -> None:
    run = sgd(net(), lambda out, _, y: out.sum() * 0 + 1.0)
    history = run.fit(batches(1), 9, patience=3, checkpoint=tmp_path)
    assert len(history) == 4
    assert run.fit(batches(1), 9, patience=3, checkpoint=tmp_path, resume=True) == history
    assert run.global_step == 4


def test_any_scheduler_with_step_and_a_plateau_of_the_score() -> None:
    class Halving:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.calls = optimizer, 0

        def step(self) -> None:
            self.calls += 1
            self.optimizer.param_groups[0]["lr"] *= 0.5

    run = sgd(net(), lr=0.8)
    run.scheduler = Halving(run.optimizer)
    assert [record["lr"] for record in run.fit(batches(2), 2)] == [0.8, 0.4]
    assert run.scheduler.calls == 2
    run = sgd(net(), lr=1.0)
    run.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer, "max", factor=0.1, patience=0)
    scores = iter([1.0, 2.0, 1.5, 3.0])
    run.fit(batches(1), 4, evaluate=lambda _: next(scores))
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


class Parts:
    """A loss that says what it is made of."""

    def __call__(self, out: Tensor, teacher: Any, target: Tensor) -> Tensor:
        hard, size = F.cross_entropy(out, target), out.square().mean()
        self.components = {"hard": hard.detach(), "size": float(size.detach())}
        return hard + size


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_log(tmp_path: Path) -> None:
    log = JsonLog(tmp_path / "logs" / "run.jsonl", every=2)
    run = sgd(net(), Parts(), callbacks=[log])
    seen: list[dict[str, float]] = []
    run.callbacks.append(lambda run: seen.append(dict(run.record)))
    history = run.fit(batches(4), 2, evaluate=lambda _: 0.5)
    lines = read(log.path)
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 8, 8]
    assert lines[0] == {"step": 2, "epoch": 0, **seen[1]}
    assert set(seen[0]) == {"loss", "loss/hard", "loss/size", "lr", "grad_norm"}
    assert all(r["loss"] == pytest.approx(r["loss/hard"] + r["loss/size"], rel=1e-5) for r in seen)
    assert lines[2] == {"step": 4, "end_of_epoch": 0, **{k: v for k, v in history[0].items() if k != "epoch"}}
    assert history[0]["loss/hard"] == pytest.approx(np.mean([r["loss/hard"] for r in seen[:4]]))
    run.fit(batches(2), 1)
    assert len(read(log.path)) == 2, "a new run starts the file afresh"


def test_json_log_of_a_resumed_run_is_that_of_one_run(tmp_path: Path) -> None:
    data, first = batches(5), net()

    def go(name: str, kill: int | None, resume: bool = False) -> list[dict[str, Any]]:
        log = JsonLog(tmp_path / f"{name}.jsonl")
        run = sgd(copy.deepcopy(first), callbacks=[log, lambda run: 1 / (run.global_step != kill)])
        run.fit(data, 3, checkpoint=tmp_path / name, checkpoint_every=2, resume=resume)
        return read(log.path)

    whole = go("whole", None)
    with pytest.raises(ZeroDivisionError):
        go("broken", 8)
    assert len(read(tmp_path / "broken.jsonl")) == 9, (
        "steps 1 to 8 and an epoch: one step past the checkpoint"
    )
    assert go("broken", None, resume=True) == whole


def test_json_log_writes_no_infinity(tmp_path: Path) -> None:
    log = JsonLog(tmp_path / "run.jsonl")
    loss = lambda out, _, y: (out.float() * 1e3).mean()  # noqa: E731
    sgd(nn.Linear(6, 1), loss, 0.0, amp=torch.float16, callbacks=[log]).fit(batches(1), 1)
    assert read(log.path)[0]["grad_norm"] is None


def test_tensorboard_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = sgd(net(), Parts(), callbacks=[TensorBoardLog(tmp_path, every=2)])
    history = run.fit(batches(4), 2, evaluate=lambda _: 0.5)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("epoch/score")] == [4, 8]
    found = [event.value for event in events.Scalars("epoch/loss/hard")]
    assert found == pytest.approx([record["loss/hard"] for record in history])


def test_tensorboard_log_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="TensorBoardLog: needs tensorboard: pip install tensorboard"):
        TensorBoardLog(tmp_path)


def test_the_bar_shows_the_components() -> None:
    from rich.progress import Progress

    with Progress("{task.fields[loss]}", disable=True) as progress:
        sgd(net(), Parts(), progress=progress).fit(batches(3), 1)
        text = progress.tasks[0].fields["loss"]
    assert [word for word in text.split() if word.isalpha()] == ["loss", "hard", "size"]


def test_on_end_is_called_after_an_error_too() -> None:
    class Closing:
        ends = 0

        def on_end(self, distiller: Distiller) -> None:
            self.ends += 1

    closing = Closing()
    run = sgd(net(), callbacks=[closing])
    run.fit(batches(1), 1)
    with pytest.raises(ZeroDivisionError):
        run.fit(batches(1), 1, evaluate=lambda _: 1 / 0)
    assert closing.ends == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amp": torch.float32}, ValueError, "amp must be torch.bfloat16"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be a finite number > 0"),
        ({"clip_norm": float("nan")}, ValueError, "clip_norm must be a finite number > 0"),
        ({"accumulate": 0}, ValueError, "accumulate must be an int >= 1"),
        ({"accumulate": 1.5}, ValueError, "accumulate must be an int >= 1"),
        ({"scheduler": 3}, TypeError, r"scheduler must have a step\(\) method, got int"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sgd(net(), **options)


def test_bad_stopping_and_logs(tmp_path: Path) -> None:
    run = sgd(net())
    before = state_of(run.student)
    with pytest.raises(ValueError, match="patience must be an int >= 1, got 0"):
        run.fit(batches(1), 1, patience=0)
    with pytest.raises(ValueError, match="min_delta must be a finite number >= 0"):
        run.fit(batches(1), 1, patience=1, min_delta=-1.0)
    run.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer, "max")
    with pytest.raises(ValueError, match=r'ReduceLROnPlateau\(mode="max"\) must have evaluate='):
        run.fit(batches(1), 1)
    assert equal(before, state_of(run.student))
    with pytest.raises(ValueError, match="evaluate must return a number, got NaN"):
        run.fit(batches(1), 1, evaluate=lambda _: float("nan"))
    for log in (JsonLog, TensorBoardLog):
        with pytest.raises(ValueError, match=f"{log.__name__}: every must be an int >= 1, got 0"):
            log(tmp_path, every=0)

"""Training: what it learns, what it leaves alone, what it calls, and what it refuses."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tautorch.distill import Distiller, FeatureHint, SoftTarget
from tautorch.prune import Schedule, hold_masks, prune, sparsity_report


def models() -> tuple[nn.Sequential, nn.Sequential]:
    teacher = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).eval()
    student = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    return teacher, student


def loader(teacher: nn.Module, rows: int = 64) -> DataLoader[Any]:
    x = torch.randn(rows, 8)
    return DataLoader(TensorDataset(x, teacher(x).argmax(-1)), 16, shuffle=True)


def make(loss: Any = None, **options: Any) -> tuple[Distiller, DataLoader[Any]]:
    teacher, student = models()
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    options.setdefault("progress", False)
    return Distiller(teacher, student, loss or SoftTarget(4.0, 0.1), optimizer, **options), loader(teacher)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_student_comes_to_agree_with_the_teacher() -> None:
    distiller, data = make(SoftTarget(4.0, 0.0))
    teacher = state_of(distiller.teacher)
    history = distiller.fit(data, 40)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert [record["epoch"] for record in history] == list(range(40))
    assert equal(teacher, state_of(distiller.teacher))
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert distiller.global_step == distiller.total_steps == 160
    assert distiller.epoch == 40


def test_the_first_step_is_that_of_a_plain_loop() -> None:
    teacher, student = models()
    twin = copy.deepcopy(student)
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
    Distiller(teacher, student, SoftTarget(), torch.optim.SGD(student.parameters(), 0.1), progress=False).fit(
        [(x, y)], 1
    )
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    SoftTarget()(twin(x), teacher(x), y).backward()
    optimizer.step()
    assert equal(state_of(student), state_of(twin))


def test_without_a_teacher_it_is_plain_training() -> None:
    _, student = models()
    twin = copy.deepcopy(student)
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
    seen: list[Any] = []

    def loss(out: Tensor, teacher_out: Any, target: Tensor) -> Tensor:
        seen.append(teacher_out)
        return nn.functional.cross_entropy(out, target)

    Distiller(None, student, loss, torch.optim.SGD(student.parameters(), 0.1), progress=False).fit(
        [(x, y)], 2
    )
    assert seen == [None, None]
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
    assert equal(state_of(student), state_of(twin))


def test_a_loss_that_needs_a_teacher_says_so() -> None:
    _, student = models()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    batches = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(TypeError, match="SoftTarget: the teacher must give logits, got None"):
        Distiller(None, student, SoftTarget(), optimizer, progress=False).fit(batches, 1)
    with pytest.raises(ValueError, match="FeatureHint: the teacher must be a module to look into, got None"):
        Distiller(None, student, FeatureHint("0", "0"), optimizer, progress=False).fit(batches, 1)


def test_the_student_sees_the_batch_whatever_the_teacher_does_to_it() -> None:
    teacher = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)).eval()
    student = nn.Linear(8, 4)
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    x = torch.randn(16, 8)
    batch = x.clone()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    Distiller(teacher, student, SoftTarget(alpha=0.0), optimizer, progress=False).fit([batch], 1)
    assert torch.equal(seen[0], x)


def test_modes_are_put_back_one_by_one() -> None:
    distiller, data = make()
    distiller.student.eval()
    distiller.student[2].train()
    seen = []
    distiller.callbacks.append(lambda d: seen.append(d.student[1].training))
    distiller.fit(data, 1, evaluate=lambda model: float(not model[1].training))
    assert [m.training for m in distiller.student.modules()] == [False, False, False, True, False]
    assert seen == [True] * 4
    assert distiller.history[0]["score"] == 1.0


@pytest.mark.parametrize("poison", ["input", "loss", "gradient", "shape"])
def test_a_failed_step_leaves_the_student_as_it_was(poison: str) -> None:
    def loss(student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        value = (student - teacher).square().mean()
        if poison == "loss":
            return value / 0
        if poison == "gradient":
            # 0 at 0 with an infinite slope.
            return value * 0 + (value - value.detach()).sqrt()
        return value if poison != "shape" else student

    distiller, _ = make(loss)
    x = torch.randn(16, 8)
    if poison == "input":
        x[3, 3] = torch.nan
    before = state_of(distiller.student)
    error, message = {
        "input": (FloatingPointError, "loss must be finite, got nan at step 0"),
        "loss": (FloatingPointError, "loss must be finite, got inf"),
        "gradient": (FloatingPointError, "gradients must be finite"),
        "shape": (TypeError, r"loss must return a scalar tensor, got \[16, 4\]"),
    }[poison]
    with pytest.raises(error, match=message):
        distiller.fit([(x, None)], 1)
    assert equal(before, state_of(distiller.student))
    assert distiller.student.training
    assert all(p.grad is None for p in distiller.student.parameters())


def test_a_failed_step_puts_back_buffers_that_are_set_anew() -> None:
    class Averaging(nn.Linear):
        mean: Tensor | None

        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("last", None)

        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
            self.last = out.detach()
            return out

    student = Averaging()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    distiller = Distiller(None, student, lambda s, t, y: s.sum() / 0, optimizer, progress=False)
    with pytest.raises(FloatingPointError):
        distiller.fit([torch.randn(8, 4)], 1)
    assert torch.equal(student.mean, torch.zeros(2))
    assert student.last is None


def test_callbacks_are_called_where_they_say() -> None:
    class Everything:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def on_fit(self, distiller: Distiller) -> None:
            self.calls.append("fit")

        def on_step(self, distiller: Distiller) -> None:
            self.calls.append(f"step {distiller.global_step}")

        def on_epoch(self, distiller: Distiller) -> None:
            self.calls.append(f"epoch {distiller.history[-1]['epoch']}")

    listener, plain = Everything(), []
    distiller, data = make(callbacks=[listener, lambda d: plain.append(d.global_step)])
    distiller.fit(data, 2)
    steps = [f"step {i}" for i in range(1, 9)]
    assert listener.calls == ["fit", *steps[:4], "epoch 0", *steps[4:], "epoch 1"]
    assert plain == list(range(1, 9))


def test_a_pruning_schedule_is_a_callback() -> None:
    distiller, data = make()
    schedule = Schedule(distiller.student, 0.75, pattern="4x1", end=10, every=2)
    distiller.callbacks.append(schedule)
    distiller.fit(data, 4)
    assert schedule.steps_done == 16
    assert [row.block_sparsity for row in sparsity_report(distiller.student, "4x1").layers] == [0.75, 0.75]


def test_steps_that_the_scaler_leaves_out_count_for_schedules() -> None:
    student = nn.Sequential(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    done: list[int] = []
    optimizer.register_step_post_hook(lambda *_: done.append(len(done)))
    calls: list[int] = []

    def loss(out: Tensor, teacher: None, target: None) -> Tensor:
        calls.append(len(calls))
        return out.float().square().mean() * (1e6 if len(calls) <= 2 else 1.0)

    schedule = Schedule(student, 0.5, end=6)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 6)
    distiller = Distiller(
        None, student, loss, optimizer, amp=torch.float16, scheduler=rate, scheduler_interval="step",
        callbacks=[schedule], progress=False,
    )  # fmt: skip
    with warnings.catch_warnings():  # of torch, that the schedule steps first
        warnings.simplefilter("ignore")
        distiller.fit([torch.randn(16, 8)] * 6, 1)
    assert len(done) == 4
    assert distiller.global_step == 6
    assert schedule.done and rate.get_last_lr() == [0.0]


def test_held_masks_survive_as_hook_and_as_callback() -> None:
    distiller, data = make()
    prune(distiller.student, sparsity=0.5)
    handle = hold_masks(distiller.student)
    distiller.callbacks.append(handle)
    distiller.fit(data, 2)
    assert sparsity_report(distiller.student).sparsity == 0.5


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 2), ("step", 8)])
def test_the_scheduler_steps_where_asked(interval: Any, expected: int) -> None:
    distiller, data = make()
    distiller.scheduler = torch.optim.lr_scheduler.ExponentialLR(distiller.optimizer, 0.5)
    distiller.scheduler_interval = interval
    distiller.fit(data, 2)
    assert distiller.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**expected)


def test_a_plateau_scheduler_is_given_the_loss() -> None:
    distiller, data = make(lambda s, t, y: s.mean() * 0 + 1.0)
    distiller.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        distiller.optimizer, factor=0.1, patience=0
    )
    distiller.fit(data, 3)
    assert distiller.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_keep_best_ends_with_the_best_from_the_epoch_asked_for() -> None:
    distiller, data = make()
    scores = iter([9.0, 1.0, 3.0, 2.0])
    states = []

    def evaluate(model: nn.Module) -> float:
        states.append(state_of(model))
        return next(scores)

    distiller.fit(data, 4, evaluate=evaluate, keep_best=True, best_from=1)
    assert equal(state_of(distiller.student), states[2])
    assert not equal(states[2], states[3])


def test_outputs_and_batches_of_other_kinds() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x + shift)}

    teacher, student = (Wrapped(model) for model in models())
    teacher.eval()
    distiller = Distiller(
        teacher,
        student,
        SoftTarget(alpha=0),
        torch.optim.Adam(student.parameters(), 1e-2),
        output=lambda out: out["logits"],
        progress=False,
    )
    x = torch.randn(8, 8)
    as_tuple = distiller.fit([([x, x], None)], 1)
    assert len(as_tuple) == 1
    distiller.fit([{"x": x, "shift": x}], 1)
    distiller.split = lambda batch: ((batch[0], batch[1]), None)
    distiller.fit([(x, x, "ignored")], 1)


def test_a_sampler_that_counts_epochs_is_told() -> None:
    class Counting:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Loader(list[Any]):
        sampler = Counting()

    distiller, _ = make(SoftTarget(alpha=0))
    distiller.fit(Loader([torch.randn(4, 8)]), 3)
    assert Loader.sampler.epochs == [0, 1, 2]


def test_progress_shows_epoch_and_loss() -> None:
    screen = io.StringIO()
    with Progress("{task.description} {task.fields[loss]}", console=Console(file=screen)) as progress:
        distiller, data = make(progress=progress)
        distiller.fit(data, 3)
        (task,) = progress.tasks
        assert task.completed == task.total == 12
    assert "distil 3/3 loss 0." in screen.getvalue()


def test_no_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    distiller, data = make()
    distiller.fit(data, 1)
    assert capsys.readouterr() == ("", "")
    distiller.progress = True
    distiller.fit(data, 1)
    assert "distil 1/1" in capsys.readouterr().out


def test_models_and_optimizers_are_checked() -> None:
    teacher, student = models()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    loss = SoftTarget()
    teacher[1].train()
    with pytest.raises(
        ValueError, match=r"teacher must be in eval mode, got 1 in training mode; call teacher.eval"
    ):
        Distiller(teacher, student, loss, optimizer)
    teacher.eval()
    with pytest.raises(ValueError, match="must be two models"):
        Distiller(student.eval(), student, loss, optimizer)
    with pytest.raises(TypeError, match=r"teacher must be an nn.Module, got function"):
        Distiller(lambda x: x, student, loss, optimizer)  # type: ignore[arg-type]
    both = torch.optim.SGD([*student.parameters(), *teacher.parameters()], 0.1)
    with pytest.raises(ValueError, match="leave the teacher alone"):
        Distiller(teacher, student, loss, both)
    with pytest.raises(ValueError, match="hold the student's parameters, got none"):
        Distiller(teacher, student, loss, torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    with pytest.raises(TypeError, match="callbacks must have on_fit"):
        Distiller(teacher, student, loss, optimizer, callbacks=[3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="scheduler_interval must be"):
        Distiller(teacher, student, loss, optimizer, scheduler_interval="batch")  # type: ignore[arg-type]


def test_a_teacher_set_to_train_later_is_noticed() -> None:
    distiller, data = make()
    distiller.teacher.train()
    with pytest.raises(ValueError, match="eval mode"):
        distiller.fit(data, 1)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "loader must give at least one batch"),
        (iter([1]), {}, ValueError, "loader must be re-iterable"),
        (torch.ones(2), {}, TypeError, "loader must be an iterable of batches"),
        ([(1, 2, 3)], {}, TypeError, "a batch must be .* got tuple of 3"),
        ([("text", None)], {}, TypeError, "a batch must be a tensor"),
        ([torch.ones(2, 8)], {}, ValueError, "target must be given"),
        ([1], {"epochs": 0}, ValueError, "epochs must be an int >= 1"),
        ([1], {"epochs": 1.5}, ValueError, "epochs must be an int >= 1"),
        ([1], {"resume": True}, ValueError, "resume must have checkpoint="),
        ([1], {"checkpoint_every": 3}, ValueError, "checkpoint_every must"),
        ([1], {"keep_best": True}, ValueError, "keep_best must have evaluate"),
    ],
)
def test_bad_input_changes_nothing(
    data: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    distiller, _ = make()
    before = state_of(distiller.student)
    with pytest.raises(error, match=message):
        distiller.fit(data, **({"epochs": 1} | options))
    assert equal(before, state_of(distiller.student))

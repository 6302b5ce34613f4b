"""Policies in environments: seeded evaluation, one or many at once, and DAgger on the student's rollouts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from tautorch.distill import (
    GaussianKL,
    JsonLog,
    PolicyKL,
    Regression,
    SoftTarget,
    TemperatureSchedule,
    dagger,
    evaluate_policy,
)
from tautorch.distill.dagger import Samples
from tautorch.prune import Schedule


class Walk:
    """A position on a line; action 1 goes right, 0 left, and the reward is where one stands. Five steps."""

    action_space = SimpleNamespace(n=2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.at, self.time = float(self.random.normal()), 0
        self.visited: list[float] = [*getattr(self, "visited", []), self.at]
        return self._see(), {}

    def _see(self) -> Any:
        return np.array([self.at, self.time], dtype=np.float64)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in (0, 1)
        self.at += 1.0 if action == 1 else -1.0
        self.time += 1
        self.visited.append(self.at)
        return self._see(), self.at, self.time == 5, False, {}


class Slide(Walk):
    """The same with a continuous step in [-0.5, 0.5]."""

    action_space = SimpleNamespace(
        low=np.float32([-0.5]), high=np.float32([0.5]), shape=(1,), dtype=np.dtype(np.float32)
    )

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action.shape == (1,)
        assert action.dtype == np.float32
        assert abs(float(action[0])) <= 0.5
        self.at += float(action[0])
        self.time += 1
        return self._see(), self.at, self.time == 5, False, {}


def right(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)


def test_returns_are_those_of_the_seeds() -> None:
    found = evaluate_policy(right, Walk(), 4, seed=7)
    starts = [float(np.random.default_rng(7 + i).normal()) for i in range(4)]
    assert found == pytest.approx([5 * at + 15 for at in starts])


def test_a_box_is_clipped() -> None:
    found = evaluate_policy(lambda x: (9.0 * x[:, :1] ** 0, None), Slide(), 3, seed=1)
    starts = [float(np.random.default_rng(1 + i).normal()) for i in range(3)]
    assert found == pytest.approx([5 * at + 7.5 for at in starts])


def net(seed: int, inputs: int = 2, outputs: int = 2, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_vectorised_environments_give_the_same_returns(mode: str) -> None:
    kind = gymnasium.vector.AutoresetMode[mode]
    env = gymnasium.make("CartPole-v1", max_episode_steps=30)
    copies = [lambda: gymnasium.make("CartPole-v1", max_episode_steps=30)] * 3
    many = gymnasium.vector.SyncVectorEnv(copies, autoreset_mode=kind)
    policy = net(3, 4)
    assert evaluate_policy(policy, env, 7, seed=5) == evaluate_policy(policy, many, 7, seed=5)
    assert policy.training


def test_a_student_learns_to_act_like_its_teacher() -> None:
    """The teacher turns at 0.5; where the student walks is what it is taught on."""
    teacher = net(0).eval()
    with torch.no_grad():
        teacher[0].weight.zero_()
        teacher[0].weight[0, 0], teacher[0].bias[0] = 4.0, -2.0
        teacher[2].weight.zero_()
        teacher[2].weight[1, 0], teacher[2].bias[:] = -8.0, 0.0
    student = net(1)
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    options = {"rounds": 4, "steps": 100, "epochs": 8, "batch_size": 32, "progress": False, "seed": 3}
    history = dagger(
        teacher, student, Walk(), PolicyKL(), optimizer, evaluate=lambda s: -float(s.training), **options
    )
    assert [record["beta"] for record in history] == [1.0, 0.0, 0.0, 0.0]
    assert [record["samples"] for record in history] == [100, 200, 300, 400]
    assert all(record["episodes"] == 20 and record["score"] == 0.0 for record in history)
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]
    mine, theirs = (evaluate_policy(policy, Walk(), 50, seed=10**6) for policy in (student, teacher))
    assert np.mean(mine) == pytest.approx(np.mean(theirs), abs=0.7)


def test_who_acts_is_what_beta_says() -> None:
    """A teacher that goes right and a student that goes left: the walks tell who acted."""
    teacher, student = net(0).eval(), net(1)
    for policy, bias in ((teacher, [0.0, 9.0]), (student, [9.0, 0.0])):
        with torch.no_grad():
            policy[2].weight.zero_()
            policy[2].bias.copy_(torch.tensor(bias))
    optimizer = torch.optim.SGD(student.parameters(), 0.0)
    for beta, share in ((1.0, 1.0), (lambda i: 0.0, 0.0), (lambda i: 0.3, 0.3)):
        env = Walk()
        dagger(
            teacher,
            student,
            env,
            SoftTarget(alpha=0),
            optimizer,
            rounds=1,
            steps=500,
            epochs=1,
            batch_size=500,
            beta=beta,
            progress=False,
        )
        steps = np.array(env.visited).reshape(-1)
        moves = [b - a for a, b in itertools.pairwise(steps) if abs(abs(b - a) - 1) < 1e-12]
        assert np.mean(np.array(moves) > 0) == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0.01)


def test_continuous_actions_from_vectorised_environments() -> None:
    class Gaussian(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.mean = net(seed, 3, 1)
            self.log_std = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mean(x), self.log_std

    env = gymnasium.make_vec("Pendulum-v1", 2, vectorization_mode="sync")
    teacher, student = Gaussian(0).eval(), Gaussian(1)
    with torch.no_grad():
        teacher.log_std.fill_(-0.7)
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    history = dagger(
        teacher, student, env, GaussianKL(), optimizer, rounds=3, steps=100, epochs=8, progress=False
    )
    assert history[-1]["loss"] < 0.05 * history[0]["loss"] + 0.02
    assert student.log_std.item() == pytest.approx(-0.7, abs=0.2)
    mean_alone = dagger(
        teacher,
        student,
        env,
        Regression(),
        optimizer,
        rounds=1,
        steps=50,
        epochs=1,
        output=lambda out: out[0],
        progress=False,
    )
    assert mean_alone[0]["samples"] == 50


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def run(folder: Path | None, resume: bool = False, kill: int | None = None) -> tuple[nn.Module, Any]:
        teacher, student = net(0).eval(), nn.Sequential(net(1), nn.Dropout(0.1))
        optimizer = torch.optim.Adam(student.parameters(), 0.01)
        calls = []

        def evaluate(policy: nn.Module) -> float:
            calls.append(1)
            if len(calls) == kill:
                raise Killed
            return float(np.mean(evaluate_policy(policy, Walk(), 5, seed=99)))

        torch.manual_seed(4)
        history = dagger(
            teacher,
            student,
            Walk(),
            PolicyKL(),
            optimizer,
            rounds=4,
            steps=60,
            epochs=2,
            beta=0.5,
            capacity=150,
            evaluate=evaluate,
            keep_best=True,
            checkpoint=folder,
            resume=resume,
            progress=False,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        )
        return student, history

    whole, history = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill=3)
    resumed, again = run(tmp_path, resume=True)
    assert history == again
    assert max(record["samples"] for record in history) == 150
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(FileExistsError):
        run(tmp_path)


def test_callbacks_see_all_rounds_as_one_training(tmp_path: Path) -> None:
    student = net(1)
    optimizer, loss = torch.optim.Adam(student.parameters(), 0.01), SoftTarget(temperature=8.0, alpha=0.0)
    temperatures: list[float] = []
    callbacks = [
        TemperatureSchedule(loss, 8.0, 1.0),
        JsonLog(tmp_path / "log.jsonl"),
        lambda _: temperatures.append(loss.temperature),
    ]
    dagger(
        net(0).eval(), student, Walk(), loss, optimizer, rounds=4, steps=40, epochs=1, batch_size=20,
        capacity=80, progress=False, callbacks=callbacks,
    )  # fmt: skip
    steps = 2 + 4 + 4 + 4  # batches of each round
    np.testing.assert_allclose(temperatures, [8.0 - 7.0 * t / steps for t in range(1, steps + 1)], rtol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "end_of_epoch" not in line] == [*range(1, steps + 1)]
    assert all(line["loss/soft"] == line["loss"] for line in lines)


def test_a_schedule_goes_on_where_a_run_was_stopped(tmp_path: Path) -> None:
    def run(folder: Path, rounds: int, resume: bool = False) -> tuple[nn.Module, Any]:
        torch.manual_seed(4)
        student = net(1)
        schedule = Schedule(student, 0.75, end=12, every=2)
        optimizer = torch.optim.Adam(student.parameters(), 0.01)
        dagger(
            net(0).eval(), student, Walk(), PolicyKL(), optimizer, rounds=rounds, steps=40, epochs=1,
            batch_size=20, capacity=80, checkpoint=folder, resume=resume, progress=False,
            callbacks=[schedule, JsonLog(folder / "log.jsonl")],
        )  # fmt: skip
        return student, schedule

    whole, _ = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 3)
    resumed, schedule = run(tmp_path / "parts", 4, resume=True)
    assert schedule.steps_done == 14 and schedule.done
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    with pytest.raises(ValueError, match=r"callbacks must be as at the checkpoint \(2\), got 0"):
        dagger(
            net(0).eval(), resumed, Walk(), PolicyKL(), torch.optim.Adam(resumed.parameters()), rounds=5,
            steps=40, checkpoint=tmp_path / "parts", resume=True, progress=False,
        )  # fmt: skip


def test_the_reservoir_keeps_every_row_with_the_same_probability() -> None:
    counts = np.zeros(60)
    for trial in range(2000):
        draws, data = np.random.default_rng(trial), Samples(20)
        for start in (0, 15, 45):
            stop = {0: 15, 15: 45, 45: 60}[start]
            rows = torch.arange(start, stop, dtype=torch.float32)
            data.add([rows[:, None], rows], draws)
        assert len(data) == 20
        assert torch.equal(data.tensors[0][:, 0], data.tensors[1])
        kept = data.tensors[1].numpy().astype(int)
        assert len(set(kept.tolist())) == 20
        counts[kept] += 1
    # Binomial(2000, 1/3): a standard deviation of 21.
    assert np.abs(counts - 2000 / 3).max() < 90


def test_a_teacher_may_rule_actions_out() -> None:
    class OnlyRight(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[-float("inf"), 0.0]]).expand(len(x), 2)

    student = net(1)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    history = dagger(
        *(OnlyRight().eval(), student, Walk(), PolicyKL(), optimizer),
        rounds=2,
        steps=60,
        epochs=10,
        batch_size=30,
        progress=False,
    )
    assert history[-1]["loss"] < 0.1
    assert evaluate_policy(student, Walk(), 5, seed=3) == evaluate_policy(OnlyRight(), Walk(), 5, seed=3)


def test_bad_input_is_named() -> None:
    teacher, student = net(0).eval(), net(1)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)

    def run(env: Any = None, loss: Any = None, expert: nn.Module = teacher, **options: Any) -> None:
        options = {"rounds": 1, "steps": 10, "epochs": 1, "progress": False, **options}
        dagger(expert, student, env or Walk(), loss or PolicyKL(), optimizer, **options)

    with pytest.raises(ValueError, match="dagger: steps must be an int >= 1, got 0"):
        run(steps=0)
    with pytest.raises(ValueError, match=r"dagger: beta must be a number in \[0, 1\], got 1.5"):
        run(beta=1.5)
    with pytest.raises(ValueError, match=r"dagger: beta\(0\) must be a number in \[0, 1\], got 2.0"):
        run(beta=lambda i: 2.0)
    with pytest.raises(TypeError, match="env must have gymnasium's reset and step, got object"):
        run(env=object())
    with pytest.raises(ValueError, match=r"teacher must be in eval mode"):
        run(expert=net(2))
    with pytest.raises(ValueError, match="keep_best must have evaluate="):
        run(keep_best=True)
    with pytest.raises(ValueError, match=r"a policy must give 2 values, got \[1, 3\]"):
        run(expert=net(2, 2, 3).eval())
    with pytest.raises(ValueError, match="evaluate_policy: episodes must be an int >= 1, got 0"):
        evaluate_policy(right, Walk(), 0)
    with pytest.raises(
        TypeError, match=r"must give a tensor \[1, ...\] or a tuple starting with one, got str"
    ):
        evaluate_policy(lambda x: "right", Walk(), 1)
    with pytest.raises(FloatingPointError, match="finite outputs, got NaN"):
        evaluate_policy(lambda x: right(x) * float("nan"), Walk(), 1)
    multi = Walk()
    multi.action_space = SimpleNamespace(nvec=[2, 2])  # type: ignore[misc]
    with pytest.raises(TypeError, match="Discrete or Box action space"):
        evaluate_policy(right, multi, 1)
    assert evaluate_policy(right, multi, 1, act=lambda out: out.argmax(-1))

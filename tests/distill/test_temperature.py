"""Temperatures over the training, and in checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tautorch.distill import Distiller, FeatureHint, SoftTarget, TemperatureSchedule


def expected(kind: str, step: int, steps: int) -> float:
    t = min(1.0, step / steps)
    return {
        "constant": 8.0,
        "linear": 8.0 - 6.0 * t,
        "cosine": 2.0 + 6.0 * (1 + math.cos(math.pi * t)) / 2,
    }[kind]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_in_a_loop_of_ones_own(kind: Any) -> None:
    loss = SoftTarget(4.0)
    schedule = TemperatureSchedule(loss, 8.0, 2.0, kind=kind, steps=5)
    seen = [loss.temperature, *(schedule.step() for _ in range(7))]
    assert seen == pytest.approx([expected(kind, step, 5) for step in range(8)])
    assert loss.temperature == seen[-1]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_in_a_distiller_and_resumed(tmp_path: Path, kind: Any) -> None:
    teacher = nn.Linear(3, 2).eval()
    data = [torch.randn(4, 3) for _ in range(3)]

    def run(resume: bool, kill: int | None) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        student, seen = nn.Linear(3, 2), []
        soft = SoftTarget(4.0, 0.0)

        def loss(student_out: Any, teacher_out: Any, target: Any) -> Any:
            if len(seen) == kill:
                raise Killed
            seen.append(soft.temperature)
            return soft(student_out, teacher_out, target)

        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        schedule = TemperatureSchedule(soft, 8.0, 2.0, kind=kind)
        Distiller(teacher, student, loss, optimizer, callbacks=[schedule], progress=False).fit(
            data, 4, checkpoint=tmp_path / str(kill is None and not resume), resume=resume, checkpoint_every=1
        )
        return seen, student

    whole, student = run(False, None)
    assert whole == pytest.approx([expected(kind, step, 12) for step in range(12)])
    with pytest.raises(Killed):
        run(False, 5)
    rest, resumed = run(True, None)
    assert rest == whole[5:]
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))


def test_each_training_has_its_own_length() -> None:
    teacher, student, soft = nn.Linear(3, 2).eval(), nn.Linear(3, 2), SoftTarget(4.0, 0.0)
    seen: list[float] = []
    distiller = Distiller(
        teacher,
        student,
        lambda *given: (seen.append(soft.temperature), soft(*given))[1],
        torch.optim.SGD(student.parameters(), 0.1),
        callbacks=[TemperatureSchedule(soft, 8.0, 2.0)],
        progress=False,
    )
    data = [torch.randn(4, 3) for _ in range(3)]
    for epochs in (1, 4, 2):
        seen.clear()
        distiller.fit(data, epochs)
        assert seen == pytest.approx([expected("linear", step, 3 * epochs) for step in range(3 * epochs)])


def test_bad_input_is_named() -> None:
    loss = SoftTarget()
    with pytest.raises(ValueError, match="kind must be one of constant, linear, cosine, got 'step'"):
        TemperatureSchedule(loss, 8.0, 1.0, kind="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TemperatureSchedule: end must be a finite number > 0, got 0"):
        TemperatureSchedule(loss, 8.0, 0)
    with pytest.raises(ValueError, match='end must be given for kind "linear"'):
        TemperatureSchedule(loss, 8.0)
    with pytest.raises(TypeError, match="loss must have a temperature, got FeatureHint"):
        TemperatureSchedule(FeatureHint("a", "a", base=loss), 8.0, 1.0)
    with pytest.raises(ValueError, match="steps must be given outside a Distiller"):
        TemperatureSchedule(loss, 8.0, 1.0).step()
    saved = TemperatureSchedule(loss, 8.0, 1.0, steps=4).state_dict()
    with pytest.raises(ValueError, match=r"start must be 8.0 as at the checkpoint, got 9.0"):
        TemperatureSchedule(loss, 9.0, 1.0, steps=4).load_state_dict(saved)

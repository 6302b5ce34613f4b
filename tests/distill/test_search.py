"""The search over temperature and alpha."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tautorch.distill import Distiller, SoftTarget, search


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval(), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.05)


def data() -> DataLoader[Any]:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(
        TensorDataset(x, torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))),
        batch_size=8,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )


def test_a_grid_tries_all_and_a_trial_is_what_a_distiller_gives() -> None:
    teacher, student = models()
    before = [parameter.clone() for parameter in student.parameters()]
    loader, x = data(), torch.randn(50, 4)

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        return -float((model(x) - teacher(x)).square().mean())

    state, order = torch.get_rng_state(), loader.generator.get_state()  # type: ignore[union-attr]
    options: dict[str, Any] = {
        "epochs": 2,
        "temperatures": (1.0, 4.0),
        "alphas": (0.0, 0.5, 1.0),
        "seeds": (0, 7),
    }
    found = search(teacher, student, loader, evaluate, adam, progress=False, **options)
    assert [(t.temperature, t.alpha) for t in found.trials] == [
        (1.0, 0.0),
        (4.0, 0.0),
        (1.0, 0.5),
        (4.0, 0.5),
        (1.0, 1.0),
    ]
    assert found.best.score == max(trial.score for trial in found.trials)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), order)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert found == search(teacher, student, loader, evaluate, adam, progress=False, **options)
    # By hand: the last trial's second seed.
    torch.manual_seed(7)
    loss = SoftTarget(1.0, 1.0)
    Distiller(teacher, student, loss, adam(list(student.parameters())), progress=False).fit(loader, 2)
    with torch.no_grad():
        assert evaluate(student.eval()) == found.trials[-1].scores[1]
    table = str(found).splitlines()
    assert len(table) == 6
    assert table[1].endswith("*")


def test_halving_gives_the_time_to_the_promising() -> None:
    teacher, student = models()
    loader = [(torch.randn(4, 4), None)]
    seen: list[float] = []

    class Known(nn.Module):
        """A loss whose setting decides the score."""

        def __init__(self, temperature: float, alpha: float) -> None:
            super().__init__()
            seen.append(temperature)

        def forward(self, student_out: Tensor, teacher_out: Tensor, target: Any) -> Tensor:
            return student_out.square().mean()

    found = search(
        teacher,
        student,
        loader,
        lambda model: -abs(seen[-1] - 5.0),
        adam,
        epochs=9,
        temperatures=[float(t) for t in range(1, 10)],
        alphas=(0.0,),
        loss=Known,
        method="halving",
        progress=False,
    )
    assert [trial.epochs for trial in found.trials] == [1] * 9 + [3] * 3 + [9]
    assert sorted(trial.temperature for trial in found.trials[9:12]) == [4.0, 5.0, 6.0]
    assert found.best.temperature == 5.0
    assert found.best.epochs == 9


def test_a_scheduler_is_made_for_each_training() -> None:
    teacher, student = models()
    rates: list[float] = []

    def decay(optimizer: torch.optim.Optimizer) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    search(
        teacher,
        student,
        [torch.randn(4, 4)],
        lambda m: 0.0,
        adam,
        epochs=2,
        alphas=(0.0,),
        scheduler=decay,
        progress=False,
    )
    assert rates == [0.05] * 4


def test_a_training_that_fails_loses_and_the_next_goes_on() -> None:
    teacher, student = models()

    def loss(temperature: float, alpha: float) -> Any:
        return lambda s, t, y: s.square().mean() * (float("nan") if temperature == 1.0 else 1.0)

    run = {"epochs": 1, "alphas": (0.0,), "loss": loss, "progress": False}
    loader = [(torch.randn(4, 4), None)]
    found = search(teacher, student, loader, lambda m: 1.0, adam, temperatures=(1.0, 2.0), **run)  # type: ignore[arg-type]
    assert [trial.score for trial in found.trials] == [-float("inf"), 1.0]
    assert found.best.temperature == 2.0
    with pytest.raises(RuntimeError, match="at least one training must stay finite"):
        search(teacher, student, loader, lambda m: 1.0, adam, temperatures=(1.0,), **run)  # type: ignore[arg-type]


def test_bad_input_is_named() -> None:
    teacher, student = models()

    def run(**options: Any) -> None:
        options = {"epochs": 1, "progress": False, **options}
        search(options.pop("teacher", teacher), student, [torch.randn(4, 4)], lambda m: 0.0, adam, **options)

    with pytest.raises(ValueError, match="method must be one of grid, halving, got 'random'"):
        run(method="random")
    with pytest.raises(ValueError, match="epochs must be an int >= 1, got 0"):
        run(epochs=0)
    with pytest.raises(ValueError, match=r"alphas must be a number in \[0, 1\], got 1.5"):
        run(alphas=(1.5,))
    with pytest.raises(ValueError, match="temperatures must be a finite number > 0, got 0"):
        run(temperatures=(0,))
    with pytest.raises(ValueError, match="seeds must be a list of at least one"):
        run(seeds=())
    with pytest.raises(ValueError, match="eta must be an int >= 2"):
        run(eta=1)
    with pytest.raises(ValueError, match="callbacks must be left out"):
        run(callbacks=[print])
    with pytest.raises(ValueError, match="teacher must be in eval mode"):
        run(teacher=nn.Linear(4, 3))

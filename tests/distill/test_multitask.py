"""Several heads and several teachers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tautorch.distill import Distiller, Ensemble, FeatureHint, MultiTask, Regression, SoftTarget, Teachers


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.kind, self.size = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        return {"kind": self.kind(x), "size": self.size(x)}


def outputs() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    student, teacher = ({"kind": torch.randn(5, 3), "size": torch.randn(5, 2)} for _ in range(2))
    return student, teacher, {"kind": torch.randint(0, 3, (5,)), "size": torch.randn(5, 2)}


def test_the_sum_over_heads_as_dicts_and_as_tuples() -> None:
    student, teacher, target = outputs()
    losses = {"kind": SoftTarget(2.0, 0.3), "size": Regression(0.5)}
    expected = losses["kind"](student["kind"], teacher["kind"], target["kind"])
    expected = expected + 0.25 * losses["size"](student["size"], teacher["size"], target["size"])
    by_name = MultiTask(losses, weights={"size": 0.25})
    torch.testing.assert_close(by_name(student, teacher, target), expected)
    by_place = MultiTask(list(losses.values()), weights=[1.0, 0.25])
    pairs = [tuple(value.values()) for value in (student, teacher, target)]
    torch.testing.assert_close(by_place(*pairs), expected)
    without = MultiTask({"kind": SoftTarget(2.0, 0.0), "size": Regression(1.0)})
    del teacher["size"], target["kind"]
    torch.testing.assert_close(
        without(student, teacher, target),
        SoftTarget(2.0, 0.0)(student["kind"], teacher["kind"], None)
        + (student["size"] - target["size"]).square().mean(),
    )


def test_a_teacher_for_each_head_and_learned_weights() -> None:
    teachers = Teachers({"kind": nn.Linear(4, 3).eval(), "size": nn.Linear(4, 2).eval()})
    student = TwoHeads()
    loss = MultiTask({"kind": SoftTarget(2.0, 0.0), "size": Regression()}, weights="uncertainty")
    x = torch.randn(32, 4)
    with pytest.raises(ValueError, match=r"hold the loss's own parameters, got no learned.log_variances"):
        Distiller(teachers, student, loss, torch.optim.SGD(student.parameters(), 0.1))
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], 0.05)
    before = Regression()(student(x)["size"], teachers(x)["size"], None).item()
    Distiller(teachers, student, loss, optimizer, progress=False).fit([(x, None)], 30)
    assert Regression()(student(x)["size"], teachers(x)["size"], None).item() < 0.3 * before
    assert bool((loss.learned.log_variances < 0).all())  # type: ignore[union-attr]


def test_losses_that_look_inside_are_attached() -> None:
    teacher, student = TwoHeads().eval(), TwoHeads()
    hint = FeatureHint("body", "body", channels=(6, 6))
    loss = MultiTask({"kind": hint, "size": Regression()})
    assert {id(p) for p in hint.parameters()} <= {id(p) for p in loss.parameters()}
    x = torch.randn(3, 4)
    with loss.attached(teacher, student):
        found = loss(student(x), teacher(x), None)
    assert hint.adapter is not None
    term = (hint.adapter(student.body(x)) - teacher.body(x)).square().mean()
    torch.testing.assert_close(found, term + Regression()(student(x)["size"], teacher(x)["size"], None))


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 4.0]])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_ensemble_is_the_mean_of_softened_probabilities(
    weights: list[float] | None, temperature: float
) -> None:
    teachers = [nn.Linear(4, 3).double().eval() for _ in range(3)]
    x = torch.randn(5, 4, dtype=torch.float64)
    ensemble = Ensemble(teachers, temperature=temperature, weights=weights)
    with torch.no_grad():
        found = (ensemble(x) / temperature).softmax(-1).numpy()
        each = np.stack([teacher(x).numpy() for teacher in teachers]) / temperature
    p = np.exp(each) / np.exp(each).sum(-1, keepdims=True)
    share = np.array(weights or [1.0] * 3) / sum(weights or [1.0] * 3)
    np.testing.assert_allclose(found, np.einsum("k,kbc->bc", share, p), rtol=1e-12)
    assert not ensemble.training


def test_each_teacher_sees_the_inputs_whatever_the_one_before_does_to_them() -> None:
    rectified = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)).eval()
    plain, x = nn.Linear(6, 3).eval(), torch.randn(5, 6)
    given = x.clone()
    heads = Teachers({"a": rectified, "b": plain})(given)
    torch.testing.assert_close(heads["b"], plain(x))
    mean = Ensemble([rectified, plain])(given).softmax(-1)
    torch.testing.assert_close(mean, (rectified(x.clone()).softmax(-1) + plain(x).softmax(-1)) / 2)
    assert torch.equal(given, x)


def test_bad_input_is_named() -> None:
    student, teacher, target = outputs()
    loss = MultiTask({"kind": SoftTarget(), "size": Regression()})
    with pytest.raises(ValueError, match=r"the student must have the head 'size', got \['kind'\]"):
        loss({"kind": student["kind"]}, teacher, target)
    with pytest.raises(TypeError, match="outputs and target must be dicts or tuples by head, got Tensor"):
        loss(student["kind"], teacher, target)
    with pytest.raises(ValueError, match="SoftTarget: target must be given"):
        loss(student, teacher, None)
    with pytest.raises(ValueError, match="the student must have the head 2, got 2 items"):
        MultiTask([Regression()] * 3)(tuple(student.values()), tuple(teacher.values()), None)
    with pytest.raises(ValueError, match="losses must be one callable or more by head"):
        MultiTask({})
    with pytest.raises(TypeError, match="losses must be a dict or a list by head, got SoftTarget"):
        MultiTask(SoftTarget())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights must be of \['a'\], got \['b'\]"):
        MultiTask({"a": SoftTarget()}, weights={"b": 1.0})
    with pytest.raises(ValueError, match=r"weights\['a'\] must be a finite number > 0, got -1"):
        MultiTask({"a": SoftTarget()}, weights={"a": -1})
    with pytest.raises(ValueError, match="numbers by head or \"uncertainty\", got 'learned'"):
        MultiTask({"a": SoftTarget()}, weights="learned")  # type: ignore[arg-type]
    one = nn.Linear(4, 3).eval()
    with pytest.raises(ValueError, match="Ensemble: teachers must be two or more, got 1"):
        Ensemble([one])
    with pytest.raises(ValueError, match="one in training mode; call eval"):
        Ensemble([one, nn.Linear(4, 3)])
    with pytest.raises(ValueError, match="one for each of 2 teachers, got 1"):
        Ensemble([one, one], weights=[1.0])
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3\] and \[2, 5\]"):
        Ensemble([one, nn.Linear(4, 5).eval()])(torch.zeros(2, 4))
    with pytest.raises(
        ValueError, match=r"Teachers: teachers must be a dict of one or more by head, got \{\}"
    ):
        Teachers({})
    with pytest.raises(TypeError, match=r"Teachers: teachers must be nn.Modules, got str"):
        Teachers({"a": "one"})  # type: ignore[dict-item]

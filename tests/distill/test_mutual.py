"""Mutual learning: the loss by hand, who teaches whom, and a run of the Distiller."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tautorch.distill import Distiller, Mutual, Peers


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(logits: list[Any], target: Any, alpha: float, temperature: float) -> float:
    total = 0.0
    for k, mine in enumerate(logits):
        p = softmax(mine / temperature)
        kls = []
        for j, theirs in enumerate(logits):
            if j != k:
                q = softmax(theirs / temperature)
                kls.append((q * np.log(q / p)).sum(-1).mean() * temperature**2)
        hard = -np.log(softmax(mine)[np.arange(len(mine)), target]).mean() if target is not None else 0.0
        total += alpha * hard + (1 - alpha) * float(np.mean(kls))
    return total


@pytest.mark.parametrize("students", [2, 3, 5])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 1.0), (0.2, 3.0), (1.0, 1.0)])
def test_the_loss_is_the_papers(
    rng: np.random.Generator, students: int, alpha: float, temperature: float
) -> None:
    logits = [rng.standard_normal((6, 4)) * 2 for _ in range(students)]
    target = rng.integers(0, 4, 6)
    loss = Mutual(alpha, temperature)
    found = loss(tuple(map(torch.from_numpy, logits)), None, torch.from_numpy(target))
    assert float(found) == pytest.approx(by_hand(logits, target, alpha, temperature), rel=1e-12)


def test_ignored_rows_and_no_labels(rng: np.random.Generator) -> None:
    logits = [rng.standard_normal((6, 4)) for _ in range(3)]
    pair = tuple(map(torch.from_numpy, logits))
    assert float(Mutual(0.0)(pair, None, None)) == pytest.approx(by_hand(logits, None, 0.0, 1.0), rel=1e-12)
    target = np.array([0, -100, 3, -100, 1, 2])
    kept = target >= 0
    expected = by_hand([z[kept] for z in logits], target[kept], 0.5, 1.0)
    assert float(Mutual()(pair, None, torch.from_numpy(target))) == pytest.approx(expected, rel=1e-12)


def test_each_student_learns_from_the_others_and_never_teaches_to_be_followed(
    rng: np.random.Generator,
) -> None:
    """The gradient of the joint loss is that of K losses whose targets are constants."""
    logits = [torch.from_numpy(rng.standard_normal((5, 3))).requires_grad_() for _ in range(3)]
    Mutual(0.0)(tuple(logits), None, None).backward()
    for k, mine in enumerate(logits):
        p = softmax(mine.detach().numpy())
        others = [softmax(z.detach().numpy()) for j, z in enumerate(logits) if j != k]
        assert mine.grad is not None
        np.testing.assert_allclose(mine.grad.numpy(), (p - np.mean(others, 0)) / 5, rtol=1e-10, atol=1e-14)


def student(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def test_a_joint_step_is_the_step_of_each_alone() -> None:
    peers = Peers([student(0), student(1, 12)])
    alone = [copy.deepcopy(model) for model in peers]
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    outputs = [model(x) for model in alone]
    for k, model in enumerate(alone):
        kl = nn.functional.kl_div(
            outputs[k].log_softmax(-1),
            outputs[1 - k].detach().log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        (0.5 * nn.functional.cross_entropy(outputs[k], y) + 0.5 * kl).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    optimizer = torch.optim.SGD(peers.parameters(), 0.1)
    Distiller(None, peers, Mutual(), optimizer, progress=False).fit([(x, y)], 1)
    for model, expected in zip(peers, alone, strict=True):
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_peers_come_to_agree() -> None:
    peers = Peers([student(0), student(1)])
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(peers.parameters(), 0.02)
    history = Distiller(None, peers, Mutual(), optimizer, progress=False).fit([(x, y)], 80)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    a, b = peers(x)
    assert (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.95
    assert len(peers) == 2
    assert peers[1] is list(peers)[1]


class Killed(Exception):
    pass


def test_a_killed_run_of_peers_resumes_exactly(tmp_path: Path) -> None:
    x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))

    def run(kill: int | None, resume: bool) -> Peers:
        peers = Peers([nn.Sequential(student(k), nn.Dropout(0.2)) for k in range(3)])
        torch.manual_seed(5)

        def count(distiller: Distiller) -> None:
            if distiller.global_step == kill:
                raise Killed

        order = torch.Generator().manual_seed(1)
        loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=order)
        optimizer = torch.optim.SGD(peers.parameters(), 0.1, momentum=0.9)
        distiller = Distiller(None, peers, Mutual(), optimizer, callbacks=[count], progress=False)
        folder = tmp_path / str(kill is None and not resume)
        distiller.fit(loader, 3, checkpoint=folder, checkpoint_every=1, resume=resume)
        return peers

    whole = run(None, False)
    with pytest.raises(Killed):
        run(5, False)
    resumed = run(None, True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_student_that_works_in_place_changes_no_others_input() -> None:
    first, second = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), nn.Linear(4, 3)
    peers, x = Peers([first, second]), torch.randn(5, 4)
    before = x.clone()
    outputs = peers(x)
    assert torch.equal(x, before)
    assert torch.equal(outputs[0], first(before.clone())) and torch.equal(outputs[1], second(before))
    wanted = x.clone().requires_grad_()
    peers(wanted)[1].sum().backward()
    assert wanted.grad is not None and bool(wanted.grad.any())
    graph = torch.compile(peers, backend="eager", fullgraph=True)
    assert all(map(torch.equal, graph(x), outputs))
    assert torch.equal(x, before)


def test_output_takes_a_part() -> None:
    peers = Peers([nn.Linear(2, 3), nn.Linear(2, 3)], output=lambda out: out[:, :2])
    assert [tuple(z.shape) for z in peers(torch.zeros(4, 2))] == [(4, 2), (4, 2)]


def test_bad_input_is_named() -> None:
    one = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="Peers: students must be two or more, got 1"):
        Peers([one])
    with pytest.raises(ValueError, match="share no parameters"):
        Peers([one, nn.Sequential(one)])
    with pytest.raises(ValueError, match="share no parameters"):
        Peers([nn.ReLU()] * 2)
    with pytest.raises(TypeError, match="students must be nn"):
        Peers([one, "two"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"Mutual: alpha must be a number in \[0, 1\], got 2"):
        Mutual(2)
    x = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="tuple of two or more logits, got Tensor; use Peers"):
        Mutual()(x, None, None)
    with pytest.raises(TypeError, match="got 1 of them"):
        Mutual()((x,), None, None)
    with pytest.raises(ValueError, match=r"one shape, got \[3, 4\] and \[3, 5\]"):
        Mutual(0.0)((x, torch.zeros(3, 5)), None, None)
    with pytest.raises(ValueError, match="Mutual: target must be given with alpha"):
        Mutual()((x, x), None, None)

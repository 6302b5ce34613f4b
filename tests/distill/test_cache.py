"""Cached teachers: what is stored, what is read, how far the loss is from the teacher's, and damage."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tautorch.distill import (
    CachedDataset,
    CachedTarget,
    Distiller,
    SoftTarget,
    TeacherCache,
    TemperatureSchedule,
    TokenLevel,
    cache_teacher,
)

Array = np.ndarray[Any, np.dtype[np.float64]]


def log_softmax(z: Any) -> Any:
    z = np.asarray(z, dtype=np.float64)
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


class Decoder(nn.Module):
    def __init__(self, tokens: int = 11) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(tokens, 8), nn.Linear(8, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cumsum(self.body(ids), 1)) * 2


def collate(entries: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_stored_is_the_teachers(tmp_path: Path, dtype: torch.dtype) -> None:
    """Sequences of several lengths over several shards, read back by sample in any order."""
    teacher = Decoder().eval()
    batches = [torch.randint(0, 11, shape) for shape in ((3, 5), (2, 7), (4, 2))]
    full = cache_teacher(teacher, batches, tmp_path / "full", dtype=dtype, shard_bytes=600)
    top = cache_teacher(
        teacher, batches, tmp_path / "top", top_k=4, temperature=2.0, dtype=dtype, shard_bytes=1
    )
    assert len(full) == len(top) == 9
    assert len(list((tmp_path / "top").glob("*.safetensors"))) == 3
    assert not list(tmp_path.glob("**/*.tmp"))
    rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-22
    samples = [ids for batch in batches for ids in batch]
    for i in (8, 0, 4, 3, 2, 7, 1, 5, 6):
        with torch.no_grad():
            logits = teacher(samples[i][None])[0].numpy()
        np.testing.assert_allclose(
            full[i]["log_probs"].numpy(), log_softmax(logits), rtol=rounding, atol=1e-5
        )
        entry, log_p = top[i], log_softmax(logits / 2.0)
        best = np.argsort(-log_p, -1)[:, :4]
        assert entry["indices"].dtype == torch.int64
        np.testing.assert_array_equal(entry["indices"].numpy(), best)
        kept = np.take_along_axis(log_p, best, -1)
        np.testing.assert_allclose(entry["log_probs"].numpy(), kept, rtol=rounding, atol=1e-5)
        np.testing.assert_allclose(entry["log_rest"].numpy(), np.log(1 - np.exp(kept).sum(-1)), rtol=1e-4)


def test_of_a_classifier(tmp_path: Path) -> None:
    teacher = nn.Linear(3, 5).eval()
    x = torch.randn(6, 3)
    cache = cache_teacher(teacher, [(x[:4],), {"input": x[4:]}], tmp_path, top_k=2)
    entry = cache[5]
    assert [tuple(tensor.shape) for tensor in entry.values()] == [(2,), (2,), ()]
    assert entry["indices"][0] == teacher(x[5]).argmax()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_full_cache_gives_the_teachers_loss(tmp_path: Path, alpha: float, temperature: float) -> None:
    teacher = Decoder().eval()
    ids = torch.randint(0, 11, (4, 6))
    cache = cache_teacher(teacher, [ids], tmp_path, dtype=torch.float32)
    student, labels = torch.randn(4, 6, 11, requires_grad=True), torch.randint(0, 11, (4, 6))
    labels[1, 3:] = -100
    found = CachedTarget(cache, alpha, temperature=temperature)(
        student, None, (labels, collate([cache[i] for i in range(4)]))
    )
    torch.testing.assert_close(found, SoftTarget(temperature, alpha)(student, teacher(ids), labels))


@pytest.mark.parametrize("k", [1, 3, 10, 11])
def test_the_error_of_top_k_is_the_divergence_within_the_rest(tmp_path: Path, k: int) -> None:
    """KL of the whole = KL of k + 1 outcomes + (mass of the rest) * KL within the rest."""
    teacher, t = Decoder().double().eval(), 2.0
    ids = torch.randint(0, 11, (2, 3))
    cache = cache_teacher(teacher, [ids], tmp_path, top_k=k, temperature=t, dtype=torch.float32)
    student = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    found = CachedTarget(cache, 0.0)(student, None, collate([cache[i] for i in range(2)]))
    log_q, log_p = (log_softmax(z.detach().numpy().reshape(6, 11) / t) for z in (teacher(ids), student))
    whole, gap = 0.0, 0.0
    for lq, lp in zip(log_q, log_p, strict=True):
        rest = np.argsort(-lq)[k:]
        q, p = np.exp(lq), np.exp(lp)
        whole += (q * (lq - lp)).sum()
        if len(rest):
            a, b = q[rest] / q[rest].sum(), p[rest] / p[rest].sum()
            gap += q[rest].sum() * (a * np.log(a / b)).sum()
    expected = t**2 * (whole - gap) / 6
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert found.item() <= t**2 * whole / 6 + 1e-6
    found.backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_a_teacher_that_rules_tokens_out(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.arange(5) > 1, -float("inf"))

    x = torch.randn(2, 3)
    teacher = Masked(3, 5).eval()
    for k in (None, 3):
        cache = cache_teacher(teacher, [x], tmp_path / str(k), top_k=k)
        student = torch.randn(2, 5, requires_grad=True)
        loss = CachedTarget(cache, 0.0, temperature=1.0)(student, None, collate([cache[0], cache[1]]))
        log_q, log_p = (log_softmax(z.detach().numpy()) for z in (teacher(x)[:, :2], student))
        expected = (np.exp(log_q) * (log_q - log_p[:, :2])).sum(-1).mean()
        assert loss.item() == pytest.approx(expected, rel=2e-3)
        loss.backward()
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all())


def test_a_distiller_trains_without_the_teacher(tmp_path: Path) -> None:
    teacher, student = Decoder().eval(), Decoder()
    ids = torch.randint(0, 11, (24, 6))
    cache = cache_teacher(
        teacher, DataLoader(TensorDataset(ids), batch_size=5, collate_fn=first), tmp_path, top_k=6
    )
    data = CachedDataset(TensorDataset(ids, ids), cache)
    assert len(pickle.loads(pickle.dumps(data))) == 24
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    loss = TokenLevel(CachedTarget(cache, 0.0))
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    before = SoftTarget(1.0, 0.0)(student(ids), teacher(ids), None).item()
    Distiller(None, student, loss, optimizer, progress=False).fit(loader, 15)
    assert SoftTarget(1.0, 0.0)(student(ids), teacher(ids), None).item() < 0.3 * before


def first(items: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([item[0] for item in items])


def test_token_level_shifts_entries_with_the_logits(tmp_path: Path) -> None:
    teacher = Decoder().eval()
    ids, student = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 11)
    cache = cache_teacher(teacher, [ids], tmp_path, top_k=11, temperature=3.0, dtype=torch.float32)
    target = (ids, collate([cache[0], cache[1]]))
    found = TokenLevel(CachedTarget(cache, 0.2))(student, None, target)
    torch.testing.assert_close(found, TokenLevel(SoftTarget(3.0, 0.2))(student, teacher(ids), ids))
    alone = TokenLevel(CachedTarget(cache, 0.0))(student, None, target[1])
    torch.testing.assert_close(alone, SoftTarget(3.0, 0.0)(student, teacher(ids), None))


def test_a_killed_writer_leaves_no_cache_and_a_new_one_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, x = nn.Linear(3, 5).eval(), torch.randn(6, 3)
    real = os.replace

    def fail(source: Any, target: Any) -> None:
        if str(target).endswith("00001.safetensors"):
            raise OSError("no space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        cache_teacher(teacher, [x[:3], x[3:]], tmp_path, shard_bytes=1)
    with pytest.raises(FileNotFoundError, match="an unfinished cache has none"):
        TeacherCache(tmp_path)
    monkeypatch.undo()
    assert len(cache_teacher(teacher, [x[:3], x[3:]], tmp_path, shard_bytes=1)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.safetensors",
        "00001.safetensors",
        "cache.json",
    ]
    with pytest.raises(FileExistsError, match="open it with TeacherCache"):
        cache_teacher(teacher, [x], tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    teacher, x = nn.Linear(3, 5).eval(), torch.randn(6, 3)
    cache_teacher(teacher, [x], tmp_path)
    shard, index = tmp_path / "00000.safetensors", tmp_path / "cache.json"
    whole, text = shard.read_bytes(), index.read_text()
    TeacherCache(tmp_path, verify=True)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"must be a whole cache, got .*another checksum; write it again"):
        TeacherCache(tmp_path, verify=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="missing or not of"):
        TeacherCache(tmp_path)
    shard.write_bytes(whole)
    for broken in (text[:40], text.replace('"format": 1', '"format": 2'), "[]"):
        index.write_text(broken)
        with pytest.raises(ValueError, match="must be a whole cache"):
            TeacherCache(tmp_path)
    about = json.loads(text)
    about["shards"][0]["file"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must be a whole cache"):
        TeacherCache(tmp_path)


def test_bad_input_is_named(tmp_path: Path) -> None:
    teacher, x = nn.Linear(3, 5).eval(), torch.randn(6, 3)

    def make(
        folder: str = "new", model: nn.Module = teacher, batches: Any = (x,), **options: Any
    ) -> TeacherCache:
        return cache_teacher(model, batches, tmp_path / folder, **options)

    with pytest.raises(ValueError, match=r"teacher must be an nn.Module in eval mode"):
        make(model=nn.Linear(3, 5))
    with pytest.raises(ValueError, match="top_k must be an int >= 1, got 0"):
        make(top_k=0)
    with pytest.raises(ValueError, match="top_k must be at most 5 classes, got 6"):
        make(top_k=6)
    with pytest.raises(ValueError, match="temperature must be 1 without top_k"):
        make(temperature=2.0)
    with pytest.raises(ValueError, match=r"dtype must be float16, bfloat16 or float32, got torch.int8"):
        make(dtype=torch.int8)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        make(batches=[])
    with pytest.raises(TypeError, match=r"logits \[B, C\] or \[B, L, C\], got tuple; give output="):
        make(output=lambda out: (out,))
    with pytest.raises(ValueError, match="no NaN, got one in the batch after sample 6"):
        make(batches=[x, x * float("nan")])
    assert not (tmp_path / "new" / "cache.json").exists()
    cache = make("top", top_k=2, temperature=3.0)
    with pytest.raises(ValueError, match="temperature must be 3, that of the top-k cache, got 4"):
        CachedTarget(cache, temperature=4.0)
    moved = CachedTarget(cache, alpha=0.0)
    TemperatureSchedule(moved, 3.0, 1.0, steps=2).step()
    with pytest.raises(ValueError, match="temperature must stay 3, that of the top-k cache, got 2"):
        moved(torch.zeros(6, 5), None, collate([cache[i] for i in range(6)]))
    with pytest.raises(IndexError):
        cache[6]
    with pytest.raises(ValueError, match="dataset must have the cache's 6 samples, got 5"):
        CachedDataset(TensorDataset(x[:5]), cache)
    loss, entry = CachedTarget(cache), collate([cache[i] for i in range(6)])
    with pytest.raises(
        TypeError, match=r"target must be \(labels, entry\) or an entry of the cache, got Tensor"
    ):
        loss(torch.zeros(6, 5), None, torch.zeros(6))
    with pytest.raises(ValueError, match=r"target must hold labels with alpha=0.1"):
        loss(torch.zeros(6, 5), None, entry)
    with pytest.raises(ValueError, match=r"the cache's 5 classes, got \[6, 4\]"):
        loss(torch.zeros(6, 4), None, entry)
    with pytest.raises(
        ValueError, match=r"the entry's log_probs must be \[4, 2\] like the logits, got \[6, 2\]"
    ):
        loss(torch.zeros(4, 5), None, entry)

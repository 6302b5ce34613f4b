"""The tasks' data, and the whole of `make methods` in quick mode."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benches.methods import __main__ as methods
from benches.methods import digits, text, text_jobs


def test_text_parts_follow_from_names_alone() -> None:
    for name in ("abc.py", "json/decoder.py", "os.py"):
        first = hashlib.sha256(name.encode()).digest()[0] % 10
        assert text.part_of(name) == {0: "heldout", 1: "validation"}.get(first, "training")
    parts = text.corpus()
    assert len(parts["training"]) > 4 * len(parts["heldout"]) > 0
    assert all(int(part.max()) < text.SYMBOLS for part in parts.values())
    # A tab, newline and printable characters survive.
    sample = "".join(text.ALPHABET[i] for i in parts["heldout"][:20_000].tolist())
    assert "import" in sample and "\n" in sample


def test_windows_are_the_same_twice_and_predict_the_next_character() -> None:
    loader = text.Windows(2, seed=3)
    once, again = list(loader), list(loader)
    assert len(once) == len(loader) == 2
    for (x, y), (x2, y2) in zip(once, again, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2) and torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(once[0][0], once[1][0])


def test_perplexity_of_a_uniform_guess_is_the_number_of_symbols() -> None:
    model = text.Decoder(32, 1)
    torch.nn.init.zeros_(model.head.weight)
    assert text.perplexity(model, windows=4) == pytest.approx(text.SYMBOLS, rel=1e-6)


def test_decoder_does_not_see_what_comes() -> None:
    model = text.Decoder(32, 2).eval()
    tokens = torch.randint(text.SYMBOLS, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % text.SYMBOLS
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12:], after[:, 12:])


def test_injected_outliers_leave_the_function_as_it_was() -> None:
    model = text.Decoder(64, 2).eval()
    tokens = torch.randint(text.SYMBOLS, (2, 20))
    before = model(tokens)
    text_jobs.inject_outliers(model, 0)
    torch.testing.assert_close(model(tokens), before)
    assert int((model.blocks[0].norm1.weight == text_jobs.GAIN).sum()) == text_jobs.OUTLIERS


def test_each_image_is_held_out_once() -> None:
    folds = [digits.fold(1, index) for index in range(digits.FOLDS)]
    assert sum(len(fold.heldout_y) for fold in folds) == digits.IMAGES
    # Undone standardising, the held-out images of the folds are all images.
    greys = [(fold.heldout_x - fold.background).flatten(1).sum(1) for fold in folds]
    assert len(torch.cat(greys)) == digits.IMAGES
    for fold in folds:
        assert len(fold.train_y) + len(fold.heldout_y) == digits.IMAGES
        assert abs(float(fold.train_x.mean())) < 1e-4
    few = digits.few(folds[0], 3, seed=0)
    assert few.train_y.bincount().tolist() == [3] * 10
    assert digits.upscale(few.train_x).shape == (30, 784)


def test_mixed_images_and_targets_are_means_of_the_same_two() -> None:
    data = digits.few(digits.fold(0, 0), 2, seed=0)
    # Images that say what they are: all pixels are the label.
    labels = data.train_y.float().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    loader = digits.Batches(replace(data, train_x=labels, background=0.0), steps=2, seed=5, mixed=True)
    for (x, y), (x2, y2) in zip(loader, loader, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert y.shape == (64, 10) and bool((y >= 0).all()) and float((y > 0).sum(1).max()) == 2
        torch.testing.assert_close(y.sum(1), torch.ones(64))
        # The middle is never moved out of the image.
        torch.testing.assert_close(x[:, 0, 4, 4], y @ torch.arange(10.0))


def test_lenet_has_the_papers_size() -> None:
    assert sum(p.numel() for p in digits.LeNet().parameters()) == 266_610


@pytest.mark.slow  # every method on every task runs once: 15 seconds on two cores
def test_quick_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    assert methods.main(["--quick", "--cache", str(cache)]) == 0
    found = json.loads((cache / "methods.json").read_text())
    assert found["quick"] and {row["task"] for row in found["rows"]} == set(methods.TASKS)
    assert all(row["verdict"] == "not judged" and row["parts"]["0"] for row in found["rows"])
    assert (cache / "methods.html").read_text().count("<svg") > 5
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.pt")}
    capsys.readouterr()
    assert methods.main(["--quick", "--only", "digits", "--cache", str(cache)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in cache.glob("*.pt")}
    rows = json.loads((cache / "methods.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"digits"}

"""The demo end to end, small: every step runs, and its promises on accuracy and reloading are judged."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tautorch.compress import Report
from tautorch.demo import pipeline, verify

SMALL = {"teacher_blocks": 1, "teacher_epochs": 1, "student_epochs": 2, "tune_epochs": 2, "seconds": 0.01}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("demo") / "not" / "there" / "yet"
    settings = pipeline.Settings(out=out, timing=False, **SMALL)  # type: ignore[arg-type]
    return pipeline.run(settings, Console(file=io.StringIO())), out


def test_report_covers_every_stage_and_layer(done: tuple[Report, Path]) -> None:
    report, _ = done
    assert [stage.name for stage in report.stages] == ["teacher", "student", "compact", "compiled"]
    assert [layer.name for layer in report.layers] == [
        "features.0", "features.3", "features.6", "head.1", "head.3",
    ]  # fmt: skip
    for layer in report.layers:
        assert layer.reason, f"{layer.name} has no reason"
        assert [shape.partition("x")[0] for shape in layer.before_s] == ["1", "64"]
    # Folded: 288 + 32, ..., that is the student without batch norms.
    assert sum(layer.parameters for layer in report.layers) == report.stages[1].parameters
    assert report.stages[1].parameters == 390_410
    # 4x1 blocks at 75 %, and 1152-32-256 in the place of 1152-256.
    kept = 320 + 18_432 // 4 + 64 + 73_728 // 4 + 128 + 1152 * 32 + 32 * 256 + 256 + 2570
    assert report.stages[2].parameters == pytest.approx(kept, abs=8)
    assert all(not stage.latency_s for stage in report.stages)


def test_reload_was_identical(done: tuple[Report, Path]) -> None:
    report, out = done
    check = next(check for check in report.checks if "reloading" in check.name)
    assert check.passed and check.got == "540 of 540 logits, 540 digits"
    assert report.stages[-1].bytes == (out / "compiled.safetensors").stat().st_size


def test_files_are_there_and_agree(done: tuple[Report, Path]) -> None:
    report, out = done
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert Report.from_dict(data) == report
    assert report.title in (out / "report.html").read_text(encoding="utf-8")


def test_a_changed_prediction_is_noticed(done: tuple[Report, Path], tmp_path: Path) -> None:
    _, out = done
    tensors = load_file(out / "expected.safetensors")
    # The last bit of one logit: no digit changes, and it must count all the same.
    tensors["logits"].view(torch.int32)[7, 3] ^= 1
    save_file(tensors, tmp_path / "expected.safetensors")
    found = verify.compare(out / "compiled.safetensors", tmp_path / "expected.safetensors")
    assert found == verify.Reload(images=540, same_logits=539, same_digits=540)
    assert not found.identical


def test_a_model_that_does_not_load_is_told(done: tuple[Report, Path], tmp_path: Path) -> None:
    _, out = done
    (tmp_path / "broken.safetensors").write_bytes((out / "compiled.safetensors").read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"broken\.safetensors failed"):
        verify.in_fresh_process(tmp_path / "broken.safetensors", out / "expected.safetensors")

"""The example runs as it is, stays short, and what it returns is a model that was compiled and reloaded."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
import torch

from tautorch.nn import PackedModule

EXAMPLE = Path(__file__).parents[2] / "examples" / "compress_my_model.py"


def test_runs_and_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    path = tmp_path / "mine.safetensors"
    model = runpy.run_path(str(EXAMPLE))["main"](str(path))
    assert path.stat().st_size < 1_140_000 / 5, "the float model takes 1.14 MB"
    assert any(isinstance(module, PackedModule) for module in model.modules())
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 16, 16)).isfinite().all()
    printed = capsys.readouterr().out
    assert "Layers" in printed and "before → after" in printed and "reason" in printed


def test_takes_under_twenty_lines() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    lines = {node.lineno for node in ast.walk(main) if isinstance(node, (ast.stmt, ast.expr))}
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(lines) + len(imports) < 24, "imports included; the code itself stays under twenty lines"
    assert len(lines) < 20

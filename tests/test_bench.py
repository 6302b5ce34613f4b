"""``tautorch bench``: what runs is proven first, forced, and named; every shape of it at small sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tautorch import bench, bench_cases, cli, dispatch, ops, timing
from tautorch.bench_cases import Group

RUNNER = CliRunner()
BEST = bench.kernels()[0]


def small(quick: bool) -> Iterator[Group]:
    yield bench_cases.dense(40, 70, (1, 3))
    yield bench_cases.weight_only(72, 64, (1, 3))
    yield bench_cases.sparse(64, 72, (1, 3), "4x1")
    yield bench_cases.sparse(64, 72, (1, 3), "16x16")
    yield bench_cases.lowrank(96, 80, (1, 3))
    yield bench_cases.conv("conv 3x3", 8, 5, 1)
    yield bench_cases.conv("depthwise 3x3", 8, 5, 8)


def compare(a: Callable[[], object], b: Callable[[], object], **options: object) -> timing.Comparison:
    a()
    b()
    return timing.Comparison(3e-6, 2e-6, 1.5, 1.4, 1.6, 5, 0.0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "groups", small)
    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(bench, "_peak", lambda kernel: 2.0)


def test_every_kernel_runs_every_layer(short: None, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = RUNNER.invoke(cli.app, ["bench", "--quick", "--json", str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    per_kernel = 2 * [("int8_linear", 1), ("int8_linear", 3), ("sparse_linear", 1), ("sparse_linear", 3)]
    per_kernel += [("lowrank_linear", 1), ("lowrank_linear", 3), ("int8_conv2d", 1), ("int8_conv2d", 1)]
    assert sorted((r["kernel"], r["op"], r["rows"]) for r in found["rows"]) == sorted(
        (kernel, *row) for kernel in bench.kernels() for row in per_kernel
    )
    first = found["rows"][0]
    assert (first["fp32_us"], first["us"], first["ratio"]) == (3.0, 2.0, 1.5)
    assert first["gops"] == pytest.approx(2 * 40 * 70 / 2e-6 / 1e9)
    assert first["share_of_peak"] == pytest.approx(first["gops"] / 2)
    assert all((r["share_of_peak"] is None) == (r["kernel"] == "scalar") for r in found["rows"])
    assert all((r["gb_s"] is None) == (r["rows"] != 1 or "conv" in r["op"]) for r in found["rows"])
    assert found["threads"] == torch.get_num_threads() and found["left_out"] == []
    assert all(name in result.output for name in bench.kernels())
    assert all(dispatch.forced(op) is None for op in dispatch.OPS)


def test_the_layers_are_those_that_the_help_promises() -> None:
    group = bench_cases.sparse(64, 72, (1, 3), "4x1")
    kept = sum(int(layer.ours.dense_weight().count_nonzero()) for layer in group.layers[:1])
    assert group.layers[0].macs == pytest.approx(kept, rel=0.02)  # some kept weights round to 0
    assert group.layers[1].macs == 3 * group.layers[0].macs
    depthwise = bench_cases.conv("depthwise", 8, 5, 8).layers[0]
    assert depthwise.macs == 5 * 5 * 8 * 9


def test_a_wrong_product_is_not_timed(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    true = ops.int8_linear
    monkeypatch.setattr(ops, "int8_linear", lambda *a, **kw: true(*a, **kw) + 1)
    result = RUNNER.invoke(cli.app, ["bench", "--kernel", BEST])
    assert result.exit_code == 1
    assert "70 of 70 accumulators are wrong" in result.output and "fp32 / ours" not in result.output


def test_nothing_is_timed_past_the_budget(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET_S", -1.0)
    result = bench.run([BEST], quick=True)
    assert result.rows == [] and len(result.left_out) == 12
    assert result.left_out[0] == f"{BEST}, 40 x 70, 1 rows"


def test_a_busy_machine_is_told(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "disturbed" not in RUNNER.invoke(cli.app, ["bench", "--kernel", BEST]).output
    busy = timing.Comparison(3e-6, 2e-6, 1.5, 1.4, 1.6, 5, 0.4)
    monkeypatch.setattr(timing, "compare", lambda a, b, **options: (a(), b(), busy)[2])
    assert "40% of the samples were disturbed" in RUNNER.invoke(cli.app, ["bench", "--kernel", BEST]).output


def test_a_kernel_named_twice_is_timed_once(short: None) -> None:
    assert len(bench.run(["scalar", "scalar"], quick=True).rows) == len(
        bench.run(["scalar"], quick=True).rows
    )


def test_kernels_that_do_not_run_here() -> None:
    result = RUNNER.invoke(cli.app, ["bench", "--kernel", "sve9"])
    assert result.exit_code == 2
    assert "'sve9'" in result.output and BEST in result.output


def test_the_peak_is_of_all_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = bench._peak(BEST)
    finally:
        torch.set_num_threads(before)
    assert 1 < one < 1e5

"""``explain`` tells the truth about what runs; ``warmup`` leaves nothing to do for the first call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tautorch
from tautorch import dispatch
from tautorch.nn import Int8Conv2d, Int8Linear, LowRankConv2d, PackedModule, SparseConv2d, SparseLinear


class Model(nn.Module):
    """Two tautorch layers, one of torch, and one that the input does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Int8Conv2d.from_float(nn.Conv2d(3, 8, 3, padding=1), activation="relu")
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.out = Int8Linear.from_float(nn.Linear(4, 2))
        self.unused = Int8Linear.from_float(nn.Linear(5, 5))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.drop(self.norm(self.conv(x)))
        y: Tensor = self.out(self.head(x.mean((2, 3)) * scale))
        return y


@pytest.fixture
def model() -> Model:
    torch.manual_seed(3)
    return Model()


def paragraph(text: str, start: str) -> list[str]:
    """The lines of a layer's paragraph."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    rest = [i for i in range(first + 1, len(lines)) if not lines[i].startswith("  ")]
    return lines[first : rest[0] if rest else len(lines)]


def test_a_layer_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Int8Linear.from_float(nn.Linear(16, 8))
    text = tautorch.explain(layer)
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    assert lines[0] == repr(layer)
    assert lines[1] == f"  kernel    {layer.kernel()}"
    assert f"  weight    {layer.packed_bytes()} bytes packed" in lines
    assert not any(line.startswith("  ran") for line in lines)


def test_every_kernel_is_accounted_for() -> None:
    layer = Int8Linear.from_float(nn.Linear(16, 8))
    lines = tautorch.explain(layer).splitlines()
    for name, reason in layer.refusals().items():
        mine = [line for line in lines if line.startswith(f"  not       {name}: ")]
        assert len(mine) == (name != layer.kernel())
        if reason is not None:
            assert mine[0].endswith(reason)


def test_a_model_with_an_input(model: Model) -> None:
    text = tautorch.explain(model, torch.randn(2, 3, 5, 6))
    conv = paragraph(text, "conv: Int8Conv2d(")
    kernel = dispatch.last_used("int8_conv2d")
    assert f"  ran       {kernel} on float32 [2, 3, 5, 6], called directly" in conv
    assert "  ran       nothing: x does not reach this layer" in paragraph(text, "unused: Int8Linear(")
    assert text.splitlines()[-1] == "torch runs 1 more: head (Linear)"


def test_arguments_of_every_kind(model: Model) -> None:
    x = torch.randn(2, 3, 5, 6)
    expected = tautorch.explain(model, x)
    assert tautorch.explain(model, (x, 2.0)) == expected
    assert tautorch.explain(model, {"x": x}) == expected


def test_a_layer_that_is_given_its_input_by_keyword() -> None:
    layer, x = Int8Linear.from_float(nn.Linear(16, 8)), torch.randn(3, 16)
    assert " on float32 [3, 16], called " in tautorch.explain(layer, x)
    assert tautorch.explain(layer, {"input": x}) == tautorch.explain(layer, x)


def test_the_forced_kernel_is_the_one_that_ran(model: Model) -> None:
    with dispatch.force("int8_linear", "scalar"):
        lines = paragraph(tautorch.explain(model, torch.randn(1, 3, 4, 4)), "out: Int8Linear(")
    assert lines[1] == "  kernel    scalar (forced)"
    assert lines[2].startswith("  ran       scalar on ")
    assert any(line.endswith("it can run, but scalar is forced") for line in lines)
    with dispatch.force("int8_linear", "reference"):
        lines = paragraph(tautorch.explain(model, torch.randn(1, 3, 4, 4)), "out: Int8Linear(")
    assert lines[2].startswith("  ran       reference on ") and lines[2].endswith(
        "through the torch operator"
    )


def test_a_kernel_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dispatch.Kernel("int8_linear", "absent", "cpu", lambda problem: "nobody built it")
    monkeypatch.setattr(dispatch, "_table", [absent, *dispatch._table])
    layer = Int8Linear.from_float(nn.Linear(4, 4))
    assert "  not       absent: nobody built it" in tautorch.explain(layer).splitlines()
    with dispatch.force("int8_linear", "absent"):
        lines = tautorch.explain(layer).splitlines()
    assert lines[1] == "  kernel    none: int8_linear: kernel 'absent' is forced, but nobody built it"


def test_how_a_call_goes(model: Model) -> None:
    x = torch.randn(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        text = tautorch.explain(model.conv, x)
    assert "called through the torch operator" in text


CONV = nn.Conv2d(16, 16, 3)
NOTES: list[tuple[PackedModule, str]] = [
    (
        SparseConv2d.from_float(CONV, pattern="2:4", mask=torch.arange(2304).reshape(16, 16, 3, 3) % 2 == 0),
        "2:4 runs the dense kernel: this one has no 2:4 form, or none that pays at this shape",
    ),
    (SparseConv2d.from_float(CONV, pattern="16x16"), "16x16 blocks run as 4x1 ones"),
    (Int8Conv2d.from_float(CONV, quant="weight_only"), "weight-only: fp32 multiply-adds"),
    (LowRankConv2d.from_float(CONV, rank=15), "rank 15 takes 1.04 times the dense weight's multiply-adds"),
    (LowRankConv2d.from_float(CONV, rank=4), "float32 values: fp32 multiply-adds"),
]


@pytest.mark.parametrize(("layer", "note"), NOTES, ids=lambda v: v if isinstance(v, str) else "")
def test_notes(layer: PackedModule, note: str) -> None:
    assert f"  note      {note}" in tautorch.explain(layer)


@pytest.mark.parametrize(
    "layer, note",
    [
        (SparseConv2d.from_float(nn.Conv2d(3, 8, 3), pattern="4x1"), "not yet fast with 3 input channels"),
        (LowRankConv2d.from_float(nn.Conv2d(8, 8, 3), rank=2), "not yet faster than two float"),
    ],
)
def test_what_is_not_yet_fast_is_said(layer: nn.Module, note: str) -> None:
    assert note in tautorch.explain(layer)


def test_a_weight_in_lists_alone_is_not_fast_with_few_rows() -> None:
    layer = SparseLinear.from_float(nn.Linear(8, 8), pattern="4x1")
    with dispatch.force("sparse_linear", "scalar"):
        assert "not yet fast below 16 rows" in tautorch.explain(layer)
    with dispatch.force("sparse_linear", "reference"):
        assert "not yet fast" not in tautorch.explain(layer)


def test_what_runs_2_4() -> None:
    layer = SparseLinear.from_float(
        nn.Linear(64, 64), pattern="2:4", mask=torch.arange(4096).reshape(64, 64) % 2 == 0
    )
    own = layer.kernel() in dispatch.AVX512
    assert ("2:4 runs by a kernel of its own" if own else "2:4 runs the dense kernel") in tautorch.explain(
        layer
    )
    with dispatch.force("sparse_linear", "scalar"):
        assert "2:4 runs the dense kernel" in tautorch.explain(layer)


def test_blocks_run_whole_or_as_4x1() -> None:
    layer = SparseLinear.from_float(nn.Linear(64, 64), pattern="16x16")
    whole = layer.kernel() in dispatch.AVX512
    assert ("as 4x1 ones" in tautorch.explain(layer)) == (not whole)
    with dispatch.force("sparse_linear", "scalar"):
        assert "16x16 blocks run as 4x1 ones" in tautorch.explain(layer)


def test_no_note_without_cause() -> None:
    for layer in (
        Int8Conv2d.from_float(CONV),
        Int8Conv2d.from_float(nn.Conv2d(3, 8, 3)),
        Int8Conv2d.from_float(nn.Conv2d(8, 8, 3, groups=8)),
        LowRankConv2d.from_float(CONV, rank=2, weight_dtype=torch.int8),
    ):
        assert "note" not in tautorch.explain(layer)


def test_amx_is_for_dense_layers() -> None:
    layer = SparseConv2d.from_float(CONV, pattern="4x1")
    assert ("AMX multiplies dense int8 layers alone" in tautorch.explain(layer)) == (layer.kernel() == "amx")
    assert ("note" in tautorch.explain(layer)) == (layer.kernel() == "amx")
    if layer.kernel() == "amx":
        with dispatch.force("sparse_conv2d", "avx512vnni"):
            assert "note" not in tautorch.explain(layer)


def test_nothing_to_explain() -> None:
    assert tautorch.explain(nn.ReLU()) == "ReLU has no tautorch layers; see tautorch.convert"


def test_the_model_is_left_alone(model: Model) -> None:
    model.train()
    model.drop.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call in (tautorch.explain, tautorch.warmup):
        call(model, torch.randn(4, 3, 5, 6))
        assert model.training and model.norm.training and not model.drop.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not model.conv._forward_hooks and not model.conv._forward_pre_hooks


def test_hooks_are_gone_after_an_error(model: Model) -> None:
    with pytest.raises(ValueError, match="int8_conv2d: x must have 3 channels"):
        tautorch.explain(model, torch.randn(1, 4, 5, 5))
    assert not model.conv._forward_hooks and not model.conv._forward_pre_hooks


def test_warmup_packs_and_plans_all(model: Model) -> None:
    layers = [m for m in model.modules() if isinstance(m, PackedModule)]
    assert len(layers) == 3 and not any(layer.ready() for layer in layers)
    assert tautorch.warmup(model, torch.randn(1, 3, 4, 4)) is model
    assert all(layer.ready() for layer in layers)
    packs = [layer._buffers["packed"] for layer in layers]
    model.eval()(torch.randn(1, 3, 4, 4))
    assert all(layer._buffers["packed"] is pack for layer, pack in zip(layers, packs, strict=True))


@pytest.mark.parametrize("call", [tautorch.explain, tautorch.warmup])
def test_bad_arguments(call: Any, model: Model) -> None:
    name = call.__name__
    with pytest.raises(TypeError, match=f"{name}: module|{name}: model"):
        call(torch.relu, torch.zeros(1))
    with pytest.raises(TypeError, match=f"{name}: "):
        call(model, [torch.zeros(1, 3, 4, 4)])

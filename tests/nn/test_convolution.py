"""What the three convolution layers share beyond the contract: padding, int8 input, factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tautorch.factorize.layers import FactorizedConv2d
from tautorch.nn import Int8Conv2d, LowRankConv2d, SparseConv2d
from tautorch.nn.factors import svd_factors
from tautorch.ops import int8_conv2d
from tautorch.reference.layouts import PATTERNS, encode
from tautorch.testing.values import sparse_mask

LAYERS: list[tuple[Any, dict[str, Any]]] = [
    (Int8Conv2d, {}),
    (SparseConv2d, {"pattern": "4x1"}),
    (LowRankConv2d, {"rank": 3}),
]
each_layer = pytest.mark.parametrize(("kind", "settings"), LAYERS, ids=lambda v: getattr(v, "op", ""))


def close(y: Tensor, expected: Tensor, most: float) -> None:
    y, expected = y.detach(), expected.detach()
    assert y.shape == expected.shape
    assert float((y - expected).norm()) <= most * float(expected.norm())


@each_layer
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (5, 3), "padding": "same", "dilation": (2, 3)},
        {"kernel_size": (2, 3), "padding": "same", "dilation": (2, 1)},
        {"kernel_size": (2, 4), "padding": "valid", "stride": 2},
        {"kernel_size": [3, 1], "padding": [1, 0], "stride": (2, 1)},
    ],
    ids=str,
)
def test_padding_is_torchs(kind: Any, settings: dict[str, Any], geometry: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(6, 8, **geometry)
    module, x = kind.from_float(layer, **settings), torch.randn(2, 6, 11, 12)
    assert module.padding == layer.padding
    plain = module.to_float()
    close(module(x), plain(x), 0.02)
    assert plain(x).shape == layer(x).shape
    twin = kind(**module.get_config())
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


@each_layer
def test_padding_that_cannot_be(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=rf'{kind.op}: padding="same" must be symmetric, got kernel \(2, 3\)'
    ):
        kind.from_float(nn.Conv2d(4, 4, (2, 3), padding="same"), **settings)
    with pytest.raises(ValueError, match=rf'{kind.op}: padding="same" needs stride 1, got \(2, 2\)'):
        kind(4, 4, 3, stride=2, padding="same")
    with pytest.raises(ValueError, match=f'{kind.op}: padding must be "same", "valid" or numbers'):
        kind(4, 4, 3, padding="full")
    with pytest.raises(ValueError, match=f"{kind.op}: padding must be at least 0"):
        kind(4, 4, 3, padding=-1)
    with pytest.raises(ValueError, match=f"{kind.op}: groups must divide the 4 input channels, got 3"):
        kind(4, 6, 3, groups=3)
    with pytest.raises(ValueError, match=f"{kind.op}: groups must divide the 5 output channels, got 2"):
        kind(4, 5, 3, groups=2)


@each_layer
def test_memory_format_is_the_inputs(kind: Any, settings: dict[str, Any]) -> None:
    module, x = kind.from_float(nn.Conv2d(6, 8, 3), **settings), torch.randn(2, 6, 9, 7)
    last = x.contiguous(memory_format=torch.channels_last)
    for module_x, expected in ((x, torch.contiguous_format), (last, torch.channels_last)):
        with torch.no_grad():
            assert module(module_x).is_contiguous(memory_format=expected)
        y = module(module_x.requires_grad_())
        assert y.is_contiguous(memory_format=expected) and y.requires_grad


@each_layer
def test_other_layers_are_refused(kind: Any, settings: dict[str, Any]) -> None:
    for layer in (nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)):
        with pytest.raises(TypeError, match=f"{kind.op}: from_float takes nn.Conv2d, got"):
            kind.from_float(layer, **settings)


@pytest.mark.parametrize("kind", [Int8Conv2d, SparseConv2d, LowRankConv2d], ids=lambda k: k.op)
def test_static_layers_take_int8(kind: Any) -> None:
    extra = {"rank": 3, "weight_dtype": torch.int8} if kind is LowRankConv2d else {}
    layer = nn.Conv2d(6, 8, 3, padding=1)
    module = kind.from_float(layer, quant="static", x_scale=0.05, x_zero_point=-4, **extra)
    q = torch.randint(-128, 128, (2, 6, 5, 5), dtype=torch.int8)
    y = module(q)
    assert y.dtype == torch.float32
    assert torch.equal(y, module((q.float() + 4) * 0.05))
    dynamic = kind.from_float(layer, **extra)
    with pytest.raises(ValueError, match=f"{kind.op}: x_scale must be given for int8 x"):
        dynamic(q)


def test_layers_of_int8_chain() -> None:
    """A requantised output feeds the next layer as it is."""
    first = Int8Conv2d.from_float(nn.Conv2d(3, 8, 3), activation="relu")
    second = Int8Conv2d.from_float(nn.Conv2d(8, 4, 3), quant="static", x_scale=0.02, x_zero_point=-128)
    x, point = torch.randn(2, 3, 9, 9), torch.tensor([-128], dtype=torch.int32)
    q = int8_conv2d(
        x, first.weight, first.weight_scale, first.bias, activation="relu", out_scale=torch.tensor([0.02]),
        out_zero_point=point,
    )  # fmt: skip
    assert q.dtype == torch.int8
    assert torch.equal(second(q), second((q.float() + 128) * 0.02))


# ---- low rank -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_full_rank_is_the_layer(groups: int) -> None:
    torch.manual_seed(2)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    module, x = LowRankConv2d.from_float(layer, rank=6 // groups), torch.randn(2, 4, 7, 7)
    close(module(x), layer(x), 1e-5)
    close(module.dense_weight(), layer.weight.detach(), 1e-5)
    int8 = LowRankConv2d.from_float(layer, rank=6 // groups, weight_dtype=torch.int8)
    close(int8(x), layer(x), 0.03)


def test_rank_is_the_best_of_its_kind() -> None:
    matrix = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(3))
    down, up = svd_factors("op", matrix, 5)
    error = (up @ down - matrix).double().square().sum((1, 2))
    expected = torch.linalg.svdvals(matrix.double())[:, 5:].square().sum(1)
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(down.norm(dim=2), up.norm(dim=1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_pairs_become_one_layer(groups: int, bias: bool) -> None:
    down = nn.Conv2d(4, 3 * groups, 3, stride=2, padding=1, groups=groups, bias=bias)
    up = nn.Conv2d(3 * groups, 10, 1, groups=groups)
    pair, x = FactorizedConv2d(down, up), torch.randn(2, 4, 9, 9)
    for module in (LowRankConv2d.from_factors(down, up), LowRankConv2d.from_float(pair)):
        assert module.rank == 3
        close(module(x), pair(x), 1e-5)
        first, second = module.to_factors()
        close(second(first(x)), pair(x), 1e-5)
        assert first.bias is None
    with pytest.raises(ValueError, match="lowrank_conv2d: rank must be None or 3, the pair's, got 2"):
        LowRankConv2d.from_float(pair, rank=2)


def test_layers_that_are_no_pair() -> None:
    down = nn.Conv2d(4, 6, 3, groups=2)
    for up, message in (
        (nn.Conv2d(5, 8, 1), "in_channels=6"),
        (nn.Conv2d(6, 8, 3, groups=2), r"kernel_size=\(1, 1\)"),
        (nn.Conv2d(6, 8, 1, stride=2, groups=2), r"stride=\(1, 1\)"),
        (nn.Conv2d(6, 8, 1), "groups=2"),
        (nn.Conv2d(6, 8, 1, padding=1, groups=2), "no padding"),
    ):
        with pytest.raises(ValueError, match=f"lowrank_conv2d: up must have {message}"):
            LowRankConv2d.from_factors(down, up)


def test_ranks_and_dtypes_are_checked() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"rank must be in 1\.\.3 for a weight of 3 x 18, got {rank}"):
            LowRankConv2d.from_float(layer, rank=rank)
    with pytest.raises(TypeError, match="lowrank_conv2d: rank must be given"):
        LowRankConv2d.from_float(layer)
    for kind in (LowRankConv2d, SparseConv2d):
        with pytest.raises(ValueError, match=f"{kind.op}: weight_dtype must be torch.int8 or torch.float32"):
            kind(4, 6, 3, weight_dtype=torch.float16)
        with pytest.raises(ValueError, match=f'{kind.op}: quant must be "dynamic" for float32'):
            kind(4, 6, 3, weight_dtype=torch.float32, quant="static")


# ---- sparse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_masks_decide_what_is_kept(pattern: str, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    layer = nn.Conv2d(12, 38, 3, padding=1, groups=groups)
    mask = sparse_mask(tuple(layer.weight.shape), pattern, 0.4, groups=groups, seed=5)
    module = SparseConv2d.from_float(layer, pattern=pattern, mask=mask, weight_dtype=dtype)
    x = torch.randn(2, 12, 6, 6)
    expected = layer.weight.detach() * mask
    for _ in range(2):
        close(module.dense_weight(), expected, 0.01 if dtype == torch.int8 else 0.0)
        close(module(x), module.to_float()(x), 0.02)
    if dtype == torch.float32:
        values, crow, col = encode(expected, mask if pattern != "2:4" else None, pattern, groups)
        assert torch.equal(module.values, values) and torch.equal(module.col_indices, col)
        assert crow is None or torch.equal(module.crow_indices, crow)


def test_a_mask_off_its_pattern_names_the_block() -> None:
    layer = nn.Conv2d(8, 8, 3)
    mask = torch.ones(8, 8, 3, 3, dtype=torch.bool)
    mask[5, 0, 1, 1] = False
    with pytest.raises(ValueError, match=r"sparse_conv2d: mask .* block \(1, 4\)"):
        SparseConv2d.from_float(layer, mask=mask)


def test_indices_that_a_dense_pack_forgets_are_kept() -> None:
    """A layout of 2:4 that stores zeros at places of its own comes back as it was."""
    module = SparseConv2d(8, 4, 1, pattern="2:4")
    state = module.state_dict()
    state["col_indices"] = torch.full((4, 1), 0b1110_1101, dtype=torch.uint8)  # 1, 3 and 2, 3
    state["values"] = torch.tensor([[5, 0, 0, 7]] * 4, dtype=torch.int8)
    module.load_state_dict(state)
    x = torch.randn(2, 8, 3, 3)
    y = module(x)
    again = module.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert torch.equal(module(x), y)
    assert torch.equal(module.values, state["values"])
    assert torch.equal(module.col_indices, state["col_indices"])


def test_more_inputs_than_a_pack_can_name() -> None:
    torch.manual_seed(6)
    layer = nn.Conv2d(7300, 3, 3, bias=False)
    module = SparseConv2d.from_float(layer, pattern="unstructured", weight_dtype=torch.float32)
    close(module(torch.ones(1, 7300, 3, 3)), layer(torch.ones(1, 7300, 3, 3)), 1e-3)


def test_layouts_have_room() -> None:
    with pytest.raises(ValueError, match=r"sparse_conv2d: nnz must be in 0\.\.72 blocks, got 73"):
        SparseConv2d(4, 8, 3, pattern="4x1", nnz=73)
    with pytest.raises(ValueError, match="sparse_conv2d: pattern must be one of"):
        SparseConv2d(4, 8, 3, pattern="3:4")

"""``sparse_linear``'s reference is the dense product with what the layout stores."""

from __future__ import annotations

import math

import pytest
import torch

from tautorch.reference.int8_linear import int8_linear
from tautorch.reference.layouts import PATTERNS, decode, encode
from tautorch.reference.sparse_linear import sparse_linear, stored_entries
from tautorch.testing.cases import linear_case
from tautorch.testing.values import sparse_mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", ["dynamic", "static", "int8", "weight_only"])
def test_int8_values_are_the_dense_operator(pattern: str, mode: str) -> None:
    case = linear_case("sparse_linear", 5, 37, 70, mode=mode, pattern=pattern)
    x, values, crow, col, scale, bias = case.args
    dense = decode(values, crow, col, pattern, (37, 70))
    assert 0 < int((dense != 0).sum()) < dense.numel()
    kwargs = {k: v for k, v in case.kwargs.items() if k not in ("pattern", "out_features")}
    assert torch.equal(case(sparse_linear), int8_linear(x, dense, scale, bias, **kwargs))
    if mode != "weight_only":
        kwargs["out_dtype"] = torch.int32
        assert torch.equal(case.raw()(sparse_linear), int8_linear(x, dense, scale, bias, **kwargs))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_float_values(pattern: str) -> None:
    case = linear_case("sparse_linear", 5, 37, 70, mode="float", pattern=pattern)
    x, values, crow, col, _, bias = case.args
    dense = decode(values, crow, col, pattern, (37, 70))
    expected = x.double() @ dense.double().T + bias
    torch.testing.assert_close(case(sparse_linear).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_dropped_input_takes_no_part(pattern: str) -> None:
    mask = sparse_mask((37, 70), pattern, 0.3, seed=3)
    mask[:, : 64 if pattern == "64x64" else 32] = False
    values, crow, col = encode(torch.randn(37, 70), mask, pattern)
    x = torch.randn(3, 70)
    plain = sparse_linear(x, values, crow, col, None, pattern=pattern, out_features=37)
    x[1, 0 if pattern != "2:4" else 3] = math.inf  # a 2:4 filler sits in the lowest places
    y = sparse_linear(x, values, crow, col, None, pattern=pattern, out_features=37)
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize(("pattern", "groups"), [(p, g) for p in PATTERNS for g in (1, 3)])
def test_stored_entries_are_the_matrix(pattern: str, groups: int) -> None:
    shape = (54, 45)
    weight = torch.randn(shape)
    mask = sparse_mask(shape, pattern, 0.4, groups=groups, seed=1)
    values, rows, cols = stored_entries(*encode(weight, mask, pattern, groups), pattern, shape, groups)
    rebuilt = torch.zeros(shape)
    rebuilt[rows, cols] = values
    assert torch.equal(rebuilt, weight * mask)
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) == len(values)


def test_values_and_scale_must_fit() -> None:
    case = linear_case("sparse_linear", 2, 4, 8)
    x, values, crow, col, scale, _ = case.args
    with pytest.raises(ValueError, match="sparse_linear: weight_scale must be given for int8 values"):
        sparse_linear(x, values, crow, col, None, pattern="4x1", out_features=4)
    with pytest.raises(ValueError, match="sparse_linear: weight_scale must be given for int8 values"):
        sparse_linear(x, values.float(), crow, col, scale, pattern="4x1", out_features=4)
    with pytest.raises(ValueError, match="sparse_linear: crow_indices must have shape"):
        sparse_linear(x, values, crow, col, scale, pattern="4x1", out_features=9)

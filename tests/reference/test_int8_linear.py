"""``int8_linear``'s reference against integers by hand and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tautorch.reference.int8_linear import int8_linear
from tautorch.reference.quantizer import MAX_K, quantize_rows, quantize_weight
from tautorch.testing.cases import linear_case
from tautorch.testing.tolerances import assert_close
from tautorch.testing.values import INT8_PATTERNS, int8_values


@pytest.mark.parametrize("x_pattern", INT8_PATTERNS)
@pytest.mark.parametrize("w_pattern", INT8_PATTERNS)
def test_accumulators_are_the_integers(x_pattern: str, w_pattern: str) -> None:
    x, weight = int8_values((3, 1500), x_pattern, seed=1), int8_values((5, 1500), w_pattern, seed=2, low=-127)
    point = torch.tensor([-128], dtype=torch.int32)
    acc = int8_linear(
        x, weight, torch.ones(5), x_scale=torch.ones(1), x_zero_point=point, out_dtype=torch.int32
    )
    expected = (x.numpy().astype(np.int64) + 128) @ weight.numpy().astype(np.int64).T
    assert acc.dtype == torch.int32
    assert acc.tolist() == expected.tolist()


def test_longest_inner_product_is_exact() -> None:
    x = torch.full((1, MAX_K), 127, dtype=torch.int8)
    weight = torch.full((1, MAX_K), -127, dtype=torch.int8)
    kwargs = {"x_scale": torch.ones(1), "x_zero_point": torch.tensor([-128], dtype=torch.int32)}
    acc = int8_linear(x, weight, torch.ones(1), out_dtype=torch.int32, **kwargs)
    assert acc.item() == -255 * 127 * MAX_K
    longer = torch.zeros(1, MAX_K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"inner dimension must be at most {MAX_K}"):
        int8_linear(longer, longer, torch.ones(1), **kwargs)


def test_dynamic_is_the_quantised_float_layer() -> None:
    x, w, bias = torch.randn(4, 7, 65), torch.randn(11, 65), torch.randn(11)
    q, scale = quantize_weight(w)
    y = int8_linear(x, q, scale, bias)
    rows, row_scale = quantize_rows(x)
    truth = (rows.double() * row_scale.double()[..., None]) @ (q.double() * scale.double()[:, None]).T + bias
    torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-5)
    error = (y - torch.nn.functional.linear(x, w, bias)).norm() / y.norm()
    assert error < 0.02


def test_activations_and_dtypes() -> None:
    functional = torch.nn.functional
    truth = {
        "none": lambda v: v,
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
        "silu": functional.silu,
    }
    case = linear_case("int8_linear", 9, 13, 40)
    plain = case(int8_linear).double()
    for name, fn in truth.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = case.but(activation=name, out_dtype=dtype)(int8_linear)
            assert_close(y, fn(plain).to(dtype), magnitude=plain, kind="activation")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_dtype_follows_x(dtype: torch.dtype) -> None:
    case = linear_case("int8_linear", 3, 4, 5, x_dtype=dtype)
    assert case(int8_linear).dtype == dtype
    assert linear_case("int8_linear", 3, 4, 5, mode="int8")(int8_linear).dtype == torch.float32


def test_int8_out_chains_into_int8_in() -> None:
    case = linear_case("int8_linear", 6, 10, 20)
    scale, point = torch.tensor([0.11]), torch.tensor([9], dtype=torch.int32)
    y, q = case(int8_linear), case.but(out_scale=scale, out_zero_point=point)(int8_linear)
    assert q.dtype == torch.int8
    inside = (q > -128) & (q < 127)
    assert bool(inside.any())
    back = (q.float() - 9) * 0.11
    assert bool(((back - y).abs()[inside] <= 0.0551).all())


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_spoiled_row_is_nan_and_alone(mode: str) -> None:
    for pattern in ("nan_row", "inf_row"):
        y = linear_case("int8_linear", 4, 6, 33, mode=mode, x=pattern, activation="relu")(int8_linear)
        assert bool(torch.isnan(y[0]).all())
        assert bool(torch.isfinite(y[1:]).all())


def test_weight_only_follows_ieee() -> None:
    case = linear_case("int8_linear", 2, 3, 4, mode="weight_only", bias=False)
    weight = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 1, 0]], dtype=torch.int8)
    x = torch.tensor([[math.inf, 1, 1, 1], [1e-40, 2, 3, 4]])
    y = int8_linear(x, weight, torch.tensor([1.0, 2.0, 0.5]), weight_only=True)
    assert y[0, 0] == math.inf
    assert torch.isnan(y[0, 1])  # Inf * 0
    assert y[1].tolist() == [torch.tensor(1e-40).item(), 4.0, 1.5]
    assert torch.isfinite(case(int8_linear)).all()


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (2, 3, 4, 7)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    weight = int8_values((5, 7), low=-127)
    x = torch.randn(shape)
    y = int8_linear(x, weight, torch.ones(5))
    assert y.shape == (*shape[:-1], 5)
    flat = int8_linear(x.reshape(-1, 7), weight, torch.ones(5)) if x.numel() else torch.zeros(0, 5)
    assert torch.equal(y.reshape(-1, 5), flat)


BAD = [
    ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \[..., 3\]"),
    ({"x": torch.zeros(2, 3, dtype=torch.int8)}, ValueError, "x_scale must be given for int8 x"),
    (
        {"x": torch.zeros(2, 3, dtype=torch.float64)},
        TypeError,
        "x must be float32, bfloat16, float16 or int8",
    ),
    ({"x_scale": torch.ones(2)}, ValueError, "x_scale must have 1 element for float x, got 2"),
    ({"x_zero_point": torch.ones(1)}, ValueError, "x_scale must be given with x_zero_point"),
    ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, .*, got 'tanh'"),
    ({"out_dtype": torch.int8}, ValueError, "out_scale must be given for out_dtype torch.int8"),
    ({"out_scale": torch.ones(1), "out_dtype": torch.float32}, ValueError, "out_dtype must be torch.int8"),
    ({"out_zero_point": torch.ones(1)}, ValueError, "out_scale must be given with out_zero_point"),
    ({"weight_only": True, "out_dtype": torch.int32}, ValueError, "out_dtype must be floating or int8"),
    ({"weight_only": True, "x": torch.zeros(2, 3, dtype=torch.int8)}, TypeError, "for weight_only, got"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3), **changes}
    with pytest.raises(error, match="int8_linear: .*" + message):
        int8_linear(weight=torch.zeros(4, 3, dtype=torch.int8), weight_scale=torch.ones(4), **arguments)

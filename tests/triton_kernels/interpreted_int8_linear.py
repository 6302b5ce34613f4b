"""int8_linear's Triton kernels in Triton's interpreter, against plain torch on the CPU.

Run by test_int8_linear.py in a process of its own with TRITON_INTERPRET=1: Triton reads the variable when it
is imported, and the compile tests need it unset. The name keeps pytest from collecting this file by itself.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.triton_kernels import interpreting
from torch import Tensor

from tautorch.triton_kernels import int8_linear as tk
from tautorch.triton_kernels._device import ACTIVATIONS
from tautorch.triton_kernels._int8_linear_tiles import Config
from tautorch.triton_kernels._quantize_rows import FLOAT_DTYPES, quantize_rows

interpreting.let_scalars_be_indices()
# exp and huge inputs overflow on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
SMALL = Config(16, 32, 32, 4, 2, group_m=2)
T_M, T_N, T_K = SMALL.block_m, SMALL.block_n, SMALL.block_k
SIZES = [
    (1, 1, 1),
    (T_M - 1, T_N + 1, T_K - 1),
    (T_M, T_N, T_K),
    (T_M + 1, T_N - 1, T_K + 1),
    (37, 53, 97),
    (2, 131, 7),
    (65, 2, 257),
]


def quantise(x: Tensor, x_scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """The quantiser's contract, row by row, in plain torch."""
    x = x.float()
    bad = ~torch.isfinite(x).all(dim=1)
    x = torch.where(bad[:, None], torch.zeros_like(x), x)
    if x_scale is not None:
        zp = torch.zeros(1, dtype=torch.int32) if zero_point is None else zero_point
        inv = torch.ones(1) / x_scale
        q = (torch.round(x * inv).clamp(-1024, 1024) + zp).clamp(-128, 127)
        scale = x_scale.expand(x.shape[0]).clone()
    else:
        amax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
        zero = amax < 2.0**-100
        safe = torch.where(zero, torch.ones_like(amax), amax)
        scale = torch.where(zero, torch.ones_like(amax), safe / 127)
        inv = torch.where(zero, torch.zeros_like(amax), 127 / safe)
        q = torch.round(x * inv[:, None]).clamp(-127, 127)
    scale[bad] = float("nan")
    return q.to(torch.int8), scale


def activate(y: Tensor, activation: str) -> Tensor:
    match activation:
        case "relu":
            return torch.relu(y)
        case "gelu":
            return torch.nn.functional.gelu(y)
        case "gelu_tanh":
            return torch.nn.functional.gelu(y, approximate="tanh")
        case "silu":
            return torch.nn.functional.silu(y)
    return y


def make(m: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """int8 x with -128 and 127, int8 weight, scales and bias, fresh from the seed."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    x.view(-1)[0], x.view(-1)[-1] = -128, 127
    w.view(-1)[0], w.view(-1)[-1] = 127, -127
    return (
        x,
        w,
        torch.rand(m, generator=g) * 0.1,
        torch.rand(n, generator=g) * 0.01,
        torch.randn(n, generator=g),
    )


def sums(x: Tensor, w: Tensor, zero_point: int = 0) -> Tensor:
    return ((x.to(torch.int64) - zero_point) @ w.to(torch.int64).t()).to(torch.int32)


@pytest.mark.parametrize("m,n,k", SIZES)
@pytest.mark.parametrize("zero_point", [None, -128, 5, 127])
def test_raw_accumulators_are_exact(m: int, n: int, k: int, zero_point: int | None) -> None:
    x, w, xs, ws, _ = make(m, n, k)
    zp = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    got = tk.matmul(x, xs, w, ws, x_zero_point=zp, out_dtype=torch.int32, config=SMALL)
    assert torch.equal(got, sums(x, w, zero_point or 0))


@pytest.mark.parametrize("x_value,w_value", list(itertools.product((-128, 127), (-127, 127))))
def test_extreme_sums_are_exact(x_value: int, w_value: int) -> None:
    x = torch.full((3, 700), x_value, dtype=torch.int8)
    w = torch.full((5, 700), w_value, dtype=torch.int8)
    got = tk.matmul(x, torch.ones(3), w, torch.ones(5), out_dtype=torch.int32)
    assert torch.equal(got, torch.full((3, 5), 700 * x_value * w_value, dtype=torch.int32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [True, False])
def test_float_epilogue(activation: str, out_dtype: torch.dtype, per_row: bool) -> None:
    x, w, xs, ws, bias = make(19, 35, 67)
    xs = xs if per_row else xs[:1]
    bias = bias.to(out_dtype)
    got = tk.matmul(x, xs, w, ws, bias, activation=activation, out_dtype=out_dtype, config=SMALL)
    y = (sums(x, w).float() * xs[:, None]) * ws + bias.float()
    want = activate(y, activation)
    eps = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[out_dtype]
    torch.testing.assert_close(got.float(), want, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("zero_point", [None, -3, 100])
def test_requantised_output(zero_point: int | None) -> None:
    x, w, xs, ws, bias = make(19, 35, 67)
    scale = torch.tensor([0.37])
    zp = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    xs[3] = float("nan")
    got = tk.matmul(
        x, xs, w, ws, bias, out_scale=scale, out_zero_point=zp, out_dtype=torch.int8, config=SMALL
    )
    y = (sums(x, w).float() * xs[:, None]) * ws + bias
    v = torch.round(y * (torch.ones(1) / scale)) + (zero_point or 0)
    want = torch.where(torch.isnan(v), torch.full_like(v, zero_point or 0), v).clamp(-128, 127).to(torch.int8)
    assert torch.equal(got, want)
    assert want.unique().numel() > 20


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("m,k", [(1, 1), (3, 63), (5, 64), (4, 65), (2, 4097)])
def test_dynamic_quantiser(dtype: torch.dtype, m: int, k: int) -> None:
    x = (torch.randn(m, k, generator=torch.Generator().manual_seed(k)) * 3).to(dtype)
    q, scale = quantize_rows(x)
    want_q, want_scale = quantise(x, None, None)
    assert torch.equal(q, want_q)
    assert torch.equal(scale, want_scale)


def test_dynamic_quantiser_special_rows() -> None:
    x = torch.randn(10, 37, generator=torch.Generator().manual_seed(1))
    x[0] = 0.0
    x[1] = 2.0**-101
    x[2] = 0.0
    x[2, 5] = 2.0**-100
    x[3, 36] = float("nan")
    x[4, 0] = float("inf")
    x[5, 1] = -float("inf")
    x[6] = 3.4e38
    x[7] = -7.25
    x[8] = torch.arange(37) - 18.5  # halves, so that ties to even matter
    x[8, 0] = 127.0
    q, scale = quantize_rows(x)
    want_q, want_scale = quantise(x, None, None)
    assert torch.equal(q, want_q)
    assert torch.equal(scale.isnan(), want_scale.isnan())
    assert torch.equal(scale.nan_to_num(), want_scale.nan_to_num())
    assert scale[0] == 1 and scale[1] == 1 and scale[2] != 1 and scale[3:6].isnan().all()
    assert not q[:2].any() and not q[3:6].any()


@pytest.mark.parametrize("zero_point", [None, -128, 17])
def test_static_quantiser(zero_point: int | None) -> None:
    x = torch.randn(6, 41, generator=torch.Generator().manual_seed(2)) * 50
    x[1, 1] = float("nan")
    x[2, 0] = 3e38
    zp = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    q, scale = quantize_rows(x, torch.tensor([0.5]), zp)
    want_q, want_scale = quantise(x, torch.tensor([0.5]), zp)
    assert torch.equal(q, want_q)
    assert torch.equal(scale.nan_to_num(9), want_scale.nan_to_num(9))
    assert (q[1] == (zero_point or 0)).all()


def test_quantiser_reads_any_strides() -> None:
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    for x in (base.t(), base[::2, ::3], base[:, 3:11]):
        assert torch.equal(quantize_rows(x)[0], quantise(x, None, None)[0])


@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("shape", [(33,), (0, 33), (7, 33), (2, 3, 33)])
def test_operator_form(mode: str, shape: tuple[int, ...]) -> None:
    _, w, _, ws, bias = make(4, 9, 33)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    scale, zp = torch.tensor([0.02]), torch.tensor([4], dtype=torch.int32)
    args = {} if mode == "dynamic" else {"x_scale": scale, "x_zero_point": zp}
    q, row_scale = quantise(x.reshape(-1, 33), args.get("x_scale"), args.get("x_zero_point"))
    given = q.reshape(shape) if mode == "int8" else x
    acc = sums(q, w, 4 if args else 0)
    y = tk.int8_linear(given, w, ws, bias, **args)
    want = ((acc.float() * row_scale[:, None]) * ws + bias).reshape(*shape[:-1], 9)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    raw = tk.int8_linear(given, w, ws, bias, **args, out_dtype=torch.int32)
    assert torch.equal(raw, acc.reshape(*shape[:-1], 9))


def test_nan_row_stays_in_its_row() -> None:
    _, w, _, ws, bias = make(4, 9, 33)
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(5))
    x[1, 32] = float("nan")
    y = tk.int8_linear(x, w, ws, bias, activation="relu")
    assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


def test_zero_inputs_give_the_bias() -> None:
    y = tk.int8_linear(
        torch.zeros(3, 0), torch.zeros(4, 0, dtype=torch.int8), torch.ones(4), torch.arange(4.0)
    )
    assert torch.equal(y, torch.arange(4.0).expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cannot multiply bf16
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (15, 33, 31), (17, 63, 129)])
def test_weight_only(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    _, w, _, ws, bias = make(m, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(6)).to(dtype)
    got = tk.int8_linear(x, w, ws, bias, weight_only=True, activation="silu")
    want = activate((x.double() @ w.double().t() * ws + bias).float(), "silu")
    eps = {torch.float32: 1e-5, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(got.float(), want, rtol=2 * eps, atol=2 * eps)


def test_bad_arguments_are_refused() -> None:
    x, w, xs, ws, _ = make(4, 5, 6)
    with pytest.raises(ValueError, match="K=6"):
        tk.matmul(x, xs, w[:, :5].contiguous(), ws)
    with pytest.raises(ValueError, match="adjacent"):
        tk.matmul(x, xs, w.t().contiguous().t(), ws)
    with pytest.raises(ValueError, match="x_scale"):
        tk.int8_linear(x, w, ws)
    with pytest.raises(ValueError, match="66311"):
        tk.matmul(x.new_zeros(1, 66312), xs[:1], w.new_zeros(1, 66312), ws[:1])
    with pytest.raises(ValueError, match="out_scale"):
        tk.matmul(x, xs, w, ws, out_dtype=torch.int8)

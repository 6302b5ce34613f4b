"""Float rows by int8 weights: no element of a row loses precision beside its others."""

from __future__ import annotations

import math

import pytest
import torch

from tautorch import _C, dispatch, ops
from tautorch.testing.tolerances import EPS

KERNELS = [name for name, available in _C.isas().items() if available]
INPUTS = (1, 63, 64, 65, 67, 80, 127, 1003)
OUTPUTS = (1, 63, 64, 65, 100, 128, 200)
BESIDE_FLOATS = pytest.mark.skipif(
    not {"avx2", "avx512vnni"} <= set(KERNELS), reason="compares avx512vnni with avx2, which sums floats"
)


def rows(k: int, m: int) -> dict[str, torch.Tensor]:
    x = torch.randn(m, k)
    outlier, largest = x.clone(), torch.full((m, k), 1 - 2.0**-24)
    outlier[:, 0] = 1e6
    beside_one = {f"2^{e} beside a one": torch.full((m, k), 2.0**e) * x.sign() for e in range(-106, -101)}
    for tiny in beside_one.values():
        tiny[:, 0] = 1
    return {
        "normal": x,
        "half zeros": x.relu(),
        "zeros": torch.zeros(m, k),
        "all bits": largest,
        "all bits, negative": -largest,
        "at the end of balanced digits": torch.full((m, k), 0.99609),
        "some small": x * 2.0 ** torch.randint(-12, 1, (m, k)),
        "mostly small": x * 2.0 ** torch.randint(-40, 20, (m, k)),
        "one outlier": outlier,
        "near the smallest": x * 1e-30,
        "subnormal": x * 1e-40,
        "near the largest": x * 1e30,
        **beside_one,
        "subnormal beside a one": torch.cat([torch.ones(m, 1), x[:, 1:] * 1e-40], 1),
    }


def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.int8_linear(x, weight, torch.ones(len(weight)), weight_only=True, out_dtype=torch.float32)


def forced(kernel: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with dispatch.force("int8_linear", kernel):
        return run(x, weight)


def errors(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of every output, in parts of the sum of its terms' sizes."""
    expected, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    return (y - expected).abs() / terms


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", INPUTS)
def test_rows_of_every_kind(k: int, kernel: str) -> None:
    """Within float's rounding of each sum's own terms, be they many or one."""
    for i, m in enumerate((1, 2, 3, 4, 5)):
        n = OUTPUTS[(i + k) % len(OUTPUTS)]
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        alone = torch.zeros(n, k, dtype=torch.int8)
        alone[torch.arange(n), torch.randint(0, k, (n,))] = 101
        for name, x in rows(k, m).items():
            for w, roundings in ((weight, 4 + k / 8), (alone, 4)):
                with dispatch.force("int8_linear", kernel):
                    y = run(x, w)
                expected, terms = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
                allowed = roundings * EPS[torch.float32] * terms + 2.0**-148
                assert bool(((y - expected).abs() <= allowed).all()), (m, n, name)
    assert dispatch.last_used("int8_linear") == kernel


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(bad: float, kernel: str) -> None:
    """As IEEE says, and the rows beside them are as they were."""
    weight = torch.randint(-127, 128, (70, 256), dtype=torch.int8)
    x = torch.randn(3, 256)
    with dispatch.force("int8_linear", kernel):
        good = run(x, weight)
        x[1, 200] = bad
        y = run(x, weight)
    expected = x @ weight.float().T
    assert torch.equal(y[[0, 2]], good[[0, 2]])
    assert torch.equal(y[1].isnan(), expected[1].isnan())
    assert torch.equal(y[1].isinf(), expected[1].isinf())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(kernel: str) -> None:
    """Up to four rows (two of neon, which sums more as floats): every row the bits that it has alone, though
    its neighbours go another way."""
    weight = torch.randint(-127, 128, (100, 131), dtype=torch.int8)
    x = torch.stack([r[0] for r in rows(131, 1).values()])
    with dispatch.force("int8_linear", kernel):
        single = torch.cat([run(r[None], weight) for r in x])
        assert torch.equal(
            torch.cat([run(part, weight) for part in x.split(2 if kernel == "neon" else 4)]), single
        )


@BESIDE_FLOATS
@pytest.mark.parametrize("k", [128, 1024, 4096])
def test_errors_are_no_larger_than_a_float_sums(k: int) -> None:
    """In the mean over rows of one kind, for weights of which all, a tenth or two inputs weigh."""
    m, n = 3, 128
    normal = torch.randn(m, k)
    outlier = normal.clone()
    outlier[:, 5] = 60.0
    x = {
        "normal": normal,
        "uniform": torch.rand(m, k),
        "constant": torch.full((m, k), 0.3),
        "tails": normal / torch.randn(3, m, k).square().mean(0).sqrt(),
        "wild tails": normal / torch.randn(m, k),
        "outlier": outlier,
        "tiny": normal * 1e-25,
        "huge": normal * 1e27,
        "near the smallest": normal * 1e-36,
    }
    weight = (torch.randn(n, k) * 40).clamp(-127, 127).round().to(torch.int8)
    few = weight * (torch.rand(n, k) < 0.1)
    pairs = torch.zeros_like(weight).scatter_(1, torch.randint(0, k, (n, 2)), 99)
    for name, rows_of_a_kind in x.items():
        for w in (weight, few, pairs):
            ours, plain = (
                errors(forced(kernel, rows_of_a_kind, w), rows_of_a_kind, w).square().nanmean().sqrt()
                for kernel in ("avx512vnni", "avx2")
            )
            assert ours <= 1.02 * plain, (name, float(ours), float(plain))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_lose_nothing(dtype: torch.dtype, kernel: str) -> None:
    """Within the sums' own rounding, also of small elements that meet the only weight."""
    k, n = 515, 128
    spread = torch.randn(6, k) * 2.0 ** torch.randint(-8, 3, (6, k))
    x = torch.cat([torch.randn(6, k), torch.randn(6, k).relu(), spread]).to(dtype)
    alone = torch.zeros(n, k, dtype=torch.int8)
    alone[torch.arange(n), torch.randint(0, k, (n,))] = -77
    y, expected = forced(kernel, x, alone), x.double() @ alone.double().T
    assert bool(((y - expected).abs() <= 4 * EPS[torch.float32] * expected.abs()).all())
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    assert float(errors(forced(kernel, x, weight), x, weight).max()) <= (4 + k / 8) * EPS[torch.float32]


@BESIDE_FLOATS
def test_which_rows_are_multiplied_by_integers() -> None:
    """Float sums have avx2's bits, integer ones their own; each row goes its way, however many there are."""
    k, n = 1024, 128
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    identity = 99 * torch.eye(k, dtype=torch.int8)
    x = torch.randn(40, k)
    wild = torch.arange(40) % 3 == 1
    x[wild] *= 2.0 ** torch.randint(-20, 20, (int(wild.sum()), k))

    def by_floats(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (forced("avx512vnni", x, w) == forced("avx2", x, w)).all(1)

    assert torch.equal(by_floats(x, weight), wild)
    assert bool(by_floats(x, identity).all())
    assert not bool(by_floats(x[~wild].bfloat16(), weight).any())

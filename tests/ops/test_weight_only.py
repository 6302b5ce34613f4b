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


def rows(k: int, m: int) -> dict[str, torch.Tensor]:
    x = torch.randn(m, k)
    outlier, largest = x.clone(), torch.full((m, k), 1 - 2.0**-24)
    outlier[:, 0] = 1e6
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
    }


def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.int8_linear(x, weight, torch.ones(len(weight)), weight_only=True)


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
    """Up to four rows: every row the bits that it has alone, though its neighbours go another way."""
    weight = torch.randint(-127, 128, (100, 131), dtype=torch.int8)
    x = torch.stack([r[0] for r in rows(131, 1).values()])
    with dispatch.force("int8_linear", kernel):
        single = torch.cat([run(r[None], weight) for r in x])
        assert torch.equal(torch.cat([run(part, weight) for part in x.split(4)]), single)

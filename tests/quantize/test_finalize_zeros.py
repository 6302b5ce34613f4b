"""What quantisation rounds to zero is zero without a sign."""

from __future__ import annotations

import torch
from torch import nn

from tautorch.quantize import finalize, gptq, prepare_qat


def test_no_negative_zeros() -> None:
    torch.manual_seed(0)
    rounded = finalize(prepare_qat(nn.Sequential(nn.Linear(40, 30)), bits=4))
    compensated = gptq(nn.Sequential(nn.Linear(40, 30)), [torch.randn(64, 40)], bits=4)
    for model in (rounded, compensated):
        zeros = model[0].weight == 0
        assert int(zeros.sum()) > 20
        assert not bool(model[0].weight[zeros].signbit().any())

"""The pairs that a factorised layer becomes: ordinary layers under names that `convert` recognises."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class FactorizedLinear(nn.Sequential):
    """y = up(down(x)): `down` is nn.Linear(K, r) without bias, `up` nn.Linear(r, N)."""

    down: nn.Linear
    up: nn.Linear

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__(OrderedDict(down=down, up=up))

    @property
    def rank(self) -> int:
        """r, the inner width."""
        return self.down.out_features

    def dense_weight(self) -> Tensor:
        """up.weight @ down.weight, [N, K]."""
        return self.up.weight @ self.down.weight


class FactorizedConv2d(nn.Sequential):
    """y = up(down(x)): `down` is the kh x kw convolution to r channels per group, no bias; `up` is 1x1."""

    down: nn.Conv2d
    up: nn.Conv2d

    def __init__(self, down: nn.Conv2d, up: nn.Conv2d) -> None:
        super().__init__(OrderedDict(down=down, up=up))

    @property
    def rank(self) -> int:
        """r, the inner channels of each group."""
        return self.down.out_channels // self.down.groups

    def dense_weight(self) -> Tensor:
        """The convolution's weight, [O, I / groups, kh, kw]."""
        groups = self.down.groups
        down = self.down.weight.reshape(groups, self.rank, -1)
        up = self.up.weight.reshape(groups, -1, self.rank)
        return torch.bmm(up, down).reshape(self.up.out_channels, *self.down.weight.shape[1:])


class TuckerConv2d(nn.Sequential):
    """y = up(core(down(x))): 1x1 to r_in channels, the kh x kw core to r_out channels, 1x1 to the outputs."""

    down: nn.Conv2d
    core: nn.Conv2d
    up: nn.Conv2d

    def __init__(self, down: nn.Conv2d, core: nn.Conv2d, up: nn.Conv2d) -> None:
        super().__init__(OrderedDict(down=down, core=core, up=up))

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_in, r_out)."""
        return self.core.in_channels, self.core.out_channels

    def dense_weight(self) -> Tensor:
        """The convolution's weight, [O, I, kh, kw]."""
        up, down = self.up.weight.flatten(1), self.down.weight.flatten(1)
        return torch.einsum("ob,bahw,ai->oihw", up, self.core.weight, down)

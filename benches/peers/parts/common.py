"""What the parts share: exactness of our layers, torch's own contestants, data."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from benches.peers.arena import Contestant
from benches.peers.results import Case
from benches.peers.session import Session
from benches.peers.worker import WorkerError
from torch import Tensor, nn

from tautorch.nn import Int8Linear
from tautorch.reference.int8_linear import int8_linear
from tautorch.reference.quantizer import quantize_weight
from tautorch.testing.bench import dynamic_peers
from tautorch.testing.tolerances import assert_close

ROWS = 48
"""Rows at either end of x that are held against the reference; rows are quantised one by one."""


def ends(t: Tensor) -> Tensor:
    """The first and the last rows."""
    return t if len(t) <= 2 * ROWS else torch.cat([t[:ROWS], t[-ROWS:]])


def check_int8(layer: Callable[[Tensor], Tensor], linear: nn.Linear, x: Tensor, **static: Tensor) -> None:
    """The layer's integers are the reference's: only the roundings of the float epilogue may differ."""
    assert linear.bias is not None
    q, scale = quantize_weight(linear.weight.detach())
    rows = ends(x)
    expected = int8_linear(rows, q, scale, linear.bias, **static)  # type: ignore[arg-type]
    magnitude = (expected - linear.bias).abs() + 2 * linear.bias.abs().max()
    assert_close(ends(layer(x)), expected, magnitude=magnitude)


def check_float(layer: Callable[[Tensor], Tensor], linear: nn.Linear, x: Tensor) -> None:
    """Float products agree to the roundings of their sum."""
    assert linear.bias is not None
    rows, weight = ends(x).double(), linear.weight.double()
    expected = rows @ weight.T + linear.bias.double()
    magnitude = rows.abs() @ weight.abs().T + linear.bias.abs().double()
    got, k = ends(layer(x)), linear.in_features
    assert_close(got, expected.float(), magnitude=magnitude, kind="float", k=k)


def a_linear(k: int, n: int, mask: Tensor | None = None, seed: int = 0) -> nn.Linear:
    """A float layer with nn.Linear's own initial weights, zero where the mask is."""
    torch.manual_seed(seed)
    linear = nn.Linear(k, n).eval().requires_grad_(False)
    if mask is not None:
        linear.weight.mul_(mask)
    return linear


def random_x(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1))


def static_range(x: Tensor) -> dict[str, Tensor]:
    """Scale and zero point of x's range, as int8."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = torch.tensor([(high - low) / 255], dtype=torch.float32)
    zero_point = torch.tensor([round(-low / float(scale)) - 128], dtype=torch.int32)
    return {"x_scale": scale, "x_zero_point": zero_point}


class TorchLinears:
    """torch's ways of running a linear layer, made once for all M."""

    def __init__(self, linear: nn.Linear) -> None:
        self.fp32 = linear
        self.bf16 = copy.deepcopy(linear).bfloat16()
        self.dynamic = dynamic_peers(linear)

    def add(self, session: Session, case: Case, x: Tensor, expected: Tensor) -> None:
        """torch.ao dynamic with each engine, bf16 (in and out, no casts) and fp32, among the peers."""
        for name, layer in self.dynamic.items():
            add_local(session, case, name, lambda p=layer: p(x), expected)  # type: ignore[misc]
        half = x.bfloat16()
        add_local(session, case, "torch bf16", lambda: self.bf16(half), expected)
        add_local(session, case, "torch fp32", lambda: self.fp32(x), expected)


def add_local(session: Session, case: Case, name: str, call: Callable[[], Tensor], expected: Tensor) -> None:
    """A peer in this process, or the reason why not."""
    try:
        case.peers.append(session.local(name, call, expected))
    except (WorkerError, RuntimeError) as error:
        case.lost[name] = " ".join(str(error).split())[:200]


def ours(session: Session, name: str, layer: nn.Module, x: Tensor) -> Contestant:
    """A module of tautorch, called as a user calls it."""
    layer(x)
    return session.local(name, lambda: layer(x), kernel=str(layer.kernel()))  # type: ignore[operator]


def dense(session: Session, layer: Int8Linear, x: Tensor) -> Contestant:
    return ours(session, "Int8Linear", layer, x)


class Empty(nn.Module):
    """A module that does nothing but allocate its output."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], self.n)


def empty_call(session: Session, x: Tensor, n: int) -> Contestant:
    """What a call costs before any work."""
    empty = Empty(n)
    return session.local("empty call", lambda: empty(x))

"""What a layer asks before its kernel is called at once, and the call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import register_parametrization
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tautorch import _C, dispatch
from tautorch.nn import Int8Conv2d, Int8Linear
from tautorch.nn.eager import STATE, USUAL, plain

X = torch.randn(3, 16)


class Sub(Tensor):
    pass


def vmapped(question: Callable[[Tensor], bool]) -> bool:
    answers: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        answers.append(question(x))
        return x

    torch.func.vmap(ask)(X)
    return answers[0]


@pytest.mark.parametrize(
    ("x", "context", "want"),
    [
        (X, contextlib.nullcontext, True),
        (X, torch.no_grad, True),
        (X, torch.inference_mode, True),
        (X.clone().requires_grad_(), torch.no_grad, True),
        (X.clone().requires_grad_(), contextlib.nullcontext, False),
        (X.to("meta"), torch.no_grad, False),
        (X.as_subclass(Sub), torch.no_grad, False),
        (nn.Parameter(X), torch.no_grad, False),
        (X, lambda: torch.autocast("cpu"), False),
        (X, TorchDispatchMode, False),
        (X, TorchFunctionMode, False),
        (X, forward_ad.dual_level, False),
    ],
)
def test_plain(x: Tensor, context: Callable[[], AbstractContextManager[Any]], want: bool) -> None:
    with context():
        assert plain(x, {"bias": None}) is want


def test_plain_asks_the_bias_and_transforms() -> None:
    bias = nn.Parameter(torch.zeros(3))
    assert not plain(X, {"bias": bias})
    with torch.no_grad():
        assert plain(X, {"bias": bias})
    assert not vmapped(lambda x: plain(x, {"bias": None}))
    seen: list[bool] = []
    torch.jit.trace(lambda x: (seen.append(plain(x, {"bias": None})), x + 1)[1], X, check_trace=False)
    assert seen == [False]


def ready_layer() -> Int8Linear:
    layer = Int8Linear.from_float(nn.Linear(16, 5)).requires_grad_(False)
    layer(X)
    layer(X)  # sees that nobody holds the weight that the first call packed
    return layer


def ready_conv() -> Int8Conv2d:
    layer = Int8Conv2d.from_float(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))).requires_grad_(
        False
    )
    for _ in range(2):
        layer(torch.zeros(2, 4, 7, 5))
    return layer


def test_call_of_a_layer() -> None:
    layer = ready_layer()
    ask = lambda x: _C.eager_call(STATE, vars(layer), x)  # noqa: E731
    call = ask(X)
    assert call is not None and call is layer._plans[torch.float32]
    assert ask(X.double()) is None  # no plan
    assert torch.equal(_C.run_rows(layer.run, call, X), layer(X))
    with dispatch.force("int8_linear", "scalar"):
        assert ask(X) is None
    assert ask(X) is None
    layer(X)
    assert ask(X) is not None
    layer.bias = nn.Parameter(torch.ones(5), requires_grad=False)
    assert ask(X) is None
    layer(X)
    weight = layer.weight
    layer(X)
    assert ask(X) is None  # whoever holds the weight may edit it
    del weight


def doubled(layer: nn.Module, *_: Any) -> Tensor:
    return 2 * _[-1]


class Doubled(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = vars(owner).get(name)
    setattr(owner, name, value)
    yield
    if old is None:
        delattr(owner, name)
    else:
        setattr(owner, name, old)


@pytest.mark.parametrize("make", [ready_layer, ready_conv])
def test_calling_is_noticed(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = X if isinstance(layer, Int8Linear) else torch.randn(2, 4, 7, 5)
    want, call = layer(x), nn.Module.__call__
    forward = type(layer).forward
    every = nn.modules.module
    with layer.register_forward_hook(doubled):
        assert torch.equal(layer(x), 2 * want)
    with layer.register_forward_pre_hook(lambda _, args: (args[0] * 0,)):
        assert torch.equal(layer(x), layer.forward(x * 0))
    with every.register_module_forward_hook(doubled):
        assert torch.equal(layer(x), 2 * want)
    with every.register_module_forward_pre_hook(lambda _, args: (args[0] * 0,)):
        assert torch.equal(layer(x), layer.forward(x * 0))
    for owner in (layer, type(layer)):
        with patched(owner, "forward", lambda *args: 2 * forward(layer, args[-1])):
            assert torch.equal(layer(x), 2 * want)
    with patched(nn.Module, "__call__", lambda *args: 2 * call(*args)):
        assert torch.equal(layer(x), 2 * want)
    with patched(layer, "_compiled_call_impl", lambda x: 2 * want):
        assert torch.equal(layer(x), 2 * want)
    impl = nn.Module._call_impl
    for owner in (layer, type(layer), nn.Module):
        with patched(owner, "_call_impl", lambda *args: 2 * impl(layer, args[-1])):
            assert torch.equal(layer(x), 2 * want)
    seen: list[int] = []
    with (
        layer.register_full_backward_hook(lambda *_: seen.append(1)),
        every.register_module_full_backward_hook(lambda *_: seen.append(2)),
    ):
        layer(x.clone().requires_grad_()).sum().backward()
    assert sorted(seen) == [1, 2]
    assert torch.equal(layer(input=x), want) and torch.equal(layer(x), want)


def test_a_subclass_keeps_its_forward() -> None:
    layer = ready_layer()
    other = Doubled(16, 5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(X), 2 * layer(X)) and torch.equal(other(X), 2 * layer(X))


class PlusOne(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return bias + 1


def replica(layer: nn.Module) -> nn.Module:
    """What ``nn.DataParallel`` makes: its tensors are plain attributes, all else is shared."""
    other = layer._replicate_for_data_parallel()  # type: ignore[operator]
    other.bias = layer.bias + 1  # type: ignore[operator]
    return other  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [ready_layer, ready_conv])
def test_something_else_stands_for_the_bias(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = X if isinstance(layer, Int8Linear) else torch.randn(2, 4, 7, 5)
    want, other = layer(x), replica(layer)
    for _ in range(2):
        torch.testing.assert_close(other(x), want + 1)
        assert torch.equal(layer(x), want)
    register_parametrization(layer, "bias", PlusOne())
    for _ in range(2):
        torch.testing.assert_close(layer(x), want + 1)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Int8Linear.from_float(nn.Linear(16, 5, bias=False)), X),
        (Int8Conv2d.from_float(nn.Conv2d(4, 5, 1, bias=False)), torch.randn(1, 4, 2, 3)),
    ],
)
def test_a_first_bias_is_seen(layer: Int8Linear | Int8Conv2d, x: Tensor) -> None:
    want = layer(x)
    assert torch.equal(layer(x), want)
    layer.bias = nn.Parameter(torch.ones(5), requires_grad=False)
    torch.testing.assert_close(layer(x), want + 1)


@pytest.mark.parametrize("make", [ready_layer, ready_conv])
def test_x_without_memory_is_refused(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = torch.randn(3, 16) if isinstance(layer, Int8Linear) else torch.randn(2, 4, 7, 5)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x has no memory"):
        layer(x)


def test_lazy_negation() -> None:
    """A view of one column is taken as it lies; its negative bit is not in memory."""
    layer = Int8Linear.from_float(nn.Linear(1, 5)).requires_grad_(False)
    for rows in (4, 1):  # one number is contiguous
        z = torch.randn(rows, 1, dtype=torch.cfloat)
        x = z.conj().imag
        assert x.is_neg() and x.is_contiguous() == (rows == 1)
        assert torch.equal(layer(x), layer(-z.imag.clone()))
    conv = Int8Conv2d.from_float(nn.Conv2d(1, 5, 1)).requires_grad_(False)
    z = torch.randn(1, 1, 1, 1, dtype=torch.cfloat)
    assert torch.equal(conv(z.conj().imag), conv(-z.imag.clone()))


def test_rows() -> None:
    layer = ready_layer()
    call = _C.eager_call(STATE, vars(layer), X)
    assert call is not None
    want = layer(X)
    run = lambda x: _C.run_rows(layer.run, call, x)  # noqa: E731
    assert torch.equal(run(X[0]), want[0])
    assert torch.equal(run(X.reshape(1, 3, 1, 16)), want.reshape(1, 3, 1, 5))
    assert run(X[:0]).shape == (0, 5) and run(X.new_empty(0, 4, 16)).shape == (0, 4, 5)
    for other in (torch.randn(16, 3).t(), X[:, :8], torch.tensor(1.0), torch.randn(3, 17)):
        assert run(other) is None
    assert torch.equal(layer(X.t().contiguous().t()), want)  # the way round


def test_images() -> None:
    layer = Int8Conv2d.from_float(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))).requires_grad_(
        False
    )
    makers = (torch.empty, torch.channels_last)
    x = torch.randn(2, 4, 7, 5)
    want = layer(x)
    assert want.shape == (2, 6, 4, 4)
    layer(x)
    call = _C.eager_call(STATE, vars(layer), x)
    assert call is not None
    run = lambda x: _C.run_images(makers, layer.run, call, x)  # noqa: E731
    assert torch.equal(run(x), want) and run(x).is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(last), want) and run(last).is_contiguous(memory_format=torch.channels_last)
    assert run(x[:0]).shape == (0, 6, 4, 4)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)  # neither format
    for other in (x[0], x[:, :3], x[:, :, :, :1], turned, torch.tensor(1.0)):
        assert run(other) is None
    assert torch.equal(layer(turned), want) and torch.equal(layer(x[0]), want[0])
    with pytest.raises(TypeError, match="run_images: "):
        _C.run_images(makers[:1], layer.run, call, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="run_images: "):
        _C.run_images(makers, layer.run, call[:9], x)


def test_wrong_arguments() -> None:
    layer = ready_layer()
    for state in ((), STATE[:4], [*STATE], (*STATE[:1], None, *STATE[2:]), (*STATE[:3], 1, *STATE[4:])):
        with pytest.raises(TypeError, match="eager_call: "):
            _C.eager_call(state, vars(layer), X)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="_parameters"):
        _C.eager_call(STATE, {}, X)
    with pytest.raises(TypeError, match="eager_call: no dict"):
        _C.where_plain(STATE, None, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="eager_call: no dict"):
        _C.eager_call(STATE, 1, X)  # type: ignore[arg-type]
    for call in ([], (b"", 16, 5, 0, torch.float32), None):
        with pytest.raises(TypeError, match="run_rows: "):
            _C.run_rows(layer.run, call, X)  # type: ignore[arg-type]
    assert _C.where_plain(STATE, {}, X) == 0
    good = (STATE, USUAL, Int8Linear.forward, None, Int8Linear, vars(layer), (X,), {})
    assert _C.direct_call(*good) is not None
    for at, bad in ((6, (X, X)), (6, ()), (7, {"y": 1}), (2, plain), (5, {**vars(layer), "forward": plain})):
        assert _C.direct_call(*good[:at], bad, *good[at + 1 :]) is None
    for at, bad in ((1, USUAL[:3]), (0, ()), (3, (1,)), (4, int)):
        with pytest.raises((TypeError, AttributeError)):
            _C.direct_call(*good[:at], bad, *good[at + 1 :])
    with pytest.raises(TypeError, match="takes 8 arguments"):
        _C.direct_call(*good[:7])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no plan"):
        _C.run_rows(layer.run, (b"", 16, 5, 0, torch.float32, 0), X)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused_rather_than_zero(grad: bool) -> None:
    layer, conv = ready_layer(), ready_conv()
    ones, message = torch.ones_like(X), "forward-mode differentiation .* use reverse mode"
    image = torch.zeros(2, 4, 7, 5)
    with torch.set_grad_enabled(grad):
        for module, x in ((layer, X), (conv, image)):
            with pytest.raises(NotImplementedError, match=f"^{module.op}: {message}"):
                torch.func.jvp(module, (x,), (torch.ones_like(x),))
            with forward_ad.dual_level():
                with pytest.raises(NotImplementedError, match=message):
                    module(forward_ad.make_dual(x, torch.ones_like(x)))
                assert torch.equal(module(x), module(x.clone()))
        # What has no tangent may take part.
        tangent = torch.func.jvp(lambda x: x * layer(X).sum(), (X,), (ones,))[1]
        assert torch.equal(tangent, ones * layer(X).sum())

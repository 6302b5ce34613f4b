"""Layers on CUDA that repeat a launch, with the extension that works on the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tautorch import dispatch
from tautorch.nn import Int8Linear, eager, linear
from tautorch.ops import _gpu_product, tails
from tautorch.ops import _int8_linear_gpu as gpu

from .stand_in import Extension


class Device:
    """What torch tells of the device."""

    stream = 7
    capturing = False


@pytest.fixture
def device(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> Device:
    """CPU tensors pass for CUDA ones."""
    device = Device()
    state = (*eager.STATE[:5], "is_cuda", "is_cpu", lambda: device.capturing)
    monkeypatch.setattr(linear, "STATE", state)
    monkeypatch.setattr(eager, "STATE", state)
    monkeypatch.setattr(_gpu_product, "_raw_stream", lambda index: device.stream)
    return device


class Layer:
    """A layer whose operator is the CUDA one, counted."""

    def __init__(self, k: int, n: int, **options: object) -> None:
        self.layer = Int8Linear.from_float(nn.Linear(k, n), **options).requires_grad_(False)  # type: ignore[arg-type]
        self.rounds = 0
        self.layer._through_op = self.through_op  # type: ignore[method-assign]

    def through_op(self, x: Tensor) -> Tensor:
        self.rounds += 1
        b = self.layer._buffers
        tail = tails.Tail(
            b["x_scale"],
            b["x_zero_point"],
            self.layer.quant == "weight_only",
            "none",
            b["out_scale"],
            b["out_zero_point"],
        )
        assert b["weight"] is not None and b["weight_scale"] is not None
        return gpu.run(x, b["weight"], b["weight_scale"], self.layer.bias, tail)

    def check(self, x: Tensor, rounds: int) -> None:
        """``rounds``: how often the way round was taken so far."""
        y = self.layer(x)
        assert self.rounds == rounds
        self.rounds -= 1
        want = self.through_op(x)
        assert torch.equal(y, want) and y.dtype == want.dtype and y.shape == want.shape and y.is_contiguous()


STATIC = {"quant": "static", "x_scale": 0.03, "x_zero_point": 2}


@pytest.mark.parametrize("options", [{}, STATIC, {**STATIC, "out_scale": 0.1}, {"quant": "weight_only"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_launch_is_repeated(device: Device, options: dict[str, object], dtype: torch.dtype) -> None:
    made = Layer(40, 32, **options)
    for i, shape in enumerate(((5, 40), (1, 40), (2, 3, 40))):
        for _ in range(3):
            made.check(torch.randn(shape).to(dtype), i + 1)
    made.check(torch.randn(5, 1, 40).to(dtype), 3)  # as many rows as before
    made.check(torch.randn(40).to(dtype), 3)
    assert dispatch.last_used("int8_linear") == "tile_b"


def test_int8_rows(device: Device) -> None:
    made = Layer(40, 32, **STATIC)
    for m in (1, 4):
        for _ in range(2):
            made.check(torch.randint(-128, 128, (m, 40), dtype=torch.int8), 1 if m == 1 else 2)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(40, 5).t(),
        torch.randn(0, 40),
        torch.randn(201)[1:].view(5, 40),
        torch.randn(5, 80)[:, ::2],
    ],
)
def test_not_repeated(device: Device, x: Tensor) -> None:
    made = Layer(40, 32)
    made.check(torch.randn(5, 40), 1)
    made.check(x, 2)
    made.check(x, 3)


def test_outputs_off_16_bytes_are_not_repeated(device: Device) -> None:
    made = Layer(40, 31)
    for i in range(3):
        made.check(torch.randn(5, 40), i + 1)


def edit(change: Callable[[Int8Linear], object]) -> Callable[[Int8Linear], None]:
    def run(layer: Int8Linear) -> None:
        with torch.no_grad():
            change(layer)

    return run


@pytest.mark.parametrize(
    "change",
    [
        lambda la: la.weight.neg_(),
        lambda la: la._buffers.update(weight=la.weight.neg()),
        lambda la: la.weight_scale.mul_(2),
        lambda la: setattr(la.weight_scale, "data", la.weight_scale * 3),
        lambda la: la.bias.add_(1),
        lambda la: setattr(la, "bias", nn.Parameter(la.bias + 1, requires_grad=False)),
        lambda la: setattr(la, "bias", None),
        lambda la: la.x_scale.mul_(2),
        lambda la: la.load_state_dict({k: v.clone() for k, v in la.state_dict().items()}),
    ],
)
def test_an_edit_is_seen(device: Device, change: Callable[[Int8Linear], object]) -> None:
    made, x = Layer(40, 32, **STATIC), torch.randn(5, 40)
    made.check(x, 1)
    edit(change)(made.layer)
    made.check(x, 2)
    made.check(x, 2)


def test_other_streams_captures_and_choices_go_round(device: Device) -> None:
    made, x = Layer(40, 32), torch.randn(5, 40)
    made.check(x, 1)
    device.capturing = True
    made.check(x, 2)
    device.capturing = False
    made.check(x, 2)
    device.stream = 8
    call = made.layer._gpu_calls[x.dtype]
    made.layer(x)
    assert made.rounds == 3
    device.stream = 7
    made.rounds = 0
    dispatch.ask_again()
    made.check(x, 1)
    assert made.layer._gpu_calls[x.dtype] is not call
    with dispatch.force("int8_linear", "tile_a"):
        made.check(x, 2)
        made.check(x, 2)
        assert dispatch.last_used("int8_linear") == "tile_a"
    made.check(x, 3)


def test_other_devices_go_round(device: Device) -> None:
    """A kernel of one device must not read x of another."""
    made, x = Layer(40, 32), torch.randn(5, 40)
    made.check(x, 1)
    calls = made.layer._gpu_calls
    calls[x.dtype] = (*calls[x.dtype][:6], x.get_device() + 1, *calls[x.dtype][7:])
    made.check(x, 2)
    assert calls[x.dtype][6] == x.get_device()
    made.check(x, 2)


def test_an_edit_during_a_launch_is_seen(device: Device) -> None:
    """What was prepared from the weight before the edit must not be repeated."""
    made, x = Layer(40, 32), torch.randn(5, 40)
    way_round = made.layer._through_op

    def edited(x: Tensor) -> Tensor:
        y = way_round(x)
        assert made.layer._buffers["weight"] is not None
        made.layer._buffers["weight"].neg_()  # by another thread
        return y

    made.layer._through_op = edited  # type: ignore[method-assign]
    made.layer(x)
    made.layer._through_op = way_round  # type: ignore[method-assign]
    made.check(x, 2)
    made.check(x, 2)


def test_launches_of_x_off_16_bytes_are_not_remembered(device: Device) -> None:
    made = Layer(40, 32)
    made.check(torch.randn(201)[1:].view(5, 40), 1)
    made.check(torch.randn(5, 40), 2)
    made.check(torch.randn(5, 40), 2)


def test_gradients_go_round(device: Device) -> None:
    made, x = Layer(40, 32), torch.randn(5, 40)
    made.check(x, 1)
    made.check(x.clone().requires_grad_(), 2)
    assert not made.layer._gpu_calls[x.dtype][10].keys() - {5}


def test_few_launches_are_remembered(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tautorch.nn.packed._MOST_ROW_COUNTS", 2)
    made = Layer(40, 32)
    for m in (1, 2, 3, 3, 1):
        made.layer(torch.randn(m, 40))
    assert made.rounds == 4 and set(made.layer._gpu_calls[torch.float32][10]) == {3, 1}


def test_tensors_of_inference_mode_are_not_watched(device: Device) -> None:
    with torch.inference_mode():
        made = Layer(40, 32)
    for i in range(2):
        made.check(torch.randn(5, 40), i + 1)

"""Memory formats and geometry of the convolutions, which the operator suites take as given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tautorch import ops
from tautorch.ops.geometry import as_pair, geometry_of
from tautorch.testing.cases import Case, conv_case

CONVOLUTIONS = ("int8_conv2d", "sparse_conv2d", "lowrank_conv2d")
LAST = torch.channels_last


@pytest.fixture(params=CONVOLUTIONS)
def case(request: pytest.FixtureRequest) -> Case:
    return conv_case(request.param, (2, 6, 7, 5), (10, 6, 3, 3), padding=1, stride=2)


def run(case: Case) -> Tensor:
    return case(getattr(ops, case.op))


def formats(x: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    """Inputs, and whether their output lies in channels-last memory."""
    last = x.contiguous(memory_format=LAST)
    yield "NCHW", x, False
    yield "channels last", last, True
    yield "NHWC permuted", x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), True
    yield "unbatched", x[0], False
    yield "unbatched, channels last", last[0], True
    yield "both formats at once", x[..., :1, :1].contiguous(memory_format=LAST), False
    yield "every second column", x.repeat_interleave(2, 3)[..., ::2], False
    yield "a crop of a channels-last image", torch.cat([last, last], 3)[..., :5], False
    yield "a window of the batch", torch.cat([x, last])[1:3], False
    yield "one channel of many", x[:, 2:3].expand(-1, 6, -1, -1), False


def test_memory_format_follows_the_input(case: Case) -> None:
    for name, x, last in formats(case.x):
        y = run(case.with_x(x))
        batch = y if y.dim() == 4 else y[None]
        assert batch.is_contiguous(memory_format=LAST if last else torch.contiguous_format), name
        if last:
            assert not y.is_contiguous(), name
        plain = x.clone(memory_format=torch.contiguous_format)
        assert torch.equal(y, run(case.with_x(plain))), name


def test_fake_outputs_have_the_same_strides(case: Case) -> None:
    for name, x, _ in formats(case.x):
        y = run(case.with_x(x))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = run(case.with_x(mode.from_tensor(x)))
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype), name


def test_gradient_of_every_memory_format(case: Case) -> None:
    for name, x, _ in formats(case.x):
        mine, plain = x.detach().requires_grad_(), x.clone(memory_format=torch.contiguous_format)
        run(case.with_x(mine)).sum().backward()
        plain.requires_grad_()
        run(case.with_x(plain)).sum().backward()
        assert mine.grad is not None and plain.grad is not None
        torch.testing.assert_close(mine.grad, plain.grad, msg=name)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (5, 3)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_out_size_is_torchs(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    layer = nn.Conv2d(2, 4, kernel, stride, padding, dilation, device="meta")
    geometry = geometry_of("test", layer.weight.shape, stride, padding, dilation, 1)
    for height, width in ((9, 11), (13, 10), (24, 17)):
        y = layer(torch.empty(1, 2, height, width, device="meta"))
        assert geometry.out_size(height, width) == tuple(y.shape[2:])


def test_a_kernel_of_just_the_input() -> None:
    for op in CONVOLUTIONS:
        case = conv_case(op, (1, 3, 2, 1), (4, 3, 4, 3), padding=1)
        assert run(case).shape == (1, 4, 1, 1)
        with pytest.raises(ValueError, match=rf"{op}: x must be at least as large as the kernel \(4, 3\)"):
            run(case.with_x(case.x[:, :, :1]))


def test_pairs() -> None:
    assert as_pair("op", "stride", 3, 1) == as_pair("op", "stride", [3], 1) == (3, 3)
    assert as_pair("op", "stride", [3, 4], 1) == (3, 4)
    with pytest.raises(ValueError, match="op: stride must be an int or a"):
        as_pair("op", "stride", (1, 2, 3), 1)
    with pytest.raises(ValueError, match="op: padding must be at least 0, got"):
        as_pair("op", "padding", (1, -1), 0)


@pytest.mark.parametrize("shape", [(4, 3, 3), (0, 3, 3, 3), (4, 3, 0, 3)])
def test_bad_weights(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"op: weight must be \[O, I/groups, kh, kw\]"):
        geometry_of("op", shape, 1, 0, 1, 1)

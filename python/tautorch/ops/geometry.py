"""What the convolutions share: geometry, memory formats, packs, gradients and the call of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from tautorch import _C, dispatch
from tautorch.reference.common import pair
from tautorch.reference.quantizer import MAX_K_LOWEST

from . import gradients, packing, tails
from . import library as lib
from .tails import Tail

# What the schemas of the convolutions end with. A packed weight comes with its ``weight_shape``.
CONV_SCHEMA = (
    "int[]? weight_shape=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, "
    + tails.TAIL_SCHEMA
)
Pair = int | Sequence[int]
# Inputs under a row of a filter below which a pixel's whole window is copied before it is multiplied: six
# steps of the kernel, as many as int8 output needs to leave under the next tile's products.
SHORT_ROW = 24

_run_images, MAKERS = _C.run_images, (torch.empty, torch.channels_last)


class Geometry(NamedTuple):
    """A convolution without its numbers; pairs are (height, width)."""

    weight_shape: tuple[int, int, int, int]  # O, I/groups, kh, kw
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def in_channels(self) -> int:
        """I, of all groups."""
        return self.weight_shape[1] * self.groups

    @property
    def taps(self) -> int:
        """kh * kw."""
        return self.weight_shape[2] * self.weight_shape[3]

    @property
    def k(self) -> int:
        """Length of an inner product."""
        return self.weight_shape[1] * self.taps

    def plan_arguments(self) -> tuple[int, ...]:
        """What every ``<op>_plan`` takes before the tail."""
        return (self.in_channels, *self.weight_shape[2:], *self.stride, *self.padding, *self.dilation)

    def operands(self) -> tuple[tuple[int, ...], tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """The geometry's arguments in the schemas' order."""
        return self.weight_shape, self.stride, self.padding, self.dilation, self.groups

    def keywords(self) -> dict[str, Any]:
        """The geometry's arguments of the functional forms."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Output height and width; under 1 where the kernel is larger than the padded input."""
        _, _, kh, kw = self.weight_shape
        (sh, sw), (ph, pw), (dh, dw) = self.stride, self.padding, self.dilation
        return (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1


def as_pair(op: str, name: str, value: Pair, least: int) -> tuple[int, int]:
    """``(v, v)`` of an int or a sequence of one, the pair of a sequence of two.

    Raises:
        ValueError: another length, or an entry under ``least``.
    """
    if not isinstance(value, int) and len(value) not in (1, 2):
        raise ValueError(f"{op}: {name} must be an int or a (height, width) pair, got {value!r}")
    both = pair(value if isinstance(value, int) else (value[0], value[-1]))
    if min(both) < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value!r}")
    return both


def geometry_of(
    op: str, weight_shape: Sequence[int], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Geometry:
    """The geometry of a call, checked.

    Raises:
        ValueError: a weight that is not ``[O, I/groups, kh, kw]``, an O that groups does not divide, or a
            stride, padding or dilation out of range.
    """
    shape = tuple(int(s) for s in weight_shape)
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"{op}: weight must be [O, I/groups, kh, kw], got {list(shape)}")
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"{op}: groups must divide the {shape[0]} output channels, got {groups}")
    return Geometry(
        (shape[0], shape[1], shape[2], shape[3]),
        as_pair(op, "stride", stride, 1),
        as_pair(op, "padding", padding, 0),
        as_pair(op, "dilation", dilation, 1),
        int(groups),
    )


def check_input(op: str, x: Tensor, geometry: Geometry) -> None:
    """ValueError unless x is ``[B, I, H, W]`` or ``[I, H, W]`` with this I and room for the kernel."""
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [B, I, H, W] or [I, H, W], got {list(x.shape)}")
    if x.shape[-3] != geometry.in_channels:
        raise ValueError(
            f"{op}: x must have {geometry.in_channels} channels as the weight is "
            f"{list(geometry.weight_shape)} with groups={geometry.groups}, got {list(x.shape)}"
        )
    height, width = geometry.out_size(x.shape[-2], x.shape[-1])
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: x must be at least as large as the kernel {geometry.weight_shape[2:]} with dilation "
            f"{geometry.dilation}, got {x.shape[-2]}x{x.shape[-1]} with padding {geometry.padding}"
        )


def check_call(
    op: str,
    x: Tensor,
    geometry: Geometry,
    weights: dict[str, Tensor | None],
    weight_scale: Tensor | None,
    bias: Tensor | None,
    tail: Tail,
    *,
    float_weight: bool = False,
    k: int = 0,
) -> None:
    """Check what all convolutions take alike; ``weights`` are the weight's tensors by name, ``k`` the
    longest inner product beside the geometry's own.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, device or combination that does not fit.
    """
    check_input(op, x, geometry)
    for name, tensor in weights.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {tensor.device}; move it there")
    if not (tail.weight_only or float_weight):
        tails.check_k(op, max(geometry.k, k))
    tails.check_tail(
        op,
        x,
        n=geometry.weight_shape[0],
        weight_scale=weight_scale,
        bias=bias,
        rows=samples(x),
        float_weight=float_weight,
        **tail._asdict(),
    )


def samples(x: Tensor) -> int:
    """How many samples x has."""
    return x.shape[0] if x.dim() == 4 else 1


def channels_last(x: Tensor) -> bool:
    """Whether 4-D x lies in channels-last memory; of one channel, which is both, strides tell as in torch."""
    if x.is_contiguous():
        return x.shape[1] == 1 and x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1
    return x.is_contiguous(memory_format=torch.channels_last)


def output(x: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """An empty output in the memory format of 4-D x."""
    height, width = geometry.out_size(x.shape[2], x.shape[3])
    memory = torch.channels_last if channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], geometry.weight_shape[0], height, width)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory)


def fake_output(x: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """What ``call`` returns, without running."""
    if x.dim() == 3:
        return output(x.unsqueeze(0), geometry, dtype).squeeze(0)
    return output(x, geometry, dtype)


def laid_out(y: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """A convolution's result, of whatever strides, in the memory that ``call`` returns for x."""
    return fake_output(x, geometry, y.dtype).copy_(y)


def conv_call(plan: bytes, geometry: Geometry, x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
    """What ``run_conv`` takes: a plan with its sizes and dtypes."""
    _, _, kh, kw = geometry.weight_shape
    (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
    outputs, codes = geometry.weight_shape[0], tails.DTYPE_CODE
    # Output height and width are (size - extent) // stride + 1.
    extents = dh * (kh - 1) + 1 - 2 * ph, dw * (kw - 1) + 1 - 2 * pw
    return plan, geometry.in_channels, outputs, *extents, sh, sw, codes[x_dtype], dtype, codes[dtype]


def run_conv(run: Callable[..., None], call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    """Run a convolution's call on x of its dtype, in x's memory format; None where x does not fit.

    Memory that is neither NCHW nor channels-last is copied first.
    """
    out: Tensor | None = _run_images(MAKERS, run, call, x)
    if out is None and x.dim() == 3:
        out = run_conv(run, call, x.unsqueeze(0))
        return None if out is None else out.squeeze(0)
    if out is None and x.dim() == 4:
        out = _run_images(MAKERS, run, call, x.resolve_neg().contiguous())
    return out


# ---- packs ----------------------------------------------------------------------------------------------


def pack(weight: Tensor, groups: int, kind: int, kernel: str) -> Tensor:
    """Dense pack of a canonical ``[O, I/groups, kh, kw]`` weight, int8 or floating as ``kind`` asks."""
    if kind == packing.DENSE_F32:
        weight = weight.to(torch.float32)
    o, i, kh, kw = weight.shape
    return _pack_matrix(weight.reshape(o, i, kh * kw), groups, kind, kernel)


def _pack_matrix(weight: Tensor, groups: int, kind: int, kernel: str) -> Tensor:
    """Dense pack of ``[O, k, taps]``."""
    weight = weight.detach().contiguous()
    o, k, taps = weight.shape
    return packing.dense_pack(kernel, kind, weight, groups, o // groups, k, taps, (k * taps, taps, 1))


def pack_forms(weight: Tensor, groups: int, dilation: int, kind: int, kernel: str) -> Tensor:
    """Dense pack of a canonical weight in the form that ``int8_conv2d``'s kernels run fastest.

    Groups of 4, 8 or 16 channels have a kernel of their own. Other small ones become fewer groups with zeros
    between what belongs to different ones, as long as the outputs still fit the vector that one of them would
    have left empty. Of a single group without dilation along a row, a whole row of the filter becomes one
    tap: channels are then padded to a kernel's step once a row, or, where rows are short, once in all.
    """
    o, i, kh, kw = weight.shape
    if kind == packing.DENSE_I8 and _C.grouped_fits(kernel, groups, o // groups, i, kh * kw):
        return pack(weight, groups, packing.GROUPED_I8, kernel)
    merged = _merged(groups, weight, kernel) if kind == packing.DENSE_I8 else 1
    if merged > 1:
        weight, groups = _merge(weight, groups, merged), groups // merged
    o, i, kh, kw = weight.shape
    if groups > 1 or dilation > 1 or kw == 1:
        return pack(weight, groups, kind, kernel)
    if kind == packing.DENSE_I8 and kh > 1 and kw * i < SHORT_ROW:
        return _pack_matrix(weight.permute(0, 2, 3, 1).reshape(o, kh * kw * i, 1), groups, kind, kernel)
    return _pack_matrix(weight.permute(0, 3, 1, 2).reshape(o, kw * i, kh), groups, kind, kernel)


def _merged(groups: int, weight: Tensor, kernel: str) -> int:
    """How many groups of a weight to pack as one: those that fill a vector, within what a pack may sum."""
    most = (16 if kernel in dispatch.AVX512 else 8) // (weight.shape[0] // groups)
    most = min(most, MAX_K_LOWEST // max(1, weight[0].numel()))
    return max(f for f in range(1, groups + 1) if groups % f == 0 and (f == 1 or f <= most))


def _merge(weight: Tensor, groups: int, merged: int) -> Tensor:
    """``[O, I/groups, kh, kw]`` with the inputs of ``merged`` groups, zero but for each output's own."""
    o, i, kh, kw = weight.shape
    wide = weight.new_zeros(groups // merged, merged, o // groups, merged, i, kh, kw)
    own = torch.diagonal(wide, dim1=1, dim2=3)
    own.copy_(weight.reshape(groups // merged, merged, o // groups, i, kh, kw).permute(0, 2, 3, 4, 5, 1))
    return wide.reshape(o, merged * i, kh, kw)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The canonical weight ``[O, I/groups, kh, kw]`` of a dense pack of any form, int8 or fp32."""
    o, i, kh, kw = shape
    info = packing.pack_info(packed)
    groups, n, k, taps = (int(info[key]) for key in ("groups", "n", "k", "taps"))
    rows = taps == kh and taps != kh * kw
    window = taps == 1 and kh > 1
    inputs = k // kw if rows else k // (kh * kw) if window else k
    merged = inputs // i
    if (
        o != groups * n
        or inputs != merged * i
        or taps * k != merged * i * kh * kw
        or merged == 0
        or n % merged
    ):
        raise ValueError(
            f"unpack: packed weight must hold {list(shape)}, got {groups} groups of {n} outputs, {k} inputs "
            f"and {taps} taps; pack it again"
        )
    dtype = torch.float32 if info["kind"] == packing.DENSE_F32 else torch.int8
    weight = packing.with_memory(torch.empty(o, k, taps, dtype=dtype, device="cpu"))
    _C.dense_unpack(packed.data_ptr(), packed.numel(), weight.data_ptr(), k * taps, taps, 1)
    if rows:
        weight = weight.reshape(o, kw, inputs, kh).permute(0, 2, 3, 1)
    elif window:
        weight = weight.reshape(o, kh, kw, inputs).permute(0, 3, 1, 2)
    if merged > 1:
        wide = weight.reshape(groups, merged, n // merged, merged, i, kh, kw)
        weight = torch.diagonal(wide, dim1=1, dim2=3).permute(0, 5, 1, 2, 3, 4)
    return weight.reshape(o, i, kh, kw).contiguous()


def canonical(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A canonical or packed dense weight as canonical one."""
    return unpack(weight, shape) if weight.dtype == torch.uint8 else weight


def packed_for(weight: Tensor, kernel: str) -> bool:
    """Whether a weight is a pack for this kernel."""
    return weight.dtype == torch.uint8 and packing.pack_info(weight)["kernel"] == kernel


# The float32 weight that a canonical or packed one stands for, for backward graphs.
lib.LIB.define(
    "float_conv2d_weight(Tensor weight, Tensor? scale, SymInt[] shape) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _float_weight(weight: Tensor, scale: Tensor | None, shape: Sequence[int]) -> Tensor:
    dense = canonical(weight, shape).to(torch.float32, copy=True)
    return dense if scale is None else dense * scale.reshape(-1, 1, 1, 1)


def _float_weight_fake(weight: Tensor, scale: Tensor | None, shape: Sequence[int]) -> Tensor:
    return weight.new_empty(tuple(shape), dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    lib.LIB.impl("float_conv2d_weight", _float_weight, _device)
torch.library.register_fake("tautorch::float_conv2d_weight", _float_weight_fake, lib=lib.LIB)


# ---- gradients ------------------------------------------------------------------------------------------


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
) -> Tensor:
    """Gradient with respect to x through a float weight, zero where a static quantiser clips."""
    batch = x.unsqueeze(0) if x.dim() == 3 else x
    g = grad.unsqueeze(0) if grad.dim() == 3 else grad
    result = conv2d_input(  # type: ignore[no-untyped-call]
        batch.shape, weight, g, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    return gradients.input_gradient(result.reshape(x.shape), x, x_scale, x_zero_point)


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    """Gradient with respect to the bias."""
    dims = [d for d in range(grad.dim()) if d != grad.dim() - 3]
    return grad.sum(dims).to(bias.dtype)

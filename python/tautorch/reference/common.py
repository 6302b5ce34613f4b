"""What the six references share: the input's quantisation, exact products, patches, the epilogue.

Integer products run in float64, which holds every |acc| < 2**31 exactly; float ones too, rounded to fp32
once, so that the reference is nearer the truth than any backend it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantizer import (
    MAX_K,
    MAX_K_LOWEST,
    QMAX,
    QMIN,
    quantize_rows,
    quantize_samples,
    quantize_static,
    requantize,
)

ACTIVATIONS: tuple[str, ...] = ("none", "relu", "gelu", "gelu_tanh", "silu")
FLOAT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def apply_activation(y: Tensor, activation: str) -> Tensor:
    """fp32 activation of fp32 ``y``, computed in float64 and rounded once; relu keeps NaN too."""
    if activation == "none":
        return y
    if activation == "relu":
        return torch.relu(y)
    wide = y.double()
    if activation == "gelu":
        wide = torch.nn.functional.gelu(wide)
    elif activation == "gelu_tanh":
        wide = torch.nn.functional.gelu(wide, approximate="tanh")
    elif activation == "silu":
        wide = torch.nn.functional.silu(wide)
    else:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return wide.to(torch.float32)


@dataclass(frozen=True)
class Epilogue:
    """What follows the product: bias, activation, and int8 or float output.

    ``bias`` is ``[N]`` of any float dtype; ``out_scale`` fp32 and ``out_zero_point`` int32 have one element.
    """

    bias: Tensor | None = None
    activation: str = "none"
    out_scale: Tensor | None = None
    out_zero_point: Tensor | None = None
    out_dtype: torch.dtype | None = None

    def check(self, op: str, *, raw: bool) -> None:
        """Raise ValueError where the parts contradict each other; ``raw``: int32 accumulators exist."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        if self.out_dtype == torch.int32 and not raw:
            raise ValueError(f"{op}: out_dtype must be floating or int8 without int8 products, got int32")
        if self.out_scale is None and self.out_dtype == torch.int8:
            raise ValueError(f"{op}: out_scale must be given for out_dtype torch.int8, got None")
        if self.out_scale is not None and self.out_dtype not in (None, torch.int8):
            raise ValueError(
                f"{op}: out_dtype must be torch.int8 or None with out_scale, got {self.out_dtype}"
            )
        if self.out_zero_point is not None and self.out_scale is None:
            raise ValueError(f"{op}: out_scale must be given with out_zero_point, got None")
        check_scale(op, "out_scale", self.out_scale)
        check_zero_point(op, "out_zero_point", self.out_zero_point)

    def finish(self, y: Tensor, x_dtype: torch.dtype, *, channel: int) -> Tensor:
        """Output of fp32 ``y`` with N at dimension ``channel``: bias, activation, the output's dtype."""
        if self.bias is not None:
            y = y + over(self.bias.to(torch.float32), y, channel)
        y = apply_activation(y, self.activation)
        if self.out_scale is not None:
            return requantize(y, self.out_scale, self.out_zero_point)
        if self.out_dtype is not None:
            return y.to(self.out_dtype)
        return y.to(x_dtype if x_dtype.is_floating_point else torch.float32)


def over(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """``vector`` shaped so that it broadcasts along dimension ``dim`` of ``like``."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return vector.reshape(shape)


def check_k(op: str, **weights: Tensor) -> None:
    """ValueError where an int32 accumulator could overflow. Weights are ``[N, K]``, by argument name."""
    for name, weight in weights.items():
        k = weight.shape[1]
        if k > MAX_K:
            raise ValueError(
                f"{op}: inner dimension must be at most {MAX_K} (255 * 127 * K < 2**31), got {k}; "
                "split the layer"
            )
        if k > MAX_K_LOWEST and bool((weight == -128).any()):
            raise ValueError(
                f"{op}: {name} must be in [-127, 127] where K is above {MAX_K_LOWEST}, got -128 with K={k}; "
                "clamp it to -127 or split the layer"
            )


def check_scale(op: str, name: str, scale: Tensor | None) -> None:
    """ValueError for a single scale that nothing can be quantised with; as every kernel says it."""
    if scale is None:
        return
    value = scale.to(torch.float32).reshape(())
    if not bool((value > 0) & torch.isfinite(value) & torch.isfinite(torch.ones_like(value) / value)):
        raise ValueError(
            f"{op}: {name} must be positive and finite, with a finite inverse, got {float(value):g}"
        )


def check_zero_point(op: str, name: str, zero_point: Tensor | None) -> None:
    """ValueError for a zero point that is no int8 value."""
    if zero_point is not None and not QMIN <= int(zero_point) <= QMAX:
        raise ValueError(f"{op}: {name} must be in [{QMIN}, {QMAX}], got {int(zero_point)}")


def check_input(op: str, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None) -> None:
    """ValueError for numbers that x cannot be quantised with; int8 x may have any scales."""
    check_zero_point(op, "x_zero_point", x_zero_point)
    if x.dtype == torch.int8 or x_scale is None:
        return
    if x_scale.numel() != 1:
        raise ValueError(f"{op}: x_scale must have 1 element for float x, got {x_scale.numel()}")
    check_scale(op, "x_scale", x_scale)


def check_float(op: str, x: Tensor, what: str) -> None:
    """TypeError where ``x`` is not one of the float types a float product takes."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16 for {what}, got {x.dtype}")


def centred_input(
    op: str, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None, *, samples: bool = False
) -> tuple[Tensor, Tensor]:
    """``(q - zero_point)`` float64 of x's shape, and the scale fp32 of each row (of each sample for
    convolutions).

    ``x`` is ``[M, K]``, or ``[B, ...]`` with ``samples=True``: float, quantised here (dynamically where
    ``x_scale`` is None), or int8 with its scale (one element, or one a row).
    """
    check_input(op, x, x_scale, x_zero_point)
    if x.dtype == torch.int8:
        if x_scale is None:
            raise ValueError(f"{op}: x_scale must be given for int8 x, got None")
        if x_scale.numel() not in (1, x.shape[0]):
            raise ValueError(f"{op}: x_scale must have 1 or {x.shape[0]} elements, got {x_scale.numel()}")
        q, scale = x, x_scale.to(torch.float32).reshape(-1).expand(x.shape[0])
    elif x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or int8, got {x.dtype}; use x.float()")
    elif x_scale is not None:
        q, scale = quantize_static(x, x_scale, x_zero_point, samples=samples)
    elif x_zero_point is not None:
        raise ValueError(f"{op}: x_scale must be given with x_zero_point, got None")
    else:
        q, scale = quantize_samples(x) if samples else quantize_rows(x)
    centred = q.double()
    if x_zero_point is not None:
        centred = centred - x_zero_point.double().reshape(())
    return centred, scale


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """``(v, v)`` for an int, the pair itself otherwise."""
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[1])


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation (height, width) and groups of a convolution, and its kernel's size."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def out_size(self, op: str, height: int, width: int) -> tuple[int, int]:
        """Output height and width; ValueError where the kernel is larger than the padded input."""
        sizes = []
        for i, size in enumerate((height, width)):
            reach = self.dilation[i] * (self.kernel[i] - 1)
            sizes.append((size + 2 * self.padding[i] - reach - 1) // self.stride[i] + 1)
        if min(sizes) < 1:
            raise ValueError(
                f"{op}: x must be at least as large as the kernel {self.kernel} with dilation "
                f"{self.dilation}, got {height}x{width} with padding {self.padding}"
            )
        return sizes[0], sizes[1]

    def patches(self, op: str, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches of ``x`` ``[B, I, H, W]``: ``[B, groups, OH*OW, (I/g)*kh*kw]``, and ``(OH, OW)``.

        Padding is 0, which is what a quantised input's zero point means once it is centred.
        """
        batch, channels, height, width = x.shape
        if channels % self.groups:
            raise ValueError(f"{op}: groups must divide the {channels} input channels, got {self.groups}")
        size = self.out_size(op, height, width)
        columns = torch.nn.functional.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        k = channels // self.groups * math.prod(self.kernel)
        return columns.reshape(batch, self.groups, k, size[0] * size[1]).transpose(2, 3), size


def grouped_product(patches: Tensor, matrix: Tensor) -> Tensor:
    """float64 ``[B, g, L, K]`` x ``[g*n, K]`` -> ``[B, g*n, L]``: each group's rows with its own patches."""
    batch, groups, length, k = patches.shape
    weights = matrix.double().reshape(groups, -1, k)
    product = torch.matmul(patches, weights.transpose(1, 2))  # [B, g, L, n]
    return product.transpose(2, 3).reshape(batch, matrix.shape[0], length)


def batched(op: str, x: Tensor) -> tuple[Tensor, bool]:
    """``x`` as ``[B, I, H, W]`` and whether it came without a batch dimension."""
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [B, I, H, W] or [I, H, W], got {x.dim()} dimensions")
    return (x.unsqueeze(0), True) if x.dim() == 3 else (x, False)


def stored_product(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, n: int) -> Tensor:
    """float64 ``[M, n]``: sum of ``x[:, cols] * values`` into ``rows``, a dropped weight taking no part.

    A dense product with the decoded weight would spread an Inf of a dropped input as Inf * 0 = NaN.
    """
    out = torch.zeros(x.shape[0], n, dtype=torch.float64, device=x.device)
    for m in range(x.shape[0]):
        out[m].index_add_(0, rows, x[m, cols].double() * values.double())
    return out

"""``tautorch::quantize_rows``: int8 rows for the operators, fused behind what made the floats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tautorch import dispatch
from tautorch.reference import quantize_rows as reference
from tautorch.reference.common import check_scale, check_zero_point

from . import _gpu, caches, packing, tails
from . import library as lib

OP = "quantize_rows"
STAGES = reference.STAGES
_vectors = caches.PackCache()


def _check(
    x: Tensor,
    after: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> None:
    if after not in STAGES:
        raise ValueError(f"{OP}: after must be one of {', '.join(STAGES)}, got {after!r}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{OP}: x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must be [..., K], got a 0-dimensional tensor")
    norm, k = after.endswith("_norm"), x.shape[-1]
    if norm and k == 0:
        raise ValueError(f"{OP}: x must have elements in a row behind {after}, got {list(x.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not norm:
            raise ValueError(f"{OP}: {name} is for rms_norm and layer_norm, got one with after={after!r}")
        if t.shape != (k,) or not t.is_floating_point():
            raise ValueError(f"{OP}: {name} must be floating [{k}] as x gives, got {t.dtype} {list(t.shape)}")
    if (gate is not None) != (after == "silu_gate"):
        raise ValueError(f"{OP}: gate must be given for silu_gate and only there, got after={after!r}")
    if gate is not None and (gate.shape != x.shape or gate.dtype != x.dtype):
        raise ValueError(
            f"{OP}: gate must be {x.dtype} {list(x.shape)} like x, got {gate.dtype} {list(gate.shape)}"
        )
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{OP}: eps must be finite and not negative, got {eps}")
    if x_scale is not None and (x_scale.numel() != 1 or x_scale.dtype != torch.float32):
        raise ValueError(
            f"{OP}: x_scale must be one float32, got {x_scale.dtype} {list(x_scale.shape)}; "
            "without it every row gets its own"
        )
    if x_zero_point is not None and (
        x_scale is None or x_zero_point.numel() != 1 or x_zero_point.dtype != torch.int32
    ):
        raise ValueError(f"{OP}: x_zero_point must be one int32 beside an x_scale")
    others = {"weight": weight, "bias": bias, "gate": gate, "x_scale": x_scale, "x_zero_point": x_zero_point}
    _gpu.check_devices(OP, x, **others)


def _cpu(
    x: Tensor,
    after: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, after, weight, bias, gate, eps, x_scale, x_zero_point)
    check_scale(OP, "x_scale", x_scale)
    check_zero_point(OP, "x_zero_point", x_zero_point)
    return reference.quantize_rows(x, after, weight, bias, gate, eps, x_scale, x_zero_point)


def _cuda(
    x: Tensor,
    after: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, after, weight, bias, gate, eps, x_scale, x_zero_point)
    ext = dispatch.cuda
    if ext is None:
        return reference.quantize_rows(x, after, weight, bias, gate, eps, x_scale, x_zero_point)
    k, m, index = x.shape[-1], x.shape[:-1].numel(), x.get_device()
    width, ldq = 16 // x.element_size(), packing.round_up(k, 16)
    q = torch.empty((m, ldq), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if m == 0:
        return q[:, :k].reshape(x.shape), scale
    stream = torch.cuda.current_stream(index).cuda_stream
    static = [0 if t is None else t.data_ptr() for t in (x_scale, x_zero_point)]
    code = tails.DTYPE_CODE[x.dtype]
    if after == "none" or k % width or k > ext.MAX_HELD:
        # The stage by torch, then the plain quantiser, which takes any length and stride.
        rows = reference.stage(x, after, weight, bias, gate, eps) if after != "none" else x
        rows = rows.reshape(m, k)
        code = tails.DTYPE_CODE[rows.dtype]
        strides = rows.stride() if k else (0, 1)
        ext.quantize_rows(
            rows.data_ptr(), code, *strides, m, k, *static, q.data_ptr(), ldq, scale.data_ptr(), index, stream
        )
    else:
        rows = _aligned(x.reshape(m, k), width)
        gates = None if gate is None else _aligned(gate.reshape(m, k), width)
        vectors = [_float_vector(t) for t in (weight, bias)]
        ext.quantize_rows_after(
            rows.data_ptr(), code, rows.stride(0), m, k, STAGES[after],
            *(0 if v is None else v.data_ptr() for v in vectors),
            *((0, 0) if gates is None else (gates.data_ptr(), gates.stride(0))),
            eps, *static, q.data_ptr(), ldq, scale.data_ptr(), index, stream,
        )  # fmt: skip
    return (q if ldq == k else q[:, :k].contiguous()).view(x.shape), scale


def _aligned(rows: Tensor, width: int) -> Tensor:
    """Rows [M, K] of adjacent elements that start on 16 bytes; copied where they are not."""
    m, k = rows.shape
    adjacent = k == 1 or rows.stride(1) == 1
    pitch = m < 2 or (rows.stride(0) >= k and rows.stride(0) % width == 0)
    if adjacent and pitch and rows.data_ptr() % 16 == 0:
        return rows if m > 1 else rows.as_strided((m, k), (k, 1))
    return rows.clone(memory_format=torch.contiguous_format)


def _float_vector(v: Tensor | None) -> Tensor | None:
    """A norm's weight or bias as the kernel reads it: fp32, adjacent, on 16 bytes. Converted once."""
    if v is None or (v.dtype == torch.float32 and v.is_contiguous() and v.data_ptr() % 16 == 0):
        return v
    return _gpu.once(_vectors, v, lambda: v.detach().to(torch.float32, copy=True).contiguous())


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _without_gradient(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    # Without a kernel of its own torch differentiates what the reference runs: another thing on each device.
    op: Any = torch.ops.tautorch.quantize_rows.default
    with torch._C._AutoDispatchBelowAutograd():
        q, scale = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    return q, scale


lib.LIB.define(
    f"{OP}(Tensor x, str after='none', Tensor? weight=None, Tensor? bias=None, Tensor? gate=None, "
    "float eps=1e-5, Tensor? x_scale=None, Tensor? x_zero_point=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
lib.LIB.impl(OP, _cpu, "CPU")
lib.LIB.impl(OP, _cuda, "CUDA")
lib.LIB.impl(OP, _without_gradient, "Autograd", with_keyset=True)
torch.library.register_fake(f"tautorch::{OP}", _fake, lib=lib.LIB)


def quantize_rows(
    x: Tensor,
    after: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 rows and their scales, for ``int8_linear(q, ..., x_scale=scale)`` and its siblings.

    On CUDA one kernel does the stage and the rounding: x is read once and its float results go through no
    memory. Several layers behind one norm (queries, keys, values) share one call.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``. Everything before rounding is computed in fp32.
        after: what x goes through first: ``"none"``; ``"rms_norm"`` (Zhang & Sennrich, arXiv:1910.07467),
            ``x / sqrt(mean(x^2) + eps) * weight + bias``; ``"layer_norm"`` (Ba et al., arXiv:1607.06450);
            ``"silu_gate"``, ``silu(gate) * x`` (SwiGLU: Shazeer, arXiv:2002.05202); ``"gelu"`` (by erf) or
            ``"gelu_tanh"`` (arXiv:1606.08415).
        weight, bias: of a norm, floating ``[K]``.
        gate: of silu_gate, like x.
        x_scale, x_zero_point: static quantisation: one fp32 and one int32. Without, each row has its own
            scale (arXiv:2208.07339).

    Returns:
        ``q`` int8 like x and ``scale`` fp32 ``x.shape[:-1]``. A row with NaN or Inf after the stage has scale
        NaN. ``after="none"`` is exact: the same integers everywhere. Behind a stage a device may round its
        floats otherwise, so that q differs by 1 in at most one of 1000 elements (tested) and scales in the
        last bits. No gradient: neither of them requires one.

    Raises:
        TypeError, ValueError: arguments that are not as above.
    """
    q, scale = torch.ops.tautorch.quantize_rows(x, after, weight, bias, gate, eps, x_scale, x_zero_point)
    return q, scale

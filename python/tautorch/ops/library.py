"""What the operators share: registration, argument checks, the plan's tail, packing caches, gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.reference.common import ACTIVATIONS, apply_activation
from tautorch.reference.quantizer import MAX_K

LIB: Any = torch.library.Library("tautorch", "DEF")  # type: ignore[no-untyped-call]

# Codes of csrc/kernels/common/types.h.
DTYPE_CODE: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.int32: 4,
}
ACTIVATION_CODE: dict[str, int] = {name: i for i, name in enumerate(ACTIVATIONS)}
DENSE_I8, DENSE_F32, DENSE_W8, SPARSE_I8, SPARSE_F32, DEPTHWISE_I8 = range(6)
DYNAMIC, STATIC, GIVEN, NONE = range(4)

# The tail of every operator's schema.
TAIL_SCHEMA = (
    "Tensor? x_scale=None, Tensor? x_zero_point=None, bool weight_only=False, str activation='none', "
    "Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None"
)


def define(
    name: str,
    schema: str,
    cpu: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    cuda: Callable[..., Tensor] | None = None,
) -> None:
    """Register ``tautorch::name`` with its kernels, fake kernel and gradient."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        dispatch.choose(dispatch.Problem(name, "cuda"))  # raises, with what the table says
        raise ValueError(f"{name}: no kernel for cuda; run this layer on the CPU or keep the float layer")

    LIB.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, cpu, "CPU")
    LIB.impl(name, refuse if cuda is None else cuda, "CUDA")
    torch.library.register_fake(f"tautorch::{name}", fake, lib=LIB)
    torch.library.register_autograd(f"tautorch::{name}", backward, setup_context=setup, lib=LIB)


# ---- arguments ------------------------------------------------------------------------------------------


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def output_dtype(x: Tensor, out_scale: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of an operator's output."""
    if out_scale is not None:
        return torch.int8
    if out_dtype is not None:
        return out_dtype
    return x.dtype if x.dtype.is_floating_point else torch.float32


def _one(op: str, name: str, t: Tensor | None, dtype: torch.dtype) -> None:
    if t is not None and (t.dtype != dtype or t.numel() != 1):
        raise ValueError(f"{op}: {name} must be one {dtype} value, got {t.dtype} {list(t.shape)}")


def check_tail(
    op: str,
    x: Tensor,
    *,
    n: int,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    weight_only: bool,
    activation: str,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    out_dtype: torch.dtype | None,
    rows: int,
    float_weight: bool = False,
) -> None:
    """Check what all operators take alike; ``rows`` is how many scales int8 x may have.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, device or combination that does not fit.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or int8, got {x.dtype}; cast it first")
    for name, t in (("weight_scale", weight_scale), ("bias", bias)):
        if t is None:
            continue
        if t.shape != (n,):
            raise ValueError(f"{op}: {name} must be [{n}] as the weight has {n} outputs, got {list(t.shape)}")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be floating, got {t.dtype}")
    # Kernels read all of these at their addresses.
    for name, t in (
        ("weight_scale", weight_scale),
        ("bias", bias),
        ("x_scale", x_scale),
        ("x_zero_point", x_zero_point),
        ("out_scale", out_scale),
        ("out_zero_point", out_zero_point),
    ):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {t.device}; move it there")
    if weight_scale is not None and weight_scale.dtype != torch.float32:
        raise TypeError(f"{op}: weight_scale must be float32, got {weight_scale.dtype}")
    if activation not in ACTIVATION_CODE:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _one(op, "x_zero_point", x_zero_point, torch.int32)
    _one(op, "out_scale", out_scale, torch.float32)
    _one(op, "out_zero_point", out_zero_point, torch.int32)
    integer = not (weight_only or float_weight)
    if x.dtype == torch.int8:
        if not integer:
            raise TypeError(f"{op}: x must be floating for weight-only or float weights, got torch.int8")
        if x_scale is None:
            raise ValueError(f"{op}: x_scale must be given for int8 x (one value, or one a row), got None")
        if x_scale.dtype != torch.float32 or x_scale.numel() not in (1, rows):
            raise ValueError(
                f"{op}: x_scale must be float32 with 1 or {rows} values, got {x_scale.dtype} "
                f"{list(x_scale.shape)}"
            )
    else:
        _one(op, "x_scale", x_scale, torch.float32)
    if x_scale is None and x_zero_point is not None:
        raise ValueError(f"{op}: x_zero_point needs x_scale, got None; dynamic quantisation is symmetric")
    if not integer and x_scale is not None:
        raise ValueError(f"{op}: x_scale must be None for weight-only or float weights: x is not quantised")
    if out_dtype is not None and out_dtype not in DTYPE_CODE:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16, float16, int8 or int32, got {out_dtype}")
    if out_dtype == torch.int32 and not integer:
        raise ValueError(f"{op}: out_dtype must be floating without int8 products, got torch.int32")
    if out_dtype == torch.int8 and out_scale is None:
        raise ValueError(f"{op}: out_scale must be given for out_dtype torch.int8, got None")
    if out_scale is not None and out_dtype not in (None, torch.int8):
        raise ValueError(f"{op}: out_dtype must be torch.int8 or None with out_scale, got {out_dtype}")
    if out_zero_point is not None and out_scale is None:
        raise ValueError(f"{op}: out_scale must be given with out_zero_point, got None")


def check_k(op: str, k: int) -> None:
    """Raise ValueError where int32 accumulators could overflow."""
    if k > MAX_K:
        raise ValueError(f"{op}: K must be at most {MAX_K} for int32 accumulation to be exact, got {k}")


def tail(
    *,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    mode: int,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    activation: str,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> tuple[dict[str, int], list[Tensor]]:
    """The dict of codes and addresses a plan takes, and the tensors to keep alive as long as the plan."""
    keep = []

    def address(t: Tensor | None, dtype: torch.dtype) -> int:
        if t is None:
            return 0
        t = t.detach().to(dtype).contiguous()
        keep.append(t)
        return t.data_ptr()

    d = {
        "weight_scale": address(weight_scale, torch.float32),
        "weight_scales": 0 if weight_scale is None else weight_scale.numel(),
        "bias": address(bias, torch.float32),
        "biases": 0 if bias is None else bias.numel(),
        "activation": ACTIVATION_CODE[activation],
        "mode": mode,
        "x_scale": address(x_scale, torch.float32),
        "x_scales": 0 if x_scale is None else x_scale.numel(),
        "x_zero_point": address(x_zero_point, torch.int32),
        "out_scale": address(out_scale, torch.float32),
        "out_zero_point": address(out_zero_point, torch.int32),
    }
    return d, keep


class Tail(NamedTuple):
    """The arguments that end every schema; see ``int8_linear``."""

    x_scale: Tensor | None = None
    x_zero_point: Tensor | None = None
    weight_only: bool = False
    activation: str = "none"
    out_scale: Tensor | None = None
    out_zero_point: Tensor | None = None
    out_dtype: torch.dtype | None = None

    def dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the output."""
        return output_dtype(x, self.out_scale, self.out_dtype)

    def codes(
        self, x: Tensor, weight_scale: Tensor | None, bias: Tensor | None, float_input: bool
    ) -> tuple[dict[str, int], list[Tensor]]:
        """``tail`` of a call."""
        return tail(
            weight_scale=weight_scale,
            bias=bias,
            mode=quant_mode(x.dtype, self.x_scale, float_input),
            x_scale=self.x_scale,
            x_zero_point=self.x_zero_point,
            activation=self.activation,
            out_scale=self.out_scale,
            out_zero_point=self.out_zero_point,
        )


def quant_mode(x_dtype: torch.dtype, x_scale: Tensor | None, float_input: bool) -> int:
    """Code of how x becomes an operand."""
    if float_input:
        return NONE
    if x_dtype == torch.int8:
        return GIVEN
    return DYNAMIC if x_scale is None else STATIC


# ---- packing --------------------------------------------------------------------------------------------


class PackCache:
    """Packed weights of canonical tensors, kept as long as the tensors live and stay unchanged."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple[weakref.ref[Tensor], ...], object, Tensor]] = {}

    def peek(self, weight: Tensor, key: object, also: Sequence[Tensor | None] = ()) -> Tensor | None:
        """The pack that ``get`` would return without packing, or None."""
        tensors = (weight, *[t for t in also if t is not None])
        if any(t.is_inference() for t in tensors):  # no version counter: an edit could not be seen
            return None
        entry = self._entries.get(id(weight))
        if (
            entry is not None
            and entry[1] == (key, *[t._version for t in tensors])
            and all(r() is t for r, t in zip(entry[0], tensors, strict=False))
        ):
            return entry[2]
        return None

    def get(
        self, weight: Tensor, key: object, pack: Callable[[], Tensor], also: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """The pack of ``weight``, and the tensors it is packed with, for ``key`` (kernel, kind, ...)."""
        found = self.peek(weight, key, also)
        if found is not None:
            return found
        packed = pack()
        tensors = (weight, *[t for t in also if t is not None])
        if not any(t.is_inference() for t in tensors):
            token, entries = id(weight), self._entries
            first = weakref.ref(weight, lambda _: entries.pop(token, None))
            versions = (key, *[t._version for t in tensors])
            entries[token] = ((first, *[weakref.ref(t) for t in tensors[1:]]), versions, packed)
        return packed


def pack_buffer(size: int) -> Tensor:
    """uint8 ``[size]`` for packed weights; large ones start on a huge page, which packing then asks for."""
    huge = 2 << 20
    if size < huge:
        return torch.empty(size, dtype=torch.uint8)
    whole = torch.empty(size + huge, dtype=torch.uint8)
    return whole[-whole.data_ptr() % huge :][:size]


def dense_pack(
    kernel: str, kind: int, w: Tensor, groups: int, n: int, k: int, taps: int, strides: tuple[int, int, int]
) -> Tensor:
    """Packed weights (uint8) of contiguous ``w``, element (n, k, tap) at the given strides."""
    out = pack_buffer(_C.dense_pack_bytes(kernel, kind, groups, n, k, taps))
    _C.dense_pack(kernel, kind, groups, n, k, taps, w.data_ptr(), *strides, out.data_ptr())
    return out


def pack_info(packed: Tensor) -> dict[str, int | str]:
    """Header of packed weights."""
    return _C.pack_info(packed.data_ptr(), packed.numel())


def check_pack(op: str, name: str, packed: Tensor, outputs: int, weights: int) -> None:
    """Raise ValueError where a pack has other outputs, or another number of weights, than its arguments say.

    Kernels size their reads and writes by the pack.
    """
    info = pack_info(packed)
    n, k, taps, groups = (int(info[key]) for key in ("n", "k", "taps", "groups"))
    if (groups * n, groups * n * k * taps) != (outputs, weights):
        raise ValueError(
            f"{op}: packed {name} must hold {outputs} outputs and {weights} weights, got {groups * n} and "
            f"{groups * n * k * taps}; pack it again"
        )


# ---- linear operators -----------------------------------------------------------------------------------


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """x as rows without a copy where strides allow: (tensor, number of rows, row stride in elements)."""
    k = x.shape[-1]
    if x.dim() == 2 and (x.stride(1) == 1 or k == 1):
        return x, x.shape[0], x.stride(0)
    x = x.reshape(x.shape[:-1].numel(), k)
    if k > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.shape[0], x.stride(0)


def run_rows(op: str, run: Callable[..., None], plan: bytes, x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Run a linear operator's plan on checked x ``[..., K]``: ``[..., n]`` of ``dtype``."""
    rows, m, stride = rows_of(x)
    out = torch.empty((*x.shape[:-1], n), dtype=dtype)
    dispatch.clear_last_python(op)
    run(plan, rows.data_ptr(), DTYPE_CODE[x.dtype], m, stride, out.data_ptr(), DTYPE_CODE[dtype])
    return out


def row_count(x: Tensor) -> int:
    """How many rows x ``[..., K]`` has."""
    return math.prod(x.shape[:-1])  # Size.numel() would fix the batch of an exported graph


# ---- gradients ------------------------------------------------------------------------------------------


def activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """fp32 gradient with respect to the pre-activation."""
    g, z = grad.to(torch.float32), pre
    if activation == "none":
        return g
    if activation == "relu":
        return g * (z > 0)
    if activation == "silu":
        s = torch.sigmoid(z)
        return g * s * (1 + z * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
        return g * (cdf + z * torch.exp(-0.5 * z * z) * 0.3989422804014327)
    u = 0.7978845608028654 * (z + 0.044715 * z**3)
    t = torch.tanh(u)
    return g * (0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * z * z))


def inside_range(x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None) -> Tensor | None:
    """Where a static quantiser does not clip (the straight-through gradient passes), or None: everywhere."""
    if x_scale is None:
        return None
    q = torch.round(x.to(torch.float32) * (1.0 / x_scale))
    zp = 0 if x_zero_point is None else x_zero_point
    return (q + zp >= -128) & (q + zp <= 127)


def input_gradient(grad: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None) -> Tensor:
    """fp32 gradient with respect to the quantised x taken to x: zero where a static quantiser clips."""
    inside = inside_range(x, x_scale, x_zero_point)
    return (grad if inside is None else grad * inside).to(x.dtype)


__all__ = ["LIB", "apply_activation", "check_tail", "define", "dispatch", "tail"]

"""The arguments that end every operator's schema: how they are checked, and the codes that plans take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tautorch.reference.common import ACTIVATIONS
from tautorch.reference.quantizer import MAX_K

from .caches import Prepared

# Codes of csrc/kernels/common/dtype.h.
DTYPE_CODE: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.int32: 4,
}
ACTIVATION_CODE: dict[str, int] = {name: i for i, name in enumerate(ACTIVATIONS)}
DYNAMIC, STATIC, GIVEN, NONE = range(4)

TAIL_SCHEMA = (
    "Tensor? x_scale=None, Tensor? x_zero_point=None, bool weight_only=False, str activation='none', "
    "Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None"
)


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

    def prepared(
        self, call: tuple[Any, ...], codes: dict[str, int], keep: list[Tensor], *also: Tensor | None
    ) -> Prepared:
        """A call of a plan that was made from ``codes`` and holds ``keep``.

        ``also`` are further tensors that the kernel reads at their addresses at every call.
        """
        names = ("weight_scale", "bias", "x_scale") if codes["mode"] == GIVEN else ("weight_scale", "bias")
        live = {codes[n] for n in names} | {t.data_ptr() for t in also if t is not None}
        # Scales of rows come with their rows: another call has others.
        return Prepared(call, keep, frozenset(live), codes["mode"] != GIVEN or codes["x_scales"] == 1)


def quant_mode(x_dtype: torch.dtype, x_scale: Tensor | None, float_input: bool) -> int:
    """Code of how x becomes an operand."""
    if float_input:
        return NONE
    if x_dtype == torch.int8:
        return GIVEN
    return DYNAMIC if x_scale is None else STATIC

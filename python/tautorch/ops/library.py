"""What the operators share: registration, argument checks, the plan's tail, packing caches, gradients."""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from tautorch import _C, dispatch
from tautorch.reference.common import ACTIVATIONS, apply_activation
from tautorch.reference.quantizer import MAX_K

_are_transforms_active = torch._C._are_functorch_transforms_active


class _Library(torch.library.Library):
    """Operators whose autograd kernels refuse tangents, and to be differentiated by ``torch.func``.

    torch's own, of an operator without formula for forward mode, drops tangents: derivatives come out as
    zero. ``torch.func`` differentiates no library operator.
    """

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **kwargs: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _reverse_mode_alone(op_name.rpartition(":")[2], fn)
        super().impl(op_name, fn, dispatch_key, **kwargs)  # type: ignore[no-untyped-call]


def _reverse_mode_alone(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            for a in args:
                if not isinstance(a, Tensor):
                    continue
                if forward_ad.unpack_dual(a).tangent is not None:  # type: ignore[no-untyped-call]
                    raise NotImplementedError(
                        f"{name}: forward-mode differentiation (jvp, jacfwd) is not there; use reverse mode "
                        "(backward)"
                    )
        if _are_transforms_active() and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise NotImplementedError(
                f"{name}: torch.func's grad, vjp and jacrev are not there; use torch.autograd.grad"
            )
        return kernel(keyset, *args, **kwargs)

    return checked


LIB: Any = _Library("tautorch", "DEF")  # type: ignore[no-untyped-call]

# Codes of csrc/kernels/common/types.h.
DTYPE_CODE: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.int32: 4,
}
ACTIVATION_CODE: dict[str, int] = {name: i for i, name in enumerate(ACTIVATIONS)}
DENSE_I8, DENSE_F32, DENSE_W8, SPARSE_I8, SPARSE_F32, DEPTHWISE_I8, PAIRS_I8, GROUPED_I8 = range(8)
DYNAMIC, STATIC, GIVEN, NONE = range(4)

_recall, _run_rows = _C.recall, _C.run_rows

# The tail of every operator's schema.
TAIL_SCHEMA = (
    "Tensor? x_scale=None, Tensor? x_zero_point=None, bool weight_only=False, str activation='none', "
    "Tensor? out_scale=None, Tensor? out_zero_point=None, ScalarType? out_dtype=None"
)


_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_mark_forked)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """For checks and packing, which use torch's own functions.

    What they make while a transform of ``torch.func`` is active would be a tensor of that transform, without
    memory. In a forked child torch's pool hangs at the first of them that is worth two threads: there, one
    does it.
    """
    with torch._C._DisableFuncTorch():
        if not _forked:
            yield
            return
        with _one_thread():
            yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


#: by operator
plan_caches: dict[str, PlanCache] = {}


class Prepared(NamedTuple):
    """A call of an operator, checked and planned: what running it on another x of this kind takes."""

    #: what the operator's ``run`` takes, the plan first
    call: tuple[Any, ...]
    #: tensors that the plan points to
    keep: list[Tensor]
    #: the addresses among them that kernels read at every call
    live: frozenset[int]
    #: whether another call may use it
    lasting: bool


def define(
    name: str,
    schema: str,
    prepare: Callable[..., Prepared | Tensor],
    run: Callable[[tuple[Any, ...], Tensor], Tensor | None],
    fake: Callable[..., Tensor],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    cuda: Callable[..., Tensor] | None = None,
) -> None:
    """Register ``tautorch::name`` with its kernels, fake kernel and gradient.

    On the CPU, ``prepare`` checks a call, packs and plans (or computes it, by the reference), and ``run``
    runs what it prepared: None where x does not fit, which ``prepare`` then says.
    """
    plans = plan_caches[name] = PlanCache()
    linear = name.endswith("_linear")

    def cpu(x: Tensor, *arguments: Any) -> Tensor:
        dtype, shape = x.dtype, x.shape
        width = shape[-1] if linear and shape else -1
        call = _recall(plans.entries, dispatch.epoch, dtype, width, arguments)
        if call is not None:
            dispatch.clear_last_python(name)
            out = run(call, x)
            if out is not None:
                return out
        stamps = [(i, stamp(a)) for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        with plain_torch():
            prepared = prepare(x, *arguments)
        if isinstance(prepared, Tensor):
            dispatch.note_used(name, "reference")
            return prepared
        dispatch.clear_last_python(name)
        out = run(plans.keep((dtype, width), arguments, stamps, prepared), x)
        if out is None:
            raise RuntimeError(f"{name}: x of shape {list(shape)} passed the checks and does not fit")
        return out

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


# ---- packing --------------------------------------------------------------------------------------------


Stamp = tuple[int, int | None, bytes | None, torch.dtype | None, torch.Size | None, tuple[int, ...] | None]


def stamp(t: Tensor, live: bool = False, form: bool = True) -> Stamp | None:
    """What tells whether ``t`` is still what it was, for ``_C.recall`` and ``_C.unchanged``.

    (address, version, content, dtype, shape, stride), None for what need not be asked: the version of a
    tensor that is read at its address at every call (``live``), or of a single value, which is compared as it
    stands; dtype, shape and stride unless ``form``. Assigning to ``t.data`` changes no version: whoever keeps
    a stamp keeps ``t.detach()`` too, so that its address cannot come back as another tensor's.

    Returns:
        None for an inference tensor whose version would be needed: an edit could not be seen.
    """
    version, content = None, None
    if t.numel() == 1 and t.is_cpu:
        content = t.detach().reshape(1).view(torch.uint8).numpy().tobytes()
    elif not live:
        if t.is_inference():
            return None
        version = t._version
    return (t.data_ptr(), version, content, *((t.dtype, t.shape, t.stride()) if form else (None,) * 3))


class PackCache:
    """Packed weights of canonical tensors, kept as long as the tensors live and stay unchanged."""

    def __init__(self) -> None:
        self._entries: dict[
            int, tuple[tuple[weakref.ref[Tensor], ...], object, list[Stamp], list[Tensor], Tensor]
        ] = {}

    def peek(self, weight: Tensor, key: object, also: Sequence[Tensor | None] = ()) -> Tensor | None:
        """The pack that ``get`` would return without packing, or None."""
        tensors = (weight, *[t for t in also if t is not None])
        entry = self._entries.get(id(weight))
        if (
            entry is not None
            and entry[1] == key
            and len(entry[0]) == len(tensors)
            and all(r() is t for r, t in zip(entry[0], tensors, strict=True))
            and entry[2] == [stamp(t) for t in tensors]
        ):
            return entry[4]
        return None

    def get(
        self, weight: Tensor, key: object, pack: Callable[[], Tensor], also: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """The pack of ``weight``, and the tensors it is packed with, for ``key`` (kernel, kind, ...)."""
        found = self.peek(weight, key, also)
        if found is not None:
            return found
        tensors = (weight, *[t for t in also if t is not None])
        stamps = [stamp(t) for t in tensors]  # before they are read: an edit meanwhile then shows
        packed = pack()
        known = [s for s in stamps if s is not None]
        if len(known) == len(tensors):
            token, entries = id(weight), self._entries
            first = weakref.ref(weight, lambda _: entries.pop(token, None))
            refs = (first, *[weakref.ref(t) for t in tensors[1:]])
            entries[token] = (refs, key, known, [t.detach() for t in tensors], packed)
        return packed


class PlanCache:
    """Plans by the arguments they were made for, kept as long as the first of these, the weight, lives.

    A plan is used again for the very same tensors, at the same addresses and of the same versions. Edits
    that torch does not count (through ``t.data`` or ``t.numpy()``) are seen in scales and bias, which kernels
    read at every call; in a weight they are not, as everywhere in torch.
    """

    PER_WEIGHT = 8  # dtypes of x, activations, ...: few; what goes on changing must not pile up

    def __init__(self) -> None:
        self.entries: dict[int, list[tuple[Any, ...]]] = {}

    def keep(
        self,
        of_x: tuple[torch.dtype, int],
        arguments: tuple[Any, ...],
        stamps: Sequence[tuple[int, Stamp | None]],
        prepared: Prepared,
    ) -> tuple[Any, ...]:
        """Remember a call if it may be; what ``_C.recall`` will return.

        Args:
            of_x: dtype and width of x.
            arguments: those after x, the weight first.
            stamps: by position, of the tensors among them, taken before they were read.
        """
        weight: Tensor = arguments[0]
        # The entry must not keep its own weight alive.
        call = (*prepared.call, [t.detach() if t is weight else t for t in prepared.keep])
        known, aliases = [], []
        for i, before in stamps:
            t = arguments[i]
            live = t is not weight and t.data_ptr() in prepared.live
            known.append((i, stamp(t, live) if live else before))
            aliases.append(t.detach())  # see stamp
        if not prepared.lasting or any(s is None for _, s in known):
            return call
        entries, token = self.entries, id(weight)
        first = weakref.ref(weight, lambda _: entries.pop(token, None))
        if any(a is weight for a in arguments[1:]):
            return call  # the entry would keep its own weight alive
        entry = (dispatch.epoch, *of_x, first, (None, *arguments[1:]), tuple(known), call, aliases)
        others = [
            e for e in entries.get(token, ()) if e[0] == entry[0] and e[3]() is weight and e[5][0] == known[0]
        ]
        entries[token] = [entry, *others[: self.PER_WEIGHT - 1]]
        return call


def with_memory(tensor: Tensor) -> Tensor:
    """The tensor, which a kernel writes to; RuntimeError under a mode that makes tensors without memory."""
    if tensor.numel() and (isinstance(tensor, FakeTensor) or not tensor.data_ptr()):
        raise RuntimeError(
            f"tautorch: weights are packed and unpacked in memory, got a {type(tensor).__name__} without; "
            "do it before FakeTensorMode"
        )
    return tensor


def pack_buffer(size: int) -> Tensor:
    """uint8 ``[size]`` for packed weights; large ones start on a huge page, which packing then asks for."""
    huge = 2 << 20
    if size < huge:
        return with_memory(torch.empty(size, dtype=torch.uint8, device="cpu"))
    whole = with_memory(torch.empty(size + huge, dtype=torch.uint8, device="cpu"))
    return whole[-whole.data_ptr() % huge :][:size]


def dense_pack(
    kernel: str, kind: int, w: Tensor, groups: int, n: int, k: int, taps: int, strides: tuple[int, int, int]
) -> Tensor:
    """Packed weights (uint8) of contiguous ``w``, element (n, k, tap) at the given strides."""
    out = pack_buffer(_C.dense_pack_bytes(kernel, kind, groups, n, k, taps))
    _C.dense_pack(kernel, kind, groups, n, k, taps, w.data_ptr(), *strides, out.data_ptr())
    return out


def pack_info(packed: Tensor) -> dict[str, int | str]:
    """Header of packed weights; raises ValueError where a tensor is none, or no contiguous bytes."""
    if packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(
            f"packed weights must be contiguous uint8 [bytes], got {list(packed.shape)} with strides "
            f"{packed.stride()}; clone them"
        )
    return _C.pack_info(packed.data_ptr(), packed.numel())


def check_pack(
    op: str, name: str, packed: Tensor, outputs: int, weights: int, groups: int | None = None
) -> None:
    """Raise ValueError where a pack has other outputs, or another number of weights, than its arguments say.

    Kernels size their reads and writes by the pack.
    """
    info = pack_info(packed)
    n, k, taps, held = (int(info[key]) for key in ("n", "k", "taps", "groups"))
    if (held * n, held * n * k * taps) != (outputs, weights):
        raise ValueError(
            f"{op}: packed {name} must hold {outputs} outputs and {weights} weights, got {held * n} and "
            f"{held * n * k * taps}; pack it again"
        )
    if groups is not None and held != groups:
        raise ValueError(f"{op}: packed {name} must have {groups} groups, got {held}; pack it again")


# ---- linear operators -----------------------------------------------------------------------------------


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """x as rows without a copy where strides allow: (tensor, number of rows, row stride in elements)."""
    k, x = x.shape[-1], x.resolve_neg()
    if x.dim() == 2 and (x.stride(1) == 1 or k == 1):
        return x, x.shape[0], x.stride(0)
    x = x.reshape(x.shape[:-1].numel(), k)
    if k > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.shape[0], x.stride(0)


def linear_call(plan: bytes, k: int, n: int, x_dtype: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
    """What ``run_linear`` takes: a plan with its sizes and dtypes."""
    return plan, k, n, DTYPE_CODE[x_dtype], dtype, DTYPE_CODE[dtype]


def run_linear(run: Callable[..., None], call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    """Run a linear operator's call on x ``[..., K]`` of its dtype: ``[..., n]``; None where K is another."""
    out: Tensor | None = _run_rows(run, call, x)
    if out is not None:
        return out
    plan, k, n, code, dtype, out_code = call[:6]
    shape = x.shape
    if not shape or shape[-1] != k:
        return None
    rows, m, stride = rows_of(x)
    out = x.new_empty((*shape[:-1], n), dtype=dtype)
    run(plan, rows.data_ptr(), code, m, stride, out.data_ptr(), out_code)
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

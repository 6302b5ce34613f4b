"""``tautorch::lowrank_linear``: schema, kernels, gradient and the public function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.dispatch import Problem
from tautorch.reference import lowrank_linear as reference
from tautorch.reference.layouts import block_shape

from . import _lowrank_linear_gpu as gpu
from . import caches, gradients, packing, tails
from . import library as lib
from . import sparse_entries as entries
from .caches import Prepared
from .int8_linear import pack, unpack
from .tails import Tail

OP = "lowrank_linear"
_cache = caches.PackCache()


def problem(
    n: int, k: int, rank: int, weight_dtype: str, device: str = "cpu", residual: str | None = None
) -> Problem:
    """What a pair of factors asks of a kernel.

    ``weight_dtype`` is "int8" or "float32", ``residual`` None, "int8" (dense) or its sparse pattern.
    """
    details: dict[str, object] = {"rank": rank, "weight_dtype": weight_dtype}
    if residual is not None:
        details["residual"] = residual
    return Problem(OP, device, n, k, details)


def plan(
    down: Tensor,
    up: Tensor,
    k: int,
    down_scale: Tensor | None,
    tail: dict[str, int],
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> bytes:
    """A plan for ``_C.lowrank_linear_run``; holds addresses, so the tensors must outlive it."""

    def address(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    size = 0 if residual is None else residual.numel()
    return _C.lowrank_linear_plan(
        down.data_ptr(), down.numel(), up.data_ptr(), up.numel(), k, address(down_scale), address(residual),
        size, address(residual_scale), tail,
    )  # fmt: skip


class Residual(NamedTuple):
    """The arguments of the residual: canonical, or ``values`` packed (uint8) without indices."""

    values: Tensor | None = None
    crow_indices: Tensor | None = None
    col_indices: Tensor | None = None
    scale: Tensor | None = None
    pattern: str | None = None

    def check(self, x: Tensor, n: int, float_factors: bool, tail: Tail) -> None:
        """Check all but sparse indices, which are checked when they are packed."""
        values, k = self.values, x.shape[-1]
        if values is None:
            if any(a is not None for a in self[1:]):
                raise ValueError(f"{OP}: residual must be given with its scale, indices or pattern, got None")
            return
        indices = self.crow_indices, self.col_indices
        if self.pattern is not None:
            block_shape(self.pattern, op=OP)
        if values.dtype == torch.uint8:
            if values.dim() != 1 or any(t is not None for t in indices):
                raise ValueError(f"{OP}: packed residual must be uint8 [bytes] without indices")
        elif self.pattern is None:
            if values.dtype != torch.int8 or values.shape != (n, k) or any(t is not None for t in indices):
                raise ValueError(
                    f"{OP}: residual must be int8 [{n}, {k}], or values with indices and residual_pattern, "
                    f"got {values.dtype} {list(values.shape)}"
                )
        elif self.col_indices is None:
            raise TypeError(f"{OP}: residual_col_indices must be a tensor, got None")
        if values.dtype != torch.uint8 and (values.dtype == torch.int8) != (self.scale is not None):
            raise ValueError(
                f"{OP}: residual_scale must be given for an int8 residual and only there, got {values.dtype} "
                f"and {'no' if self.scale is None else 'a'} scale"
            )
        if self.scale is None and not float_factors:
            raise ValueError(f"{OP}: residual must be int8 with int8 factors, got {values.dtype}")
        if self.scale is not None:
            if self.scale.dtype != torch.float32 or self.scale.shape != (n,):
                raise ValueError(
                    f"{OP}: residual_scale must be float32 [{n}], got {self.scale.dtype} "
                    f"{list(self.scale.shape)}"
                )
            tails.check_k(OP, k)
        for t in (values, *indices, self.scale):
            if t is not None and t.device != x.device:
                raise ValueError(f"{OP}: residual must be on {x.device} like x, got {t.device}; move it")
        if tail.out_dtype == torch.int32:
            raise ValueError(f"{OP}: out_dtype must be floating or int8 with a residual, got torch.int32")

    def keywords(self) -> dict[str, Any]:
        """As the reference takes them."""
        names = ("", "_crow_indices", "_col_indices", "_scale", "_pattern")
        return {f"residual{name}": value for name, value in zip(names, self, strict=True)}

    def canonical(self, shape: tuple[int, int]) -> Residual:
        """The same, unpacked."""
        if self.values is None or self.values.dtype != torch.uint8:
            return self
        if self.pattern is None:
            return self._replace(values=unpack(self.values))
        values, crow, col = entries.unpack(self.values, self.pattern, shape)
        return self._replace(values=values, crow_indices=crow, col_indices=col)

    def packed(self, kernel: str, shape: tuple[int, int]) -> Tensor | None:
        """Its pack for a kernel."""
        values, pattern, col = self.values, self.pattern, self.col_indices
        if values is None:
            return None
        is_packed = values.dtype == torch.uint8
        if is_packed:
            info = packing.pack_info(values)
            if (info["n"], info["k"]) != shape:
                raise ValueError(
                    f"{OP}: packed residual must hold a weight of {list(shape)}, got "
                    f"{[info['n'], info['k']]}; pack it again"
                )
            if info["kernel"] == kernel:
                return values

        def fresh() -> Tensor:
            if pattern is None:
                return pack(unpack(values) if is_packed else values, kernel=kernel)
            if is_packed:
                return entries.repack(values, kernel, pattern, shape, 1, op=OP)
            assert col is not None
            return entries.pack(values, self.crow_indices, col, pattern, shape, kernel=kernel, op=OP)

        return _cache.get(values, ("residual", kernel, pattern, shape), fresh, (self.crow_indices, col))

    def gradient(self, g: Tensor, k: int) -> Tensor:
        """fp32 gradient with respect to the x that it multiplies, from that of its product."""
        values, n = self.values, g.shape[-1]
        assert values is not None
        if self.pattern is None:
            dense = torch.ops.tautorch.unpack_linear(values, n, k)
        else:
            dense = torch.ops.tautorch.sparse_to_dense(
                values, self.crow_indices, self.col_indices, self.pattern, (n, k), 1
            )
        return (g if self.scale is None else g * self.scale) @ dense  # type: ignore[no-any-return]


def _check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    out_features: int | None = None,
    rank: int | None = None,
    *rest: Any,
) -> tuple[tuple[int, int], Residual, Tail]:
    """``(N, r)``, the residual and the tail of a call, checked."""
    residual, tail = Residual(*rest[:5]), Tail(*rest[5:])
    n, rank = _sizes(down, up, out_features, rank)
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must be [..., K], got a scalar")
    if tail.weight_only:
        raise ValueError(f"{OP}: weight_only must be False: int8 factors quantise x, float ones do not")
    k = x.shape[-1]
    shapes = {"down": (rank, k), "up": (n, rank)}
    for name, factor, scale in (("down", down, down_scale), ("up", up, up_scale)):
        if factor.dtype == torch.uint8:
            if factor.dim() != 1 or down.dtype != up.dtype:
                raise ValueError(f"{OP}: {name} must be packed as the other factor is, got {factor.dtype}")
        elif factor.dtype != torch.int8 and not factor.dtype.is_floating_point:
            raise TypeError(f"{OP}: {name} must be int8 or floating, got {factor.dtype}")
        elif (factor.dtype == torch.int8) != (scale is not None) or (down.dtype == torch.int8) != (
            up.dtype == torch.int8
        ):
            raise ValueError(
                f"{OP}: {name}_scale must be given where both factors are int8 and only there, got {name} "
                f"{factor.dtype} and {name}_scale {'None' if scale is None else 'a tensor'}"
            )
        elif factor.shape != shapes[name]:
            what = "[r, K] with K from x" if name == "down" else "[N, r] with r from down"
            raise ValueError(f"{OP}: {name} must be {what}, {list(shapes[name])}, got {list(factor.shape)}")
        if factor.device != x.device:
            raise ValueError(f"{OP}: {name} must be on {x.device} like x, got {factor.device}; move it there")
    if down_scale is not None:
        if down_scale.dtype != torch.float32 or down_scale.shape != (rank,):
            raise ValueError(
                f"{OP}: down_scale must be float32 [{rank}] as the rank is {rank}, got {down_scale.dtype} "
                f"{list(down_scale.shape)}"
            )
        if down_scale.device != x.device:
            raise ValueError(f"{OP}: down_scale must be on {x.device} like x, got {down_scale.device}")
        tails.check_k(OP, k)
        tails.check_k(OP, rank)
    residual.check(x, n, up_scale is None, tail)
    tails.check_tail(
        OP,
        x,
        n=n,
        weight_scale=up_scale,
        bias=bias,
        rows=lib.row_count(x),
        float_weight=up_scale is None,
        **tail._asdict(),
    )
    return (n, rank), residual, tail


def _sizes(down: Tensor, up: Tensor, out_features: int | None, rank: int | None) -> tuple[int, int]:
    """``(N, r)``: of canonical factors, or as told for packed ones."""
    for name, factor in (("down", down), ("up", up)):
        if factor.dtype != torch.uint8 and factor.dim() != 2:
            raise ValueError(f"{OP}: {name} must have 2 dimensions, got {list(factor.shape)}")
    if up.dtype != torch.uint8 and down.dtype != torch.uint8:
        return up.shape[0], down.shape[0]
    if out_features is None or rank is None:
        raise ValueError(f"{OP}: out_features and rank must be given for packed factors, got None")
    return out_features, rank


def _prepare(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    *rest: Any,
) -> Prepared | Tensor:
    (n, r), residual, tail = _check(x, down, up, bias, down_scale, up_scale, *rest)
    k = x.shape[-1]
    floats = up_scale is None
    kernel = dispatch.choose(problem(n, k, r, "float32" if floats else "int8"))
    if kernel == "reference":
        down, up = (unpack(w) if w.dtype == torch.uint8 else w for w in (down, up))
        arguments = tail._asdict()
        del arguments["weight_only"]
        return reference.lowrank_linear(
            x, down, up, bias, down_scale=down_scale, up_scale=up_scale, **arguments,
            **residual.canonical((n, k)).keywords(),
        )  # fmt: skip
    packs = [_packed(w, kernel) for w in (down, up)]
    packing.check_pack(OP, "down", packs[0], r, r * k)
    packing.check_pack(OP, "up", packs[1], n, n * r)
    codes, keep = tail.codes(x, up_scale, bias, floats)
    if down_scale is not None:
        down_scale = down_scale.detach().contiguous()
        keep.append(down_scale)
    added, added_scale = residual.packed(kernel, (n, k)), residual.scale
    if added is not None:
        packs.append(added)
    if added_scale is not None:
        added_scale = added_scale.detach().contiguous()
        keep.append(added_scale)
    made = plan(packs[0], packs[1], k, down_scale, codes, added, added_scale)
    call = lib.linear_call(made, k, n, x.dtype, tail.dtype(x))
    return tail.prepared(call, codes, [*packs, *keep], down_scale, added_scale)


def _run(call: tuple[Any, ...], x: Tensor) -> Tensor | None:
    return lib.run_linear(_C.lowrank_linear_run, call, x)


def _packed(factor: Tensor, kernel: str) -> Tensor:
    if factor.dtype != torch.uint8:
        return _cache.get(factor, kernel, lambda: pack(factor, kernel=kernel))
    if packing.pack_info(factor)["kernel"] == kernel:
        return factor
    return _cache.get(factor, kernel, lambda: pack(unpack(factor), kernel=kernel))


def _cuda(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    *rest: Any,
) -> Tensor:
    _, residual, tail = _check(x, down, up, bias, down_scale, up_scale, *rest)
    return gpu.run(x, down, up, bias, (down_scale, up_scale), residual, tail)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    (n, _), _, tail = _check(x, *arguments)
    return x.new_empty((*x.shape[:-1], n), dtype=tail.dtype(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, down, up, bias, down_scale, up_scale, ctx.n, ctx.rank, *rest = inputs
    residual, tail = Residual(*rest[:5]), Tail(*rest[5:])
    ctx.activation, ctx.pattern = tail.activation, residual.pattern
    ctx.save_for_backward(
        x, down, up, bias, down_scale, up_scale, *residual[:4], tail.x_scale, tail.x_zero_point
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, bias, down_scale, up_scale, *added, x_scale, x_zero_point = ctx.saved_tensors
    residual = Residual(added[0], added[1], added[2], added[3], ctx.pattern)
    g = grad.to(torch.float32)
    if ctx.activation != "none":
        pre = torch.ops.tautorch.lowrank_linear(
            x, down, up, bias, down_scale, up_scale, ctx.n, ctx.rank, *residual, x_scale, x_zero_point,
            out_dtype=torch.float32,
        )  # fmt: skip
        g = gradients.activation_grad(grad, pre, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        n, rank = _sizes(down, up, ctx.n, ctx.rank)
        unpacked = torch.ops.tautorch.unpack_linear
        inner = (g if up_scale is None else g * up_scale) @ unpacked(up, n, rank)
        inner = inner if down_scale is None else inner * down_scale
        k = x.shape[-1]
        to_x = inner @ unpacked(down, rank, k)
        if residual.values is not None:
            to_x = to_x + residual.gradient(g, k)
        grad_x = gradients.input_gradient(to_x, x, x_scale, x_zero_point)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = g.reshape(-1, g.shape[-1]).sum(0).to(bias.dtype)
    return (grad_x, None, None, grad_bias, *[None] * 16)


# Packed factors do not know their sizes in a graph: out_features and rank say them.
lib.define(
    OP,
    "(Tensor x, Tensor down, Tensor up, Tensor? bias=None, Tensor? down_scale=None, Tensor? up_scale=None, "
    "SymInt? out_features=None, SymInt? rank=None, Tensor? residual=None, "
    "Tensor? residual_crow_indices=None, Tensor? residual_col_indices=None, Tensor? residual_scale=None, "
    "str? residual_pattern=None, " + tails.TAIL_SCHEMA + ") -> Tensor",
    _prepare,
    _run,
    _fake,
    _setup,
    _backward,
    _cuda,
)


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_crow_indices: Tensor | None = None,
    residual_col_indices: Tensor | None = None,
    residual_pattern: str | None = None,
) -> Tensor:
    """Linear layer whose weight is ``up @ down``: ``y = act(up @ (down @ x) + bias)`` in one call.

    With a residual: ``y = act(up @ (down @ x) + residual @ x + bias)``.

    The intermediate ``[..., r]`` stays in the kernel, in fp32; with int8 factors it is quantised per row.
    On CUDA, bfloat16 and float16 x multiply float factors rounded to x's dtype, which the intermediate has
    too; sums are fp32.

    Args:
        x: ``[..., K]`` float32, bfloat16, float16; with int8 factors also int8 (of scale ``x_scale``).
        down: ``[r, K]`` floating, or int8 with ``down_scale``.
        up: ``[N, r]`` floating, or int8 with ``up_scale``.
        bias: floating ``[N]``.
        down_scale: float32 ``[r]``.
        up_scale: float32 ``[N]``.
        residual: int8 ``[N, K]`` with ``residual_scale`` float32 ``[N]``, or, with ``residual_pattern``, the
            values of a sparse layout with ``residual_crow_indices`` and ``residual_col_indices`` (see
            ``sparse_linear``): int8 with a scale, or with float factors also floating. x is quantised for an
            int8 one as for int8 factors; with float factors, dynamically.

    The other arguments, the result and its dtype are those of ``int8_linear``; ``out_dtype=torch.int32``
    gives the accumulators of the second product.

    Low-rank layers: Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient
    Evaluation", NeurIPS 2014, arXiv:1404.0736.

    Raises:
        TypeError, ValueError: before anything runs, naming the argument, what was expected and what came.
    """
    y: Tensor = torch.ops.tautorch.lowrank_linear(
        x, down, up, bias, down_scale, up_scale, None, None, residual, residual_crow_indices,
        residual_col_indices, residual_scale, residual_pattern, x_scale, x_zero_point, False, activation,
        out_scale, out_zero_point, out_dtype,
    )  # fmt: skip
    return y

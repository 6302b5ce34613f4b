# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What the Triton kernels of several operators call on the device: rounding, epilogue, order of tiles.

Integers are exact because every float operation before rounding is one IEEE operation: ``div_rn``, products
that no addition can contract with (the launchers pass ``enable_fp_fusion=False``), and rounding to nearest
even by adding and subtracting 1.5 * 2**23, which is exact for the clamped range. libdevice's ``rint`` would
do the same but does not exist in the interpreter.

Kernels do not specialise on M, their number of rows: one that ``warmup`` compiled serves other batches of its
tile, whether 16 divides them or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}

# tl.constexpr globals, because a jitted function may read no plain ones.
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23
_TINY = tl.constexpr(2.0**-100)
_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@triton.jit
def _rint(v):
    """Nearest integer, ties to even, of |v| <= 2**21."""
    return (v + _ROUND) - _ROUND


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    """fp32 activation by its number in ACTIVATIONS. relu keeps NaN."""
    if ACTIVATION == 1:
        y = tl.where(y < 0.0, 0.0, y)
    if ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == 3:
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u))
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    if ACTIVATION == 4:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _store(
    y,
    y_ptrs,
    mask,
    out_scale_ptr,
    out_zero_point_ptr,
    REQUANTIZE: tl.constexpr,
    HAS_OUT_ZERO_POINT: tl.constexpr,
):
    """fp32 tile -> output dtype; to int8 through out_scale where REQUANTIZE. NaN becomes the zero point."""
    if REQUANTIZE:
        v = y * tl.div_rn(1.0, tl.load(out_scale_ptr))
        v = tl.where(v != v, 0.0, v)
        r = _rint(tl.minimum(tl.maximum(v, -512.0), 512.0)).to(tl.int32)
        if HAS_OUT_ZERO_POINT:
            r += tl.load(out_zero_point_ptr)
        r = tl.minimum(tl.maximum(r, -128), 127)
        tl.store(y_ptrs, r.to(tl.int8), mask=mask)
    else:
        tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's tile: GROUP_M row tiles share each column tile while it is in L2."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % (GROUP_M * tiles_n)) % size_m
    pid_n = (pid % (GROUP_M * tiles_n)) // size_m
    return pid_m, pid_n

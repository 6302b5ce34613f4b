"""Quantisers that a model trains through: what they give out lies on the grid, gradients pass straight.

Straight-through estimator: Bengio et al. 2013, arXiv:1308.3432. Learned steps: LSQ, Esser et al. 2020,
arXiv:1902.08153. The values are those of the compiled layers, integer by integer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tautorch.reference.quantizer import QMAX, QMIN, quantize_rows, quantize_samples

# Steps are kept from zero, where the grid would be lost.
_LEAST = 2.0**-100


class _Round(torch.autograd.Function):
    """(clamp(rint(scaled) + zero, low, high) - zero) * step; `scaled` is x over the step, as kernels have it.

    dx: 1 inside the range, 0 outside. dstep: rint(x / s) - x / s inside, the end outside (LSQ, equation 3),
    summed over `dims`, times `gain`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        zero: Tensor | float,
        low: int,
        high: int,
        reciprocal: bool,
        dims: tuple[int, ...],
        gain: float,
    ) -> Tensor:
        scaled = x * (1.0 / step) if reciprocal else x / step
        q = torch.clamp(torch.round(scaled) + zero, low, high) - zero
        # high * step, divided by step again, may come out a rounding above high: 7.0000005 is inside.
        slack = (high - low) * 2.0**-22
        inside = (scaled + zero >= low - slack) & (scaled + zero <= high + slack)
        ctx.save_for_backward(inside, torch.where(inside, q - scaled, q))
        ctx.dims, ctx.gain, ctx.shape = dims, gain, step.shape
        return q * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inside, slope = ctx.saved_tensors
        dx = grad * inside if ctx.needs_input_grad[0] else None
        dstep = None
        if ctx.needs_input_grad[1]:
            product = (grad * slope).double()
            total = product.sum(ctx.dims, keepdim=True) if ctx.dims else product
            dstep = (total * ctx.gain).to(grad.dtype).reshape(ctx.shape)
        return dx, dstep, None, None, None, None, None, None


class FakeQuantWeight(nn.Module):
    """Parametrisation of a weight [O, ...]: integers in [-top, top], top = 2^(bits - 1) - 1, times steps [O].

    `step` is a float32 parameter, learned by LSQ with the gradient scaled by 1 / sqrt(n top), n the weights
    of a channel. `mask`, bool of the weight's shape, keeps pruned weights zero and their gradient too.
    """

    mask: Tensor | None
    #: For methods that need a plain weight.
    remedy = "prune and factorise before quantize.prepare_qat, or call quantize.finalize first"

    def __init__(self, bits: int, step: Tensor, mask: Tensor | None = None, learned: bool = True) -> None:
        super().__init__()
        self.bits, self.top = bits, 2 ** (bits - 1) - 1
        self.step = nn.Parameter(step.detach().float().clone(), requires_grad=learned)
        self.register_buffer("mask", mask)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}mask")
        if self.mask is None and given is not None:  # of a model that was pruned before it was prepared
            self.mask = torch.empty_like(given, device=self.step.device)
        elif given is None and f"{prefix}step" in state_dict:  # of one that was not
            self.mask = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def scale(self) -> Tensor:
        """The steps as used: positive, float32 [O]."""
        return self.step.abs().clamp(min=_LEAST)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid, in the dtype it has."""
        n = max(1, math.prod(weight.shape[1:]))
        steps = self.scale().reshape(-1, *[1] * (weight.dim() - 1))
        dims = tuple(range(1, weight.dim()))
        masked = weight if self.mask is None else weight * self.mask
        on_grid: Tensor = _Round.apply(  # type: ignore[no-untyped-call]
            masked.float(), steps, 0.0, -self.top, self.top, False, dims, 1 / math.sqrt(n * self.top)
        )
        return on_grid.to(weight.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, learned={self.step.requires_grad}, masked={self.mask is not None}"


class _Dynamic(torch.autograd.Function):
    """x through int8 with a step for each row (or sample) and back; the gradient passes, nothing clips."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, samples: bool) -> Tensor:
        q, scale = quantize_samples(x) if samples else quantize_rows(x)
        shape = (-1, *[1] * (x.dim() - 1)) if samples else (*x.shape[:-1], 1)
        return (q.float() * scale.reshape(shape)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class FakeQuantInput(nn.Module):
    """Input of a layer through int8 and back, as the compiled layer has it.

    Dynamic (`scale` None): a symmetric step for each row, for a convolution each sample. Static: a learned
    float32 `step` and a fixed integer `zero_point`; LSQ's gradient scale takes n = the values of a row
    (a sample).
    """

    zero_point: Tensor

    def __init__(
        self, samples: bool, scale: float | None = None, zero_point: int = 0, learned: bool = True
    ) -> None:
        super().__init__()
        self.samples = samples
        self.step = None if scale is None else nn.Parameter(torch.tensor([scale]), requires_grad=learned)
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def scale(self) -> Tensor | None:
        """The static step as used, float32 [1]; None where it is dynamic."""
        return None if self.step is None else self.step.abs().clamp(min=_LEAST)

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid, in the dtype it has."""
        steps = self.scale()
        if steps is None:
            # a convolution of one image [I, H, W] is one sample
            single = self.samples and x.dim() == 3
            out: Tensor = _Dynamic.apply(x[None] if single else x, self.samples)  # type: ignore[no-untyped-call]
            return out[0] if single else out
        n = max(1, x[0].numel() if self.samples and x.dim() == 4 else x.shape[-1])
        on_grid: Tensor = _Round.apply(  # type: ignore[no-untyped-call]
            x.float(), steps, self.zero_point.float(), QMIN, QMAX, True, tuple(range(x.dim())),
            1 / math.sqrt(n * QMAX),
        )  # fmt: skip
        return on_grid.to(x.dtype)

    def extra_repr(self) -> str:
        return "dynamic" if self.step is None else f"static, zero_point={int(self.zero_point)}"

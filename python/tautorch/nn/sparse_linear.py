"""``SparseLinear``: a linear layer whose weight is stored and multiplied sparse."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops.sparse_linear import OP, plan, problem

from .factors import weight_dtype_of
from .linear import LinearModule
from .packed import Canonical
from .sparse import SparseModule
from .tail import grid_of, output_tensors, static_tensors


class SparseLinear(SparseModule, LinearModule):
    """``y = activation(q(x) @ weight.T * scales + bias)``, the weight ``[out, in]`` sparse.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``; ``dtype`` is ignored.
        pattern: "unstructured", "2:4", "4x1", "16x16", "32x32" or "64x64". On CPUs int8 2:4 has
            a kernel of its own for AVX-512; elsewhere, and where many of its strips of 32 outputs
            would be empty, it runs as a dense weight.
        nnz: stored blocks (unstructured: weights); ignored for 2:4, where it follows from the shape.
        weight_dtype: ``torch.int8``, or ``torch.float32`` values that meet x in fp32.
        quant: with int8 values "dynamic" (x quantised per row) or "static" (by ``x_scale``,
            ``x_zero_point``).
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused.
        requantize: the output is int8, by ``out_scale`` and ``out_zero_point``, for a layer that takes int8.

    Buffers: ``values``, ``crow_indices``, ``col_indices`` (see ``tautorch.reference.layouts``); int8:
    ``weight_scale`` float32 ``[out]``; static: ``x_scale`` float32 and ``x_zero_point`` int32, one value
    each; ``requantize``: ``out_scale`` and ``out_zero_point``, likewise.
    """

    op: ClassVar[str] = OP
    run: ClassVar[Any] = _C.sparse_linear_run

    values = Canonical()
    crow_indices = Canonical()
    col_indices = Canonical()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: str = "4x1",
        nnz: int = 0,
        weight_dtype: torch.dtype | str = torch.int8,
        quant: str = "dynamic",
        activation: str = "none",
        requantize: bool = False,
    ) -> None:
        LinearModule.__init__(
            self, in_features, out_features, bias, device, quant=quant, quants=("dynamic", "static"),
            activation=activation, requantize=requantize,
        )  # fmt: skip
        self._check_values(weight_dtype, in_features)
        self._empty_layout(pattern, nnz, (out_features, in_features), 1, device)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        *,
        pattern: str = "4x1",
        mask: Tensor | None = None,
        weight_dtype: torch.dtype | str = torch.int8,
        quant: str = "dynamic",
        x_scale: Tensor | float | None = None,
        x_zero_point: Tensor | int | None = None,
        weight_scale: Tensor | None = None,
        activation: str = "none",
        out_scale: Tensor | float | None = None,
        out_zero_point: Tensor | int | None = None,
    ) -> SparseLinear:
        """Store a float layer's weight where the mask is True, int8 with one scale per output, or float32.

        Args:
            module: the layer; left as it is.
            mask: bool of the weight's shape, True = kept; None keeps the non-zeros, for block patterns
                every block that holds one.
            pattern, weight_dtype, quant, activation: see the class.
            x_scale, x_zero_point: for ``quant="static"``, from ``tautorch.quantize.calibrate``; None takes
                what ``tautorch.quantize`` left on the layer.
            weight_scale: ``[out]``, the int8 steps of each output; None takes the layer's ``weight_scale``
                buffer, which ``tautorch.quantize`` leaves, while the weight lies on those steps, else
                amax / 127.
            out_scale, out_zero_point: of the next layer's input; the output is int8 then.

        Raises:
            TypeError: not an ``nn.Linear``, or a mask that is not bool.
            ValueError: a mask of another shape or off its pattern (naming the first offending block), NaN or
                Inf in weight or bias, or scales that do not fit ``quant``.
        """
        arguments = cls._arguments(module)
        dtype = weight_dtype_of(OP, weight_dtype)
        if weight_scale is None:
            weight_scale = grid_of(module)
        layout, scale = cls._sparsify(module.weight, mask, pattern, 1, dtype, weight_scale)
        new = cls(
            **arguments,
            pattern=pattern,
            nnz=layout["values"].shape[0],
            weight_dtype=dtype,
            quant=quant,
            activation=activation,
            requantize=out_scale is not None,
        )
        device = module.weight.device
        x_scale, x_zero_point = static_tensors(OP, quant, x_scale, x_zero_point, device, module)
        out = output_tensors(OP, out_scale, out_zero_point, device)
        new._take(
            module.bias, **layout, weight_scale=scale, x_scale=x_scale, x_zero_point=x_zero_point,
            out_scale=out[0], out_zero_point=out[1],
        )  # fmt: skip
        return new.train(module.training)

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _problem(self) -> dispatch.Problem:
        dtype = str(self.weight_dtype).removeprefix("torch.")
        return problem(self.out_features, self.in_features, self.pattern, dtype, self.weight_device().type)

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        return plan(packed, self.in_features, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        buffers, bias = self._buffers, self._own_bias()  # by name nn.Module takes 0.3 us each
        values, crow, col = self._operands()
        y: Tensor = torch.ops.tautorch.sparse_linear(
            x, values, crow, col, buffers["weight_scale"], bias, self.pattern,
            self.out_features, buffers["x_scale"], buffers["x_zero_point"], False, self.activation,
            buffers["out_scale"], buffers["out_zero_point"],
        )  # fmt: skip
        return y

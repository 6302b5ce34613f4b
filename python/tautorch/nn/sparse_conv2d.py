"""``SparseConv2d``: a 2-D convolution whose weight is stored and multiplied sparse."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops.geometry import Pair
from tautorch.ops.sparse_conv2d import OP, plan, problem

from .convolution import ConvModule, Padding
from .factors import weight_dtype_of
from .packed import Canonical
from .sparse import SparseModule
from .tail import grid_of, output_tensors, static_tensors


class SparseConv2d(SparseModule, ConvModule):
    """``y = activation(conv2d(q(x), weight) * scales + bias)``, the weight ``[O, I/groups*kh*kw]`` sparse.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as ``nn.Conv2d``; ``padding_mode`` must be "zeros"; ``dtype`` is ignored.
        pattern: "unstructured", "2:4", "4x1", "16x16", "32x32" or "64x64". Blocks do not cross groups. On
            CPUs 2:4 runs as a dense weight: none has a unit for it.
        nnz: stored blocks (unstructured: weights); ignored for 2:4, where it follows from the shape.
        weight_dtype: ``torch.int8``, or ``torch.float32`` values that meet x in fp32.
        quant: with int8 values "dynamic" (x quantised per sample) or "static" (by ``x_scale``,
            ``x_zero_point``).
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu", fused.
        requantize: the output is int8, by ``out_scale`` and ``out_zero_point``, for a layer that takes int8.

    Buffers: ``values``, ``crow_indices``, ``col_indices`` (see ``tautorch.reference.layouts``); int8:
    ``weight_scale`` float32 ``[O]``; static: ``x_scale``, ``x_zero_point``;
    ``requantize``: ``out_scale`` and ``out_zero_point``, likewise.
    """

    op: ClassVar[str] = OP
    run: ClassVar[Any] = staticmethod(_C.sparse_conv2d_run)

    values = Canonical()
    crow_indices = Canonical()
    col_indices = Canonical()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
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
        ConvModule.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, quant=quant, quants=("dynamic", "static"), activation=activation,
            requantize=requantize,
        )  # fmt: skip
        self._check_values(weight_dtype, self.geometry.k)
        self._empty_layout(pattern, nnz, self.geometry.weight_shape, groups, device)

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d,
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
    ) -> SparseConv2d:
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
            TypeError: not an ``nn.Conv2d``, or a mask that is not bool.
            ValueError: a mask off its pattern (naming the first offending block), NaN or Inf in weight or
                bias, scales that do not fit ``quant``, or padding that is not zeros on both sides alike.
        """
        arguments = cls._arguments(module)
        dtype = weight_dtype_of(OP, weight_dtype)
        if weight_scale is None:
            weight_scale = grid_of(module)
        layout, scale = cls._sparsify(module.weight, mask, pattern, module.groups, dtype, weight_scale)
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
        int8 = self.weight_dtype == torch.int8
        return problem(self.geometry, self.pattern, int8, device=self.weight_device().type)

    def _plan(self, packed: Tensor, codes: dict[str, int]) -> bytes:
        return plan(packed, self.geometry, codes)

    def _through_op(self, x: Tensor) -> Tensor:
        buffers, bias = self._buffers, self._own_bias()  # by name nn.Module takes 0.3 us each
        values, crow, col = self._operands()
        y: Tensor = torch.ops.tautorch.sparse_conv2d(
            x, values, crow, col, buffers["weight_scale"], bias, self.pattern, *self.geometry.operands(),
            buffers["x_scale"], buffers["x_zero_point"], False, self.activation, buffers["out_scale"],
            buffers["out_zero_point"],
        )  # fmt: skip
        return y

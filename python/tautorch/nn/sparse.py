"""What the sparse layers share: the canonical layout's buffers, and their way through a pack and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tautorch.ops import sparse_entries as sparse
from tautorch.ops import tails
from tautorch.reference.layouts import (
    block_cols,
    block_rows,
    block_shape,
    check_layout,
    decode,
    encode,
    index_dtype,
    matrix_shape,
)
from tautorch.reference.quantizer import quantize_weight

from .factors import weight_dtype_of
from .layer import LayerModule


def _stored(
    values: Tensor, crow: Tensor | None, col: Tensor, pattern: str, shape: Sequence[int], groups: int
) -> Tensor:
    """bool of ``shape``: what a layout stores, zeros too."""
    ones = torch.ones_like(values, dtype=torch.int8)
    return decode(ones, crow, col, pattern, shape, groups, check=False).bool()


class SparseModule(LayerModule):
    """A layer with ``values``, ``crow_indices`` and ``col_indices`` of ``reference/layouts``."""

    fixed_names = frozenset({"pattern", "nnz", "weight_dtype"})
    packed_names: ClassVar[tuple[str, ...]] = ("values", "crow_indices", "col_indices")
    fp32_names: ClassVar[tuple[str, ...]] = ("values", "weight_scale", "bias", "x_scale", "out_scale")

    pattern: str
    nnz: int
    weight_dtype: torch.dtype
    weight_scale: Tensor | None

    def _check_values(self, weight_dtype: torch.dtype | str, k: int) -> None:
        """Set the values' dtype, for inner products of length ``k``."""
        self.weight_dtype = weight_dtype_of(self.op, weight_dtype)
        if self.weight_dtype == torch.int8:
            tails.check_k(self.op, k)
        elif self.quant != "dynamic":
            raise ValueError(f'{self.op}: quant must be "dynamic" for float32 values, got {self.quant!r}')

    def _empty_layout(
        self,
        pattern: str,
        nnz: int,
        shape: Sequence[int],
        groups: int,
        device: torch.device | str | None,
    ) -> None:
        """Register the buffers of a weight of ``shape``, all zero."""
        block_shape(pattern, op=self.op)
        self.pattern, self._shape, self._groups = pattern, tuple(shape), groups
        rows, cols = matrix_shape(shape, groups, op=self.op)
        n_rows, n_cols = block_rows(rows, pattern, groups), block_cols(cols, pattern)
        crow = None
        if pattern == "2:4":
            self.nnz = rows
            self.packed_names = ("values", "col_indices")  # type: ignore[misc]
            col = torch.full(
                (rows, n_cols // 2), 0b0100_0100, dtype=torch.uint8, device=device
            )  # places 0, 1
        else:
            if not 0 <= nnz <= n_rows * n_cols:
                raise ValueError(f"{self.op}: nnz must be in 0..{n_rows * n_cols} blocks, got {nnz}")
            self.nnz = nnz
            # any valid layout of so many blocks: the first ones
            col = torch.arange(nnz, dtype=torch.int32, device=device) % n_cols
            col = col.to(index_dtype(n_cols - 1))
            crow = (torch.arange(n_rows + 1, device=device) * n_cols).clamp(max=nnz).to(index_dtype(nnz))
        self._buffers["values"] = torch.zeros(self._values_shape(), dtype=self.weight_dtype, device=device)
        self._buffers["crow_indices"] = crow
        self._buffers["col_indices"] = col
        int8 = self.weight_dtype == torch.int8
        self.register_buffer(
            "weight_scale", torch.ones(rows, dtype=torch.float32, device=device) if int8 else None
        )

    @classmethod
    def _sparsify(
        cls,
        weight: Tensor,
        mask: Tensor | None,
        pattern: str,
        groups: int,
        dtype: torch.dtype,
        steps: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The layout of a float weight by buffer name (crow_indices left out for 2:4), and its scales."""
        weight = weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{cls.op}: weight must be finite, got NaN or Inf; mend the float layer first")
        shape, scale = weight.shape, None
        layout = encode(weight.to(torch.float32), mask, pattern, groups, op=cls.op)
        dense = decode(*layout, pattern, shape, groups, check=False)
        if dtype == torch.int8:
            dense, scale = quantize_weight(dense, steps, op=cls.op)
        # Where the weight is packed dense, only non-zeros are stored: the pack then gives all indices back.
        kept = None if sparse.packs_dense(pattern, shape) else _stored(*layout, pattern, shape, groups)
        values, crow, col = encode(dense, kept, pattern, groups, op=cls.op)
        named = {"values": values, "crow_indices": crow, "col_indices": col}
        return {name: tensor for name, tensor in named.items() if tensor is not None}, scale

    def dense_weight(self) -> Tensor:
        """The float32 weight that this layer stands for, 0 where nothing is stored."""
        buffers = self._state()
        packed = buffers["packed"]
        if packed is not None:
            weight = sparse.unpack_dense(packed, self._shape)
        else:
            weight = decode(*self._layout(buffers), self.pattern, self._shape, self._groups, op=self.op)
        weight = weight.to(torch.float32)
        if self.weight_scale is None:
            return weight
        return weight * self.weight_scale.reshape(-1, *[1] * (weight.dim() - 1))

    def density(self) -> float:
        """Stored weights (with the fillers of blocks) over all."""
        rows, cols = matrix_shape(self._shape, self._groups)
        if self.pattern == "2:4":
            return 0.5
        height, width = block_shape(self.pattern)
        return min(1.0, self.nnz * height * width / (rows * cols))

    def get_config(self) -> dict[str, Any]:
        dtype = str(self.weight_dtype).removeprefix("torch.")
        return {**super().get_config(), "pattern": self.pattern, "nnz": self.nnz, "weight_dtype": dtype}

    def _format_repr(self) -> str:
        dtype = str(self.weight_dtype).removeprefix("torch.")
        text = f"pattern={self.pattern}, density={self.density():.3g}, weight_dtype={dtype}"
        return text if self._float_input() else f"{text}, quant={self.quant}"

    # ---- PackedModule -----------------------------------------------------------------------------------

    def _layout(self, buffers: dict[str, Tensor | None]) -> tuple[Tensor, Tensor | None, Tensor]:
        """The canonical ones of the buffers, in the canonical state."""
        values, crow, col = (buffers[n] for n in ("values", "crow_indices", "col_indices"))
        assert values is not None and col is not None
        return values, crow, col

    def _operands(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the torch op takes: the canonical buffers, or the pack."""
        buffers = self._state()
        values, crow, col = (buffers[n] for n in ("values", "crow_indices", "col_indices"))
        return (values, crow, col) if values is not None else (buffers["packed"], None, None)

    def _float_input(self) -> bool:
        return self.weight_dtype != torch.int8

    def _pack(self, kernel: str) -> Tensor:
        layout = self._layout(self._buffers)
        where = (self.pattern, self._shape, self._groups)
        packed = sparse.pack(*layout, *where, kernel=kernel, op=self.op)
        names = ("values", "col_indices") if layout[1] is None else SparseModule.packed_names
        if sparse.packs_dense(self.pattern, self._shape) and not sparse.dense_keeps_indices(*layout, *where):
            names = ("values",)  # the indices stay in their buffers
        self.packed_names = names  # type: ignore[misc]
        return packed

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        where = (self.pattern, self._shape, self._groups)
        col = self._buffers["col_indices"]
        if col is not None and "col_indices" not in self.packed_names:
            dense = sparse.unpack_dense(packed, self._shape)
            crow = self._buffers["crow_indices"]
            return {"values": sparse.values_at(dense, crow, col, self.pattern, self._groups)}
        values, crow, col = sparse.unpack(packed, *where)
        fresh = {"values": values, "col_indices": col, "crow_indices": crow}
        return {name: tensor for name, tensor in fresh.items() if tensor is not None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unpack_()
        names = [name for name in SparseModule.packed_names if self._buffers[name] is not None]
        given = {name: state_dict.get(prefix + name) for name in names}
        # Before anything is copied: a copy to narrower indices would wrap around. What is missing or of
        # another shape, torch reports.
        if all(
            isinstance(tensor, Tensor) and not tensor.is_meta and tensor.shape == self._buffers[name].shape  # type: ignore[union-attr]
            for name, tensor in given.items()
        ):
            try:
                self._check_given(given["values"], given.get("crow_indices"), given["col_indices"])
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_given(self, values: Any, crow: Any, col: Any) -> None:
        if values.dtype.is_floating_point != self.weight_dtype.is_floating_point:
            raise TypeError(f"{self.op}: values must be {self.weight_dtype}, got {values.dtype}")
        check_layout(values, crow, col, self.pattern, self._shape, self._groups, op=self.op)

    def _values_shape(self) -> tuple[int, ...]:
        if self.pattern == "2:4":
            rows, cols = matrix_shape(self._shape, self._groups)
            return rows, block_cols(cols, self.pattern) * 2
        return (self.nnz,) if self.pattern == "unstructured" else (self.nnz, *block_shape(self.pattern))

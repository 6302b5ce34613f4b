"""Triton's interpreter with the numpy of today."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def let_scalars_be_indices() -> None:
    """Triton 3.6 holds scalars as one-element arrays, which numpy 2.4 no longer turns into an int."""
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index

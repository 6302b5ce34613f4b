"""Attention weights, also where a fused kernel never shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tautorch.distill.arguments import at_least_single
from tautorch.distill.features import Features

#: In the place of minus infinity, whose gradients are NaN; e to the power of it is 0 in every type.
HIDDEN = -1e30


def log_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """log softmax(Q K^T * scale + mask): the weights of `F.scaled_dot_product_attention` before dropout.

    query [..., H, L, D] and key [..., H', S, D] give [..., H, L, S] in at least float32, differentiable.
    Hidden positions are `HIDDEN`; all of a row that attends to nothing (the kernels give it weights of 0).
    """
    query, key = at_least_single(query), at_least_single(key)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        if type(attn_mask) is not Tensor:
            raise TypeError(
                f"AttentionTransfer: attn_mask must be a plain tensor, got {type(attn_mask).__name__}"
            )
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return log_of_scores(scores)


def log_of_scores(scores: Tensor) -> Tensor:
    """log softmax over the last dim, with `HIDDEN` where a score is minus infinity."""
    hidden = scores == -math.inf
    return F.log_softmax(scores.masked_fill(hidden, HIDDEN), -1).masked_fill(hidden, HIDDEN)


class _Watch(TorchFunctionMode):
    """While active, gives `see` the log weights of every attention that is computed."""

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        elif func in _SOFTMAX:
            self._softmax(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            # Run torch's own function with its attention in sight: with a mode active it would only
            # hand itself to the mode again, and with none it calls the fused kernel unseen.
            return _watched_multi_head(self)(*args, **kwargs)
        return func(*args, **kwargs)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self._see("fused", log_weights(query, key, attn_mask, is_causal, scale, enable_gqa))

    def _softmax(self, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> None:
        if dim in (-1, input.dim() - 1) and input.dim() >= 3:
            self._see("softmax", log_of_scores(at_least_single(input)))


_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


def _watched_multi_head(watch: _Watch) -> Callable[..., Any]:
    original: Any = F.multi_head_attention_forward

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        watch._fused(*args, **kwargs)
        return F.scaled_dot_product_attention(*args, **kwargs)

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        watch._softmax(scores, *args, **kwargs)
        return F.softmax(scores, *args, **kwargs)

    world = {
        **original.__globals__,
        "has_torch_function": lambda tensors: False,
        "scaled_dot_product_attention": attend,
        "softmax": softmax,
    }
    copy = FunctionType(original.__code__, world, original.__name__, original.__defaults__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


class AttentionMaps(Features):
    """The attention weights that named modules compute: logarithms, [B, H, L, S].

    A module is an `nn.MultiheadAttention`, or any that calls `F.scaled_dot_product_attention` or a softmax
    over the last dim of 3-D or 4-D scores exactly once in its forward pass. 3-D weights are taken for one
    head, [B, L, S].
    """

    def __init__(self, op: str, pairs: list[tuple[str, str]]) -> None:
        super().__init__(op, pairs, "attention weights")

    @contextmanager
    def watching(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """As `Features.watching`; torch's fast path for attention, which runs no Python, is off meanwhile."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with super().watching(teacher, student):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    @contextmanager
    def _watch(self, layer: nn.Module, role: str, name: str) -> Iterator[None]:
        seen: dict[str, list[Tensor]] = {}
        active: list[_Watch] = []

        def before(module: nn.Module, args: Any) -> None:
            seen.update(fused=[], softmax=[])
            active.append(_Watch(lambda kind, weights: seen[kind].append(weights)))
            active[-1].__enter__()  # type: ignore[no-untyped-call]

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if active:
                active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            maps = seen["fused"] or seen["softmax"]
            if len(maps) != 1:
                raise ValueError(
                    f"{self._op}: the {role}'s {name!r} must compute one attention in its forward pass, got "
                    f"{len(maps)}; name the module around a single one"
                )
            heads = layer.num_heads if isinstance(layer, nn.MultiheadAttention) else 1
            shape = maps[0].shape
            self.keep(role, name, maps[0].reshape(-1, heads, *shape[1:]) if len(shape) == 3 else maps[0])
            seen.clear()

        handles = [
            layer.register_forward_pre_hook(before),
            layer.register_forward_hook(after, always_call=True),
            layer.register_forward_hook(keep),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

"""One question: may a module call its kernel directly, or must it go through the torch operator?"""

from __future__ import annotations

import torch
from torch import Tensor

_C = torch._C
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_autocast = torch.is_autocast_enabled
_tracing = _C._get_tracing_state
_dispatch_modes = _C._len_torch_dispatch_stack
_function_modes = _C._len_torch_function_stack
_functorch = _C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad


def autocast_input(x: Tensor) -> Tensor:
    """x as ``F.linear`` and ``F.conv2d`` take it under autocast."""
    device = x.device.type
    if device in ("cpu", "cuda") and x.is_floating_point() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def plain(x: Tensor, bias: Tensor | None) -> bool:
    """True in plain eager CPU inference: nothing but the numbers depends on the call.

    False while compiling, exporting, tracing or under autocast, a dispatch or function mode, a functorch
    transform (its tensors look plain), forward-mode or reverse-mode differentiation, and for meta tensors,
    other devices and tensor subclasses.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not _is_compiling()
        and not (_is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and _tracing() is None
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _functorch() is None
        and _forward_ad._current_level < 0
        and not _autocast("cpu")
    )

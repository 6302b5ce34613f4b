"""One question: may a module call its kernel directly, or must it go through the torch operator?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch

is_compiling = torch.compiler.is_compiling

# What ``_C.eager_call`` asks x and torch. In plain eager CPU inference nothing but the numbers depends on the
# call. Not so while tracing, under autocast, a dispatch or function mode, a functorch transform (its tensors
# look plain), forward-mode or reverse-mode differentiation, nor for meta tensors, other devices and tensor
# subclasses. The same on CUDA.
_torch = torch._C
STATE = (
    Tensor,
    (
        _torch._get_tracing_state,
        _torch._len_torch_dispatch_stack,
        _torch._len_torch_function_stack,
        _torch._functorch.peek_interpreter_stack,
        _torch._is_any_autocast_enabled,
    ),
    torch.is_grad_enabled,
    vars(torch.autograd.forward_ad),
    vars(dispatch),
    "is_cpu",
    "is_cuda",
    getattr(_torch, "_cuda_isCurrentStreamCapturing", None),  # what a graph captures goes the way round
)

# What ``_C.direct_call`` asks besides: whether calling a module is calling its forward and nothing else.
_module = nn.modules.module
USUAL = (
    nn.Module,
    nn.Module.__call__,
    nn.Module._call_impl,
    (
        _module._global_forward_hooks,
        _module._global_forward_pre_hooks,
        _module._global_backward_hooks,
        _module._global_backward_pre_hooks,
    ),
)


def plain(x: Tensor, parameters: dict[str, Any]) -> bool:
    """Whether x and a module's own ``bias`` make such a call, outside of ``torch.compile``."""
    return not is_compiling() and _C.where_plain(STATE, parameters, x) == 1


def plain_on_cuda(x: Tensor, parameters: dict[str, Any]) -> bool:
    """The same for a CUDA device."""
    return not is_compiling() and _C.where_plain(STATE, parameters, x) == 2


def autocast_input(x: Tensor) -> Tensor:
    """x as ``F.linear`` and ``F.conv2d`` take it under autocast."""
    device = x.device.type
    if device in ("cpu", "cuda") and x.is_floating_point() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x

"""Feeding a model: what a batch may be, and running calibration batches without leaving a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tautorch import distributed

#: One input of a model: its only argument, its positional arguments, or its keyword arguments.
Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Batches = Iterable[Batch]
_M = TypeVar("_M", bound=nn.Module)


def to_device(value: Any, device: torch.device | str | None) -> Any:
    """Move every tensor in nested tuples, lists and mappings to `device` (None: leave where they are)."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value


def own_copy(value: Any) -> Any:
    """`value` with copies of its tensors, for whoever may change them in place; other parts as they are.

    A tensor that is there twice (query, key and value) is one in the copy too.
    """
    made: dict[int, Tensor] = {}

    def copy(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        if id(part) not in made:
            made[id(part)] = _copy(part)
        return made[id(part)]

    return pytree.tree_map(copy, value)


def _copy(value: Tensor) -> Tensor:
    """A tensor's copy with the same strides, overlapping ones (expand) included."""
    value = value.detach()
    if type(value) is not Tensor or value.is_nested or value.layout != torch.strided or not value.numel():
        return value.clone()
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    flat = value.as_strided((extent,), (1,), value.storage_offset()).clone()
    return flat.as_strided(value.shape, value.stride())


def call_model(op: str, model: Callable[..., Any], batch: Any, *, own: bool = True) -> Any:
    """Call `model` with one batch: a tensor, a tuple of positional or a mapping of keyword arguments.

    The model is given copies of the tensors, so that the batch stays as it is where a model changes its input
    in place; not `own`, the tensors themselves.

    Raises TypeError for anything else; `op` names the caller in the message.
    """
    if isinstance(batch, (Tensor, Mapping, tuple)) and own:
        batch = own_copy(batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    raise TypeError(
        f"{op}: a batch must be a tensor, a tuple of positional or a dict of keyword arguments, "
        f"got {type(batch).__name__}; from a DataLoader of (input, target) pass `[x for x, _ in loader]`"
    )


def opened(value: Any) -> Any:
    """What a model returned, with unknown mappings, dataclasses and other objects as dicts of what they hold.

    An object that comes again is None then, as objects may refer to each other, and so is what lies 20 deep.
    """
    seen: dict[int, object] = {}
    depth = 0

    def inside(leaf: Any) -> Any:
        nonlocal depth
        if isinstance(leaf, (Tensor, nn.Module, type, ModuleType)):
            return leaf
        slots = [n for cls in type(leaf).__mro__ for n in _names(vars(cls).get("__slots__", ()))]
        held = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
        parts = {n: getattr(leaf, n) for n in slots if hasattr(leaf, n)} | dict(held)
        if not parts:
            return leaf
        if id(leaf) in seen or depth == 20:
            return None
        seen[id(leaf)] = leaf
        depth += 1
        try:
            return {type(leaf).__qualname__: pytree.tree_map(inside, parts)}
        finally:
            depth -= 1

    return pytree.tree_map(inside, value)


def output_tensors(value: Any) -> list[Tensor]:
    """The tensors in what a model returned, those in dataclasses and other objects too."""
    return [t for t in pytree.tree_leaves(opened(value)) if isinstance(t, Tensor)]


def squared_change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Squares of the change and of what was, summed; logits that a mask took away (-inf) stay out of both.

    The change is infinite if what was not finite is anything else now, or the other way round.
    """
    finite = before.isfinite()
    x = before.double()
    was = float(x[finite].square().sum())
    if not torch.equal(after.isfinite(), finite):
        return math.inf, was
    y = after.double()
    if not torch.equal(*(t[~finite].nan_to_num(2.0, 1.0, -1.0) for t in (x, y))):
        return math.inf, was
    return float((y - x)[finite].square().sum()), was


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return [slots] if isinstance(slots, str) else slots


def model_device(model: nn.Module) -> torch.device | None:
    """The device of the first parameter or buffer, None for a model without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


@contextmanager
def training_modes_kept(model: nn.Module) -> Iterator[None]:
    """Put each module's `training` flag back on leaving, one by one (a frozen batch norm stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class KeptBuffers:
    """A model's buffers as they are now, to be put back after runs.

    Not those of packed layers, which change form when they run, and of those over 64 MB not what a run writes
    into them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_Kept(m) for m in model.modules() if not hasattr(m, "packed_names") and m._buffers]

    def put_back(self) -> None:
        """Make them so again: a cache that a run filled, a counter it advanced."""
        with torch.no_grad():
            for module in self._modules:
                module.put_back()


class _Kept:
    """A module's buffers, and its plain attributes that may say of what size they are."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._buffers = module, dict(module._buffers)
        own = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        self._plain = {name: v for name, v in own.items() if isinstance(v, _PLAIN) or v is None}
        self._copies = {
            name: (_version(tensor), tensor.clone())
            for name, tensor in self._buffers.items()
            if tensor is not None
            and not isinstance(tensor, nn.UninitializedBuffer)
            and tensor.numel() * tensor.element_size() <= _COPIED_BYTES
        }

    def put_back(self) -> None:
        slots = self._module._buffers
        bound = [name for name, tensor in self._buffers.items() if slots.get(name) is not tensor]
        if bound:
            slots.update(self._buffers)
            vars(self._module).update(self._plain)
        for name, (version, copy) in self._copies.items():
            tensor = self._buffers[name]
            assert tensor is not None
            counted = _version(tensor) != version or version == _UNKNOWN
            if counted or _changed_uncounted(tensor, copy):
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(copy)
                self._copies[name] = (_version(tensor), copy)


_OF_MODULES = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, Tensor)
_COPIED_BYTES = 64 << 20
_UNKNOWN = -1  # inference tensors count no changes


_OF_STATISTICS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _changed_uncounted(tensor: Tensor, copy: Tensor) -> bool:
    """As `F.batch_norm` changes running statistics in training."""
    if type(tensor) is not Tensor or tensor.dtype not in _OF_STATISTICS or tensor.layout != torch.strided:
        return False
    if tensor.is_meta or tensor.is_nested:
        return False
    return not torch.equal(tensor.nan_to_num(), copy.nan_to_num())


def _version(tensor: Tensor) -> int:
    return _UNKNOWN if tensor.is_inference() else tensor._version


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[KeptBuffers]:
    """Eval mode without gradients inside; training flags and buffers as before afterwards."""
    kept = KeptBuffers(model)
    with training_modes_kept(model), torch.no_grad():
        model.eval()
        try:
            yield kept
        finally:
            kept.put_back()


def example_batches(op: str, example_inputs: Any, device: torch.device | None) -> list[Any]:
    """One batch or a list of them, as a list on `device`; TypeError for another kind, ValueError for none."""
    if isinstance(example_inputs, (Tensor, tuple, Mapping)):
        return [to_device(example_inputs, device)]
    if not isinstance(example_inputs, Sequence):
        raise TypeError(
            f"{op}: example_inputs must be a batch or a list of batches, got {type(example_inputs).__name__}"
        )
    if not example_inputs:
        raise ValueError(f"{op}: example_inputs must hold at least one batch, got an empty list")
    return [to_device(batch, device) for batch in example_inputs]


def check_batches(op: str, batches: Any) -> None:
    """TypeError unless `batches` is an iterable that is not itself one batch."""
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{op}: calibration must be an iterable of batches, got {type(batches).__name__}; "
            "put a single batch in a list: `[batch]`"
        )


def run_calibration(op: str, model: nn.Module, batches: Batches) -> int:
    """Run the model over `batches` in eval mode without gradients; returns the number of batches.

    The training flags and buffers are put back, batches are moved to the model's device. Raises ValueError
    when `batches` is empty, TypeError when it is not an iterable of batches.
    """
    check_batches(op, batches)
    device = model_device(model)
    count = 0
    with left_as_it_is(model):
        for batch in batches:
            call_model(op, model, to_device(batch, device))
            count += 1
    distributed.reshard(model)
    if count == 0:
        raise ValueError(f"{op}: calibration must hold at least one batch, got none (a spent generator?)")
    return count


def refuse_transformed(op: str, name: str) -> None:
    """ValueError inside torch.vmap and the like: what a layer gets there cannot be read or kept."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            f"{op}: layer {name!r} must not run inside torch.vmap or another transform of torch.func, where "
            "its inputs cannot be seen; leave it out"
        )


def observe_inputs(
    op: str,
    model: nn.Module,
    layers: Mapping[str, _M],
    batches: Batches,
    see: Callable[[str, _M, Tensor], None],
) -> set[str]:
    """Run `batches` in eval mode and call `see(name, layer, input)` for each call of each layer.

    Returns the names of the layers that ran, on any rank where there are several; each runs batches of its
    own. The hooks are gone afterwards, whatever happens. Raises ValueError for an empty calibration and for
    an input that holds NaN or Inf, naming the layer, and RuntimeError where that happened on another rank.
    """
    seen: set[str] = set()

    def watch(name: str, layer: _M) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            refuse_transformed(op, name)
            x: Tensor = (args[0] if args else kwargs["input"]).detach()
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"{op}: calibration must give finite inputs, got NaN or Inf at layer {name!r}"
                )
            if x.numel():
                see(name, layer, x)
                seen.add(name)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name, layer), with_kwargs=True)
        for name, layer in layers.items()
    ]
    failure: Exception | None = None
    try:
        run_calibration(op, model, batches)
    except Exception as error:
        failure = error
    finally:
        for handle in handles:
            handle.remove()
    distributed.raise_together(failure)
    return distributed.union(seen)


def require_seen(op: str, layers: Iterable[str], seen: set[str], named: bool) -> None:
    """ValueError for the first of `layers` that calibration never ran; unless `named`, only if none ran."""
    for name in layers:
        if name not in seen and (named or not seen):
            raise ValueError(f"{op}: calibration must reach layer {name!r}; leave it out of layers=[...]")

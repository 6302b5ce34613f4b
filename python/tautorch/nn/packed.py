"""The base of all replacement layers: canonical weights outside, packed weights inside.

A module is in one of two states. *Canonical*: the buffers of its ``state_dict`` hold the weight. *Packed*:
those buffers are None and ``packed`` holds the kernel's layout; the memory is held once. Packing happens at
the first call; reading ``module.weight``, ``.to``, ``load_state_dict``, copying and pickling give the
canonical form back, and the next call packs again. A tensor read this way stays connected: edited in place
after a later call, it is packed anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tautorch import _C, dispatch
from tautorch.ops._gpu_product import Launch
from tautorch.ops.caches import Stamp, stamp
from tautorch.ops.library import plain_torch

_unchanged = _C.unchanged
_MOST_ROW_COUNTS = 512  # that a module on CUDA remembers its launches for

# Held while a module changes state. One for all: packing is rare, and a lock of its own could not be copied.
_lock = threading.RLock()


def _fresh_lock() -> None:
    global _lock
    _lock = threading.RLock()


# Another thread may have held it when the process forked.
os.register_at_fork(after_in_child=_fresh_lock)


class Canonical:
    """Descriptor of a buffer that exists in the canonical state: reading it leaves the packed state."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: PackedModule | None, owner: type) -> Any:
        if module is None:
            return self
        if module._buffers.get("packed") is not None:
            module.unpack_()
        return module._buffers[self.name]

    def __set__(self, module: PackedModule, value: Tensor) -> None:
        raise AttributeError(f"{self.name} is a buffer")  # nn.Module.__setattr__ comes first


class PackedModule(nn.Module):
    """See the module's docstring. Subclasses name their canonical buffers and implement the two hooks."""

    op: ClassVar[str]
    #: canonical buffers that packing replaces
    packed_names: ClassVar[tuple[str, ...]]
    #: buffers and parameters that stay fp32 through ``.half()`` and the like
    fp32_names: ClassVar[tuple[str, ...]] = ("weight_scale", "bias", "x_scale", "out_scale")

    #: what weights, plans and the torch op are made by, beside those of the classes above
    fixed_names: ClassVar[frozenset[str]] = frozenset()
    _fixed: ClassVar[frozenset[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fixed = frozenset().union(*(vars(base).get("fixed_names", ()) for base in cls.__mro__))

    _made: Tensor | None
    _epoch: int
    _keep: list[Tensor]
    _plans: dict[Any, Any]
    _gpu_calls: dict[Any, Any]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", None, persistent=False)
        self._reset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__ and value != self.__dict__[name]:
            raise AttributeError(
                f"{self.op}: {name} is fixed when the layer is made, got {value!r} for "
                f"{getattr(self, name)!r}; make another one, of get_config() or the float layer"
            )
        super().__setattr__(name, value)

    # ---- hooks ------------------------------------------------------------------------------------------

    def _pack(self, kernel: str) -> Tensor:
        """Packed weights (uint8) of the canonical buffers for ``kernel``."""
        raise NotImplementedError

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The canonical buffers of packed weights."""
        raise NotImplementedError

    def _make_plans(self, packed: Tensor) -> None:
        """Set up what ``forward`` needs; append to ``self._keep`` the tensors whose addresses it uses."""
        raise NotImplementedError

    def _problem(self) -> dispatch.Problem:
        """What this layer asks of a kernel."""
        raise NotImplementedError

    # ---- states -----------------------------------------------------------------------------------------

    def _reset(self) -> None:
        d = self.__dict__
        d["_made"] = None  # what this layer packed
        d["_epoch"] = -1  # of dispatch when the plans were made; -1: none
        d["_keep"] = []  # tensors whose addresses the plans hold
        d["_seen"] = []  # (store, name, value) of all that the plans were made from
        d["_stamps"] = []  # (tensor, stamp) of each of these
        d["_handed"] = {}  # canonical tensors given out: name -> (weak reference, version)
        d["_plans"] = {}  # what forward runs on the CPU, by x's dtype
        d["_gpu_calls"] = {}  # and on CUDA

    def ready(self) -> bool:
        """Whether the plans made earlier still hold."""
        d = self.__dict__
        return (
            d["_epoch"] == dispatch.epoch
            and _unchanged(d["_seen"], d["_stamps"])
            and (not d["_handed"] or self._handed_unchanged())
        )

    def _handed_unchanged(self) -> bool:
        for name, (ref, version) in list(self._handed.items()):
            tensor = ref()
            if tensor is None:
                self._handed.pop(name, None)
            elif not tensor.is_inference() and tensor._version != version:
                return False
        return True

    def prepare(self) -> None:
        """Pack if need be and make the plans: what the first call does. Safe to call at any time."""
        with _lock, plain_torch():
            if not self.ready():
                self._prepare()

    def _prepare(self, kernel: str | None = None) -> None:
        """``kernel``: another one than ``dispatch`` chooses for this layer, where it is part of another."""
        self._epoch = -1  # other threads wait for the lock
        buffers = self._buffers
        problem = self._problem()
        kernel = dispatch.choose(problem) if kernel is None else kernel
        if kernel == "reference" or problem.device != "cpu":  # GPU kernels read the canonical weight
            return
        if self._lent(buffers):
            return
        dispatch.clear_last_python(self.op)
        edited = not self._handed_unchanged()
        present = [n for n in self.packed_names if buffers[n] is not None]
        if edited or (present and buffers["packed"] is not None):
            self.unpack_()
        if buffers["packed"] is None or self._kernel_of_pack() != kernel:
            self.unpack_()
            for name in self.packed_names:
                self._check_finite(name)
            with torch.inference_mode(False):  # an inference tensor's edits would not show
                made = self._pack(kernel)
            handed = {}
            # First the one, then the others: see _state.
            self.__dict__["_made"] = buffers["packed"] = made
            for name in self.packed_names:
                tensor = buffers[name]
                if tensor is not None:
                    version = -1 if tensor.is_inference() else tensor._version
                    handed[name] = (weakref.ref(tensor), version)
                del tensor
                buffers[name] = None
            self._handed = handed
        packed = buffers["packed"]
        assert packed is not None
        self._keep, self._plans, self._gpu_calls = [packed], {}, {}
        for name in self.fp32_names:
            self._check_finite(name)
        self._make_plans(packed)
        # Whoever holds a plan holds what it points to, even while another thread unpacks.
        self._plans = {dtype: (*call, self._keep) for dtype, call in self._plans.items()}
        self._watch()
        self._epoch = dispatch.epoch

    def _watch_on(self, device: torch.device) -> object:
        """Before a launch there: watch the tensors, so that an edit while it is prepared shows.

        Returns:
            What ``_remember`` takes; None for tensors elsewhere, or whose edits could not be seen.
        """
        if not self.ready():
            with _lock:
                if not self.ready():
                    tensors = [t for t in self._tensors() if t is not None]
                    if any(t.is_inference() or t.device != device for t in tensors):
                        return None
                    self._epoch = -1  # other threads go the way round
                    self._keep, self._plans, self._gpu_calls = [], {}, {}
                    self._watch()
                    self._epoch = dispatch.epoch
        return self._stamps

    def _remember(self, launch: Launch, watched: object) -> None:
        """Have the next call on CUDA with as many rows repeat this one, if nothing changed since."""
        with _lock:
            if self._stamps is not watched or not self.ready():
                return
            call = self._gpu_calls.get(launch.x_dtype)
            if call is None or (call[6], call[7]) != (launch.device, launch.stream):
                call = self._gpu_calls[launch.x_dtype] = launch.call()
            known = call[10]
            if len(known) >= _MOST_ROW_COUNTS:
                known.clear()
            known[launch.rows] = launch.known

    def _tensors(self) -> list[Tensor | None]:
        return [*self._buffers.values(), *self._parameters.values()]

    def _watch(self) -> None:
        """Remember what the plans were made from."""
        addresses = {t.data_ptr() for t in self._keep}
        seen: list[tuple[dict[str, Any], str, object]] = []
        stamps: list[tuple[Tensor, Stamp]] = []
        for store in (self._buffers, self._parameters):
            for name, tensor in store.items():
                if tensor is None:
                    if name == "bias" or name in self.packed_names:  # until someone puts a tensor there
                        seen.append((store, name, None))
                    continue
                seen.append((store, name, tensor))
                # Kernels read vectors at their address; single values and copies were read once.
                live = tensor.data_ptr() in addresses
                known = stamp(tensor, live or tensor.is_inference(), form=False)
                assert known is not None
                stamps.append((tensor, known))
        self._seen, self._stamps = seen, stamps

    def _state(self) -> dict[str, Tensor | None]:
        """The buffers at one moment, as a thread needs them that does not hold the lock.

        Another thread may change them between two look-ups. At any moment the first of ``packed_names`` is
        there and so are the others, or the pack is.
        """
        buffers = self._buffers.copy()
        if self._lent(buffers):
            buffers.update(dict.fromkeys(self.packed_names))
        return buffers

    def _lent(self, buffers: dict[str, Tensor | None]) -> bool:
        """Whether somebody else's pack stands beside this layer's own weight.

        torch.func.functional_call puts it there, of named_buffers() or stack_module_state(), and takes it
        away again: the call runs it and the layer's own state stays.
        """
        packed = buffers["packed"]
        return packed is not None and packed is not self._made and buffers[self.packed_names[0]] is not None

    def unpack_(self) -> None:
        """Go to the canonical state."""
        with _lock, plain_torch():
            self._to_canonical()

    def _to_canonical(self) -> None:
        buffers = self._buffers
        packed = buffers["packed"]
        if packed is None or self._lent(buffers):
            return
        fresh = self._unpack(packed)
        # The other way round than packing takes them away: see _state.
        for name in reversed(self.packed_names):
            handed = self._handed.get(name)
            tensor = handed[0]() if handed else None
            if buffers[name] is None:  # else the user has put a tensor there
                buffers[name] = fresh[name] if tensor is None else tensor
        buffers["packed"] = None
        self._reset()

    def _kernel_of_pack(self) -> str:
        raise NotImplementedError

    def _check_finite(self, name: str) -> None:
        tensor = self._buffers.get(name)
        if tensor is None:
            tensor = self._parameters.get(name)
        if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{self.op}: {name} must be finite, got NaN or Inf; mend the float layer first")

    # ---- nn.Module's own ways in ------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self.unpack_()
        # detach(): nn.Module changes parameters through .data, under the same object
        before = {n: t.detach() for n in self.fp32_names if (t := self._fp32(n)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._fp32(name)
            if new is not None and new.dtype != old.dtype:
                new.data = old.to(new.device)
        self._reset()
        return self

    def _fp32(self, name: str) -> Tensor | None:
        tensor = self._parameters.get(name)
        return tensor if tensor is not None else self._buffers.get(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with _lock:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            packed = self._buffers["packed"]
            if packed is not None:
                with plain_torch():
                    fresh = self._unpack(packed)
                for name in self.packed_names:
                    destination[prefix + name] = fresh[name]

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
        fits = True
        # Before anything is copied: torch would round a float checkpoint's weights to integers.
        for name in self.packed_names:
            own, given = self._buffers[name], state_dict.get(prefix + name)
            if (
                own is not None
                and isinstance(given, Tensor)
                and own.is_floating_point() != given.is_floating_point()
            ):
                fits = False
                error_msgs.append(
                    f"{prefix}{name} of {type(self).__name__} must be {own.dtype}, got {given.dtype}; load a "
                    "float checkpoint into the float model, before it is converted"
                )
        if fits:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        with _lock:
            self.unpack_()
            # Before whoever copies or pickles comes to the buffers, another thread may pack them again.
            state = {**self.__dict__, "_buffers": self._buffers.copy()}
        for name in ("_made", "_epoch", "_keep", "_seen", "_stamps", "_handed", "_plans", "_gpu_calls"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        # torch.export and torch.func.functional_call list a model with its duplicates before they trace it
        # or swap its tensors; their graphs take canonical weights, not the kernel's layout.
        if not remove_duplicate:
            with _lock:
                self.unpack_()
                # torch.export 2.13 counts buffers that are None when it numbers the graph's inputs.
                self._buffers = dict(sorted(self._buffers.items(), key=lambda item: item[1] is None))
                self._reset()
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def _replicate_for_data_parallel(self) -> PackedModule:
        replica: PackedModule = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._reset()  # its tensors are others
        return replica

    # ---- what users ask ---------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Keyword arguments (JSON-able) that make an empty twin, into which ``load_state_dict`` fits."""
        raise NotImplementedError

    def to_float(self) -> nn.Module:
        """A plain layer with the weight this one stands for."""
        raise NotImplementedError

    def kernel(self) -> str:
        """Name of the kernel that runs this layer."""
        return dispatch.choose(self._problem())

    def packed_bytes(self) -> int:
        """Bytes of the packed weights; packs if that has not happened."""
        if not self.ready():
            self.prepare()
        packed = self._buffers["packed"]
        if packed is not None:
            return packed.numel()
        held = [self._buffers[name] for name in self.packed_names]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def refusals(self) -> dict[str, str | None]:
        """For each kernel of this layer's operator and device: None, or why it cannot run it."""
        return dispatch.refusals(self._problem())

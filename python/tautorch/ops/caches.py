"""What is kept between calls: packed weights and plans, by the tensors they were made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tautorch import dispatch

Stamp = tuple[int, int | None, bytes | None, torch.dtype | None, torch.Size | None, tuple[int, ...] | None]


def stamp(t: Tensor, live: bool = False, form: bool = True) -> Stamp | None:
    """What tells whether ``t`` is still what it was, for ``_C.recall`` and ``_C.unchanged``.

    (address, version, content, dtype, shape, stride), None for what need not be asked: the version of a
    tensor that is read at its address at every call (``live``), or of a single value, which is compared as it
    stands; dtype, shape and stride unless ``form``. Assigning to ``t.data`` changes no version: whoever keeps
    a stamp keeps ``t.detach()`` too, so that its address cannot come back as another tensor's.

    Returns:
        None for an inference tensor whose version would be needed: an edit could not be seen.
    """
    version, content = None, None
    if t.numel() == 1 and t.is_cpu:
        content = t.detach().reshape(1).view(torch.uint8).numpy().tobytes()
    elif not live:
        if t.is_inference():
            return None
        version = t._version
    return (t.data_ptr(), version, content, *((t.dtype, t.shape, t.stride()) if form else (None,) * 3))


class PackCache:
    """Packed weights of canonical tensors, kept as long as the tensors live and stay unchanged."""

    def __init__(self) -> None:
        self._entries: dict[
            int, tuple[tuple[weakref.ref[Tensor], ...], object, list[Stamp], list[Tensor], Tensor]
        ] = {}

    def peek(self, weight: Tensor, key: object, also: Sequence[Tensor | None] = ()) -> Tensor | None:
        """The pack that ``get`` would return without packing, or None."""
        tensors = (weight, *[t for t in also if t is not None])
        entry = self._entries.get(id(weight))
        if (
            entry is not None
            and entry[1] == key
            and len(entry[0]) == len(tensors)
            and all(r() is t for r, t in zip(entry[0], tensors, strict=True))
            and entry[2] == [stamp(t) for t in tensors]
        ):
            return entry[4]
        return None

    def get(
        self, weight: Tensor, key: object, pack: Callable[[], Tensor], also: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """The pack of ``weight``, and the tensors it is packed with, for ``key`` (kernel, kind, ...)."""
        found = self.peek(weight, key, also)
        if found is not None:
            return found
        tensors = (weight, *[t for t in also if t is not None])
        stamps = [stamp(t) for t in tensors]  # before they are read: an edit meanwhile then shows
        packed = pack()
        known = [s for s in stamps if s is not None]
        if len(known) == len(tensors):
            token, entries = id(weight), self._entries
            first = weakref.ref(weight, lambda _: entries.pop(token, None))
            refs = (first, *[weakref.ref(t) for t in tensors[1:]])
            entries[token] = (refs, key, known, [t.detach() for t in tensors], packed)
        return packed


class Prepared(NamedTuple):
    """A call of an operator, checked and planned: what running it on another x of this kind takes."""

    #: what the operator's ``run`` takes, the plan first
    call: tuple[Any, ...]
    #: tensors that the plan points to
    keep: list[Tensor]
    #: the addresses among them that kernels read at every call
    live: frozenset[int]
    #: whether another call may use it
    lasting: bool


class PlanCache:
    """Plans by the arguments they were made for, kept as long as the first of these, the weight, lives.

    A plan is used again for the very same tensors, at the same addresses and of the same versions. Edits
    that torch does not count (through ``t.data`` or ``t.numpy()``) are seen in scales and bias, which kernels
    read at every call; in a weight they are not, as everywhere in torch.
    """

    PER_WEIGHT = 8  # dtypes of x, activations, ...: few; what goes on changing must not pile up

    def __init__(self) -> None:
        self.entries: dict[int, list[tuple[Any, ...]]] = {}

    def keep(
        self,
        of_x: tuple[torch.dtype, int],
        arguments: tuple[Any, ...],
        stamps: Sequence[tuple[int, Stamp | None]],
        prepared: Prepared,
    ) -> tuple[Any, ...]:
        """Remember a call if it may be; what ``_C.recall`` will return.

        Args:
            of_x: dtype and width of x.
            arguments: those after x, the weight first.
            stamps: by position, of the tensors among them, taken before they were read.
        """
        weight: Tensor = arguments[0]
        # The entry must not keep its own weight alive.
        call = (*prepared.call, [t.detach() if t is weight else t for t in prepared.keep])
        known, aliases = [], []
        for i, before in stamps:
            t = arguments[i]
            live = t is not weight and t.data_ptr() in prepared.live
            known.append((i, stamp(t, live) if live else before))
            aliases.append(t.detach())  # see stamp
        if not prepared.lasting or any(s is None for _, s in known):
            return call
        entries, token = self.entries, id(weight)
        first = weakref.ref(weight, lambda _: entries.pop(token, None))
        if any(a is weight for a in arguments[1:]):
            return call  # the entry would keep its own weight alive
        entry = (dispatch.epoch, *of_x, first, (None, *arguments[1:]), tuple(known), call, aliases)
        others = [
            e for e in entries.get(token, ()) if e[0] == entry[0] and e[3]() is weight and e[5][0] == known[0]
        ]
        entries[token] = [entry, *others[: self.PER_WEIGHT - 1]]
        return call

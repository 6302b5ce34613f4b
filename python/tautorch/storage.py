"""One file for a compressed model (safetensors, or smaller and entropy-coded), and the way back.

The file holds the canonical tensors of `state_dict` and, as JSON, the model's structure:
which layers were replaced by which, the shapes that pruning and factorising left, tied tensors, versions and
checksums. Loading needs the architecture's code and never runs code from the file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from tautorch import storage_coded, storage_file, storage_report, storage_structure
from tautorch._version import __version__
from tautorch.nn import MODULES
from tautorch.nn.sparse import SparseModule
from tautorch.reference.layouts import check_layout
from tautorch.storage_file import DTYPES, CheckpointError, Entry, bad
from tautorch.storage_report import SizeReport
from tautorch.storage_structure import Rebuilt, StructureError

__all__ = ["CheckpointError", "SizeReport", "describe", "load", "save", "size_report"]

_FORMAT = 1
_PACKED = frozenset(MODULES.values())
_SAVABLE = frozenset(DTYPES.values())
_FORMATS = {4: ("channels_last", torch.channels_last), 5: ("channels_last_3d", torch.channels_last_3d)}


def save(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    info: Mapping[str, Any] | None = None,
    encode: Literal["entropy"] | None = None,
) -> None:
    """Writes `model` to one file; `load` is the way back.

    encode: None writes a safetensors file. "entropy" a smaller one of tautorch's own, lossless, with pruned
        positions, clustered values, int8 weights and leftovers entropy-coded (Deep Compression, Han et al.
        2016, arXiv:1510.00149; needs `pip install "tautorch[coding]"`). Prune and cluster the weights first:
        plain float weights shrink by 10 to 20 % only. `size_report` tells what each stage gives.

    Of `torch.compile(model)`, `nn.DataParallel(model)` and `DistributedDataParallel(model)` the model inside
    is saved. A wrapper further in is part of the architecture, which `load` then needs wrapped alike.

    A model in training by `quantize.prepare_qat`, `quantize.cluster` or `prune.L0Gates` loads only into a
    skeleton that went through the same call: finalize it first.

    The file is complete or not there: it is written beside `path`, synced, and moved over it, so a failed
    save leaves an older file as it was. `info` is any JSON-able dict to travel with the model (measurements,
    device, versions); `describe` reads it back. Tensors of any device are saved; tied ones once.

    Raises TypeError or ValueError, before anything is written, for state that a file cannot hold (extra state
    that is no tensor, meta or sparse tensors, other dtypes); OSError where the file system refuses.
    """
    if encode not in (None, "entropy"):
        raise ValueError(f'save: encode must be None or "entropy", got {encode!r}')
    kept, document = _content(model, info)
    (storage_file if encode is None else storage_coded).write(path, kept, document)


def size_report(model: nn.Module, *, info: Mapping[str, Any] | None = None) -> SizeReport:
    """The bytes of `model` after each stage of Deep Compression, per tensor and as a whole file.

    Stages (Han et al. 2016, arXiv:1510.00149): `dense`; `pruned` (values that are not zero and their
    relative positions in a fixed number of bits); `clustered` (indices into a table of the distinct values
    instead of values); `coded` (what `save(model, path, encode="entropy")` writes, whose file with
    everything in it is `file`). Nothing is written. Raises as `save` does.
    """
    kept, document = _content(model, info)
    return storage_report.measure(kept, document)


def _content(
    model: nn.Module, info: Mapping[str, Any] | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the document of a file."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be an nn.Module, got {type(model).__name__}")
    if info is not None and not isinstance(info, Mapping):
        raise TypeError(f"save: info must be a dict of JSON values, got {type(info).__name__}")
    model = storage_structure.unwrapped(model)
    try:
        structure = storage_structure.describe(model)
    except StructureError as error:
        raise ValueError(f"save: {error}") from error
    state = model.state_dict()
    for name, value in state.items():
        _check_savable(name, value)
    aliases = _aliases(state)
    kept = {name: _plain_copy(value) for name, value in state.items() if name not in aliases}
    document = {
        "format": _FORMAT,
        "tautorch": __version__,
        "torch": torch.__version__,
        "modules": structure,
        "aliases": aliases,
        "memory_format": {name: f for name, value in state.items() if (f := _memory_format(value))},
        "info": dict(info or {}),
    }
    return kept, document


def _check_savable(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"save: the state {name!r} must be a tensor, got {type(value).__name__}; "
            "make it a buffer, or a constructor argument of the architecture"
        )
    if value.layout != torch.strided or value.is_meta or value.dtype not in _SAVABLE:
        what = "meta" if value.is_meta else f"{value.layout} {value.dtype}"
        raise ValueError(
            f"save: the state {name!r} must be a dense tensor with data of a common dtype, got {what}"
        )


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """{name: the earlier name of the very same values in memory}: tied weights."""
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}
    for name, value in state.items():
        if value.numel():
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if first.setdefault(key, name) != name:
                found[name] = first[key]
    return found


def _plain_copy(value: torch.Tensor) -> torch.Tensor:
    """Contiguous, on the CPU, and alone in its storage, as safetensors wants it."""
    value = value.detach().cpu().contiguous()
    own = value.numel() * value.element_size() == value.untyped_storage().nbytes()
    return value if own and value.storage_offset() == 0 else value.clone()


def _memory_format(value: torch.Tensor) -> str | None:
    """A dense layout other than the contiguous one; float kernels may round differently in it.

    Strides are compared, not `is_contiguous`: with one channel a tensor is contiguous in both layouts, and
    torch goes by its strides.
    """
    name, memory_format = _FORMATS.get(value.dim(), ("", torch.contiguous_format))
    plain = not name or not value.is_contiguous(memory_format=memory_format)
    usual = torch.empty(value.shape, device="meta").stride()
    return None if plain or value.stride() == usual else name


def load(path: str | PathLike[str], skeleton: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Rebuilds a saved model from its architecture's code and returns it.

    skeleton: the float model's class or function (called without arguments), or a module, which is changed in
        place and returned. Layers that were replaced, pruned or factorised are put into it. Of one wrapped by
        `torch.compile`, `nn.DataParallel` or `DistributedDataParallel` the module inside is filled; before
        training in the last, load first and wrap then: it averages no gradients of layers put in later.

    The result keeps the skeleton's training flag (call `.eval()` to run it) and device. Raises
    `CheckpointError` (a ValueError) for a file that is truncated, corrupted, tampered with or of another
    architecture, TypeError for another skeleton, OSError where the file cannot be read; a module that was
    passed is then unchanged.
    """
    container = storage_coded if storage_coded.is_coded(path) else storage_file
    document, entries = container.read(path)
    _check_document(path, document, entries)
    whole = _skeleton(skeleton)
    # The file of an earlier version may hold the wrapper, under whose names its tensors are.
    model = storage_structure.unwrapped(whole, document["modules"])
    if container is storage_coded:
        storage_coded.check_size(path, entries, model)
    values = container.tensors(path, entries, document)
    aliases = document["aliases"]
    said = entries | {name: entries[kept] for name, kept in aliases.items()}
    try:
        rebuilt = storage_structure.rebuild(model, document["modules"], said)
    except StructureError as error:
        bad(path, f"does not fit: it {error}")
    except RecursionError:
        bad(path, "is malformed: its structure is nested too deeply")
    state = values | {name: values[kept] for name, kept in aliases.items()}
    with _all_or_nothing(model, rebuilt, isinstance(skeleton, nn.Module)):
        try:
            _fill(rebuilt, state, said, document)
        except CheckpointError:
            raise
        except Exception as error:
            bad(
                path, f"does not fit: it {error}" if isinstance(error, StructureError) else f"is bad: {error}"
            )
    return whole


def describe(path: str | PathLike[str]) -> dict[str, Any]:
    """What a file says of itself: `format`, `tautorch` and `torch` versions, `modules`, `tensors`, `info`.

    Of an entropy-coded file `coded` has the bytes of each tensor. Reads the header alone; tensor data is not
    verified. Raises `CheckpointError` as `load` does.
    """
    container = storage_coded if storage_coded.is_coded(path) else storage_file
    document, entries = container.read(path)
    _check_document(path, document, entries)
    shapes = {name: {"dtype": str(e.dtype), "shape": list(e.shape)} for name, e in entries.items()}
    described: dict[str, Any] = document | {"tensors": shapes}
    return described


def _skeleton(skeleton: object) -> nn.Module:
    model = skeleton
    if not isinstance(model, nn.Module):
        if not callable(skeleton):
            raise TypeError(
                f"load: skeleton must be a module or a function that makes one, got {type(skeleton).__name__}"
            )
        model = skeleton()
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: skeleton must return an nn.Module, got {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"load: skeleton must have real tensors, got {name!r} without data; build it on the CPU"
            )
    return model


def _check_document(path: str | PathLike[str], document: dict[str, Any], entries: dict[str, Entry]) -> None:
    """The document's own form; what it says of modules is checked where they are built."""
    if document.get("format") != _FORMAT:
        bad(
            path,
            f"is of format {document.get('format')!r}, this tautorch reads {_FORMAT}; install a matching one",
        )
    for key in ("modules", "aliases", "memory_format", "info"):
        if not isinstance(document.get(key), dict):
            bad(path, f"is malformed: its structure must have the object {key!r}")
    aliases = document["aliases"]
    for name, kept in aliases.items():
        if not isinstance(kept, str) or kept not in entries or name in entries:
            bad(path, f"is malformed: {name!r} is said to be tied to {kept!r}")
    for name, value in document["memory_format"].items():
        rank = next((r for r, (known, _) in _FORMATS.items() if known == value), None)
        if (
            name not in entries | aliases
            or rank is None
            or len(entries[aliases.get(name, name)].shape) != rank
        ):
            bad(path, f"is malformed: {name!r} cannot have the memory format {value!r}")


@contextmanager
def _all_or_nothing(model: nn.Module, rebuilt: Rebuilt, keep: bool) -> Iterator[None]:
    """Puts the new modules in; on an error, and if `keep`, everything is again as it was, values too."""
    if not keep:
        rebuilt.apply()
        yield
        return
    replaced = tuple(f"{path}." for path in rebuilt.made)
    tensors_before = [(t, t.data) for t in [*model.parameters(), *model.buffers()]]
    values_before = {
        name: value.clone() for name, value in model.state_dict().items() if not name.startswith(replaced)
    }
    parameters_before = [(m, dict(m._parameters)) for m in model.modules()]
    try:
        rebuilt.apply()
        yield
    except BaseException:
        rebuilt.undo()
        for module, parameters in parameters_before:
            module._parameters.clear()
            module._parameters.update(parameters)
        for tensor, data in tensors_before:
            tensor.data = data
        model.load_state_dict(values_before, strict=False)
        raise


def _fill(
    rebuilt: Rebuilt, state: dict[str, torch.Tensor], said: dict[str, Entry], document: dict[str, Any]
) -> None:
    """Loads the tensors into the rebuilt model, after everything about them has been compared."""
    model = rebuilt.root
    expected = model.state_dict()
    for name, tensor in expected.items():
        storage_structure.check_entry(name, tensor, said)
    if unknown := sorted(set(said) - set(expected)):
        raise StructureError(f"has the tensor {unknown[0]!r}, which the architecture lacks")
    for path, module in model.named_modules():
        if type(module) in _PACKED:
            for name in module.state_dict():
                full = f"{path}.{name}" if path else name
                _check_packed(full, state[full])
    _tie(model, document["aliases"])
    direct = dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    )
    formats = dict(_FORMATS.values())
    for name, value in state.items():
        tensor = direct.get(name)
        if tensor is not None and (tensor.dtype != value.dtype or name in document["memory_format"]):
            memory_format = formats.get(document["memory_format"].get(name), torch.preserve_format)
            # Not `.to`, which leaves the strides of a tensor that is contiguous in both layouts.
            tensor.data = torch.empty_like(tensor.data, dtype=value.dtype, memory_format=memory_format)
    ordered = OrderedDict(state)
    ordered._metadata = expected._metadata  # type: ignore[attr-defined]
    filled = model.load_state_dict(ordered, strict=True)
    if filled.missing_keys or filled.unexpected_keys:
        raise StructureError(f"leaves {filled.missing_keys or filled.unexpected_keys} over")
    for module in model.modules():
        if isinstance(module, SparseModule):  # kernels follow the indices wherever they point
            layout = module._layout(module._buffers)
            check_layout(*layout, module.pattern, module._shape, module._groups, op=module.op)


def _check_packed(name: str, value: torch.Tensor) -> None:
    """What the compiled kernels take for granted of any values."""
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise StructureError(f"has non-finite values in {name!r}, which a packed layer cannot hold")
    if name.endswith("x_scale") and not bool((value > 0).all()):
        raise StructureError(f"has a scale that is not positive in {name!r}")
    if name.endswith("x_zero_point") and not bool(((value >= -128) & (value <= 127)).all()):
        raise StructureError(f"has a zero point outside [-128, 127] in {name!r}")


def _tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Ties again what was tied when saved, where both are parameters and the skeleton has them apart."""
    for name, kept in aliases.items():
        owner, _, key = name.rpartition(".")
        source_owner, _, source_key = kept.rpartition(".")
        try:
            target, source = model.get_submodule(owner), model.get_submodule(source_owner)
        except AttributeError:
            continue
        parameter = source._parameters.get(source_key)
        if key in target._parameters and parameter is not None:
            target._parameters[key] = parameter

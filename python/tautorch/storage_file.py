"""The file of `storage`: safetensors written atomically, and read with every byte accounted for.

The safetensors reader checks that a header is well formed; it takes the header's word for what the bytes
mean. A checkpoint also carries, in its metadata, a JSON document and the SHA-256 of it and of each tensor
(with dtype and shape), so that damage is noticed before a model is touched.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_DOCUMENT, _DIGEST = "tautorch", "tautorch_sha256"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class CheckpointError(ValueError):
    """A file that cannot be loaded: truncated, corrupted, tampered with, or for another architecture."""


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's dtype, shape and bytes, as hex."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        size = tensor.numel() * tensor.element_size()
        found.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
    return found.hexdigest()


def write(path: str | PathLike[str], tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
    """Writes contiguous CPU tensors and a JSON document; `path` then holds all of it or what it held before.

    Raises ValueError for a document that is not JSON, OSError where the file system refuses.
    """
    text = as_text(document | {"sha256": {name: digest(value) for name, value in tensors.items()}})
    metadata = {"format": "pt", _DOCUMENT: text, _DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its own of what the system said; nothing else can be wrong by now
            raise OSError(f"save: cannot write {os.fspath(path)!r}: {error}") from error


def as_text(document: dict[str, Any]) -> str:
    """The document as JSON that `as_document` reads; ValueError if there is none."""
    try:
        text = json.dumps(document, allow_nan=False, separators=(",", ":"))
        json.loads(text, object_pairs_hook=_unique)  # keys such as 1 and "1" are one name in JSON
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"save: info and layer configurations must be JSON (finite numbers, text, lists, dicts): {error}"
        ) from error
    if len(text) >= MAX_HEADER:
        raise ValueError(
            f"save: info and structure must be under {MAX_HEADER} bytes of JSON, got {len(text)}"
        )
    return text


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A path to write to, beside `path`: synced and moved over it at the end, gone after an error."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"save: path must be a file, got the directory {str(path)!r}")
    if target.exists() and not target.is_file():
        raise OSError(
            f"save: path must be a file, got the device or pipe {str(path)!r}, which would be replaced"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save: the directory {str(target.parent)!r} does not exist; make it first")
    # Its name is short: one as long as the file system takes leaves no room for more.
    temporary = target.with_name(f".tautorch-{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # what the umask gives; safetensors makes its file private
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(target.stat().st_mode if target.exists() else mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    """Makes the rename itself durable, where the platform can."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def bad(path: str | PathLike[str], what: str) -> NoReturn:
    raise CheckpointError(f"load: {os.fspath(path)!r} {what}")


def read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The document (its checksum verified) and the table of tensors (every byte accounted for)."""
    header, data_size = _header(path)
    metadata = header.pop("__metadata__", None)
    entries = _entries(path, header, data_size)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_DOCUMENT), str):
        bad(path, "was not written by tautorch.save (no structure in its metadata)")
    text = metadata[_DOCUMENT]
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != metadata.get(_DIGEST):
        bad(path, "is corrupted: the checksum of its structure does not match; copy or save it again")
    document = as_document(path, text)
    said = document.get("sha256")
    if not isinstance(said, dict):
        bad(path, "is malformed: its structure must have the object 'sha256'")
    if set(said) != set(entries):
        odd = sorted(set(said) ^ set(entries))[0]
        bad(path, f"is corrupted: its tensors and their checksums differ at {odd!r}")
    for name, value in said.items():
        if not isinstance(value, str):
            bad(path, f"is malformed: tensor {name!r} has no checksum")
    return document, entries


def as_document(path: str | PathLike[str], text: str) -> dict[str, Any]:
    """The JSON object of a file's structure."""
    document = _parse(path, text, "structure")
    if not isinstance(document, dict):
        bad(path, f"is malformed: its structure must be an object, got {type(document).__name__}")
    return document


def _header(path: str | PathLike[str]) -> tuple[dict[str, Any], int]:
    """The JSON header and the number of bytes after it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            bad(path, f"is truncated or no safetensors file: {size} bytes cannot hold a header of {length}")
        if length > MAX_HEADER:
            bad(path, f"is malformed: a header of {length} bytes is over the limit of {MAX_HEADER}")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        bad(path, "is corrupted: its header is not UTF-8 text")
    header = _parse(path, text, "header")
    if not isinstance(header, dict):
        bad(path, f"is malformed: its header must be an object, got {type(header).__name__}")
    return header, size - 8 - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _parse(path: str | PathLike[str], text: str, what: str) -> Any:
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        bad(path, f"is malformed: its {what} is not valid JSON ({error})")


def _entries(path: str | PathLike[str], header: dict[str, Any], data_size: int) -> dict[str, Entry]:
    """The tensors of the header; their byte ranges must tile the data exactly."""
    entries: dict[str, Entry] = {}
    ranges: list[tuple[int, int]] = []
    for name, said in header.items():
        if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
            bad(path, f"is malformed: tensor {name!r} must have dtype, shape and data_offsets")
        dtype = DTYPES.get(said["dtype"]) if isinstance(said["dtype"], str) else None
        shape, offsets = said["shape"], said["data_offsets"]
        if dtype is None:
            bad(path, f"is malformed: tensor {name!r} has the unknown dtype {said['dtype']!r}")
        if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
            bad(path, f"is malformed: tensor {name!r} must have a shape and two offsets of whole numbers")
        entry = Entry(dtype, tuple(shape))
        if offsets[1] > data_size or offsets[1] - offsets[0] != entry.nbytes:
            bad(
                path,
                f"is truncated or malformed: tensor {name!r} of {said['dtype']} {shape} does not fit its "
                f"bytes {offsets} of {data_size}",
            )
        entries[name] = entry
        ranges.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            bad(path, f"is malformed: its tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != data_size:
        bad(path, f"is malformed: {data_size - end} bytes after its last tensor")
    return entries


def are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def tensors(
    path: str | PathLike[str], entries: dict[str, Entry], document: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """All tensors of the file; each must be what the header said and have its checksum."""
    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name, entry in entries.items():
                tensor = file.get_tensor(name)
                if (
                    Entry(tensor.dtype, tuple(tensor.shape)) != entry
                    or digest(tensor) != document["sha256"][name]
                ):
                    bad(
                        path,
                        f"is corrupted: the checksum of {name!r} does not match; copy or save it again",
                    )
                found[name] = tensor
    except SafetensorError as error:
        bad(path, f"is malformed: {error}")
    return found

"""The entropy-coded file of `storage`: everything counted, everything checked before a model is touched.

magic     8 bytes "TAUTCODE"
version   1 byte
length    4 bytes, little-endian: of the next part
document  JSON, deflated: the structure, and each tensor's dtype, shape and coded bytes
tensors   as `coding.encode` writes them, in the document's order
digest    SHA-256 of the tensors themselves: that decoding gave what was saved
digest    SHA-256 of all the bytes before: that the file is whole
"""

from __future__ import annotations

import hashlib
import os
import zlib
from os import PathLike
from typing import Any, Final

import torch
from torch import nn

from tautorch.coding import CodingError, decode, encode
from tautorch.storage_file import (
    DTYPES,
    MAX_HEADER,
    Entry,
    are_sizes,
    as_document,
    as_text,
    bad,
    digest,
    replacing,
)

_MAGIC: Final = b"TAUTCODE"
_VERSION: Final = 1
_START, _DIGEST = len(_MAGIC) + 5, 32  # bytes before the document, bytes of a digest
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A few bytes can stand for any number of equal weights, so the file's own size bounds nothing: what it
# decodes to may be this many times the skeleton's state, plus a megabyte (wider dtypes and index tensors stay
# below).
_GROWTH, _SPARE = 16, 1 << 20


def write(path: str | PathLike[str], tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
    """As `storage_file.write`. What was coded is decoded and compared before the file replaces another."""
    data = pack(tensors, document)[0]
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def pack(tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> tuple[bytes, dict[str, int]]:
    """The whole file, and the coded bytes of each tensor."""
    coded = {name: encode(value) for name, value in tensors.items()}
    for name, value in tensors.items():
        if digest(decode(coded[name], value.dtype, value.shape)) != digest(value):
            raise RuntimeError(
                f"save: {name!r} does not decode to itself; please report this with the tensor"
            )
    sizes = {name: len(data) for name, data in coded.items()}
    said = {name: [_NAMES[value.dtype], list(value.shape), sizes[name]] for name, value in tensors.items()}
    squeezed = zlib.compress(as_text(document | {"coded": said}).encode(), 9)
    data = b"".join(
        (_MAGIC, bytes([_VERSION]), len(squeezed).to_bytes(4, "little"), squeezed, *coded.values())
    )
    data += _digest_of(tensors)
    return data + hashlib.sha256(data).digest(), sizes


def _digest_of(tensors: dict[str, torch.Tensor]) -> bytes:
    text = "".join(f"{digest(value)} {name}\n" for name, value in tensors.items())
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_coded(path: str | PathLike[str]) -> bool:
    """Whether the file begins as an entropy-coded one does."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The document and the table of tensors, whose bytes must be all that the file holds."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_START)
        if len(start) < _START:
            bad(path, f"is truncated: {size} bytes cannot hold its header")
        if start[8] != _VERSION:
            bad(path, f"is of version {start[8]}, this tautorch reads {_VERSION}; install a matching one")
        length = int.from_bytes(start[9:], "little")
        if length > size - _START - 2 * _DIGEST:
            bad(path, f"is truncated: {size} bytes cannot hold a document of {length}")
        squeezed = file.read(length)
    document = as_document(path, _inflated(path, squeezed))
    entries = _entries(path, document)
    left = size - _START - length - 2 * _DIGEST - sum(said[2] for said in document["coded"].values())
    if left:
        bad(path, f"is truncated or malformed: {abs(left)} bytes are {'over' if left > 0 else 'missing'}")
    return document, entries


def _inflated(path: str | PathLike[str], squeezed: bytes) -> str:
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(squeezed, MAX_HEADER).decode("utf-8")
    except (zlib.error, UnicodeDecodeError) as error:
        bad(path, f"is corrupted: its document cannot be read ({error})")
    if not inflate.eof or inflate.unused_data:
        bad(path, f"is malformed: its document does not end, or is over the limit of {MAX_HEADER} bytes")
    return text


def _entries(path: str | PathLike[str], document: dict[str, Any]) -> dict[str, Entry]:
    if not isinstance(document.get("coded"), dict):
        bad(path, "is malformed: its structure must have the object 'coded'")
    entries = {}
    for name, said in document["coded"].items():
        fits = isinstance(said, list) and len(said) == 3 and isinstance(said[0], str) and said[0] in DTYPES
        if not fits or not are_sizes(said[1]) or not are_sizes([said[2]]):
            bad(path, f"is malformed: tensor {name!r} must have a dtype, a shape and a number of bytes")
        entries[name] = Entry(DTYPES[said[0]], tuple(said[1]))
    return entries


def check_size(path: str | PathLike[str], entries: dict[str, Entry], skeleton: nn.Module) -> None:
    """CheckpointError if the tensors would take far more memory than the skeleton does."""
    wanted = sum(entry.nbytes for entry in entries.values())
    there = sum(value.nbytes for value in skeleton.state_dict().values() if isinstance(value, torch.Tensor))
    if wanted > _GROWTH * there + _SPARE:
        bad(
            path,
            f"does not fit: it decodes to {wanted} bytes, the skeleton has {there}; "
            "pass the architecture that was saved",
        )


def tensors(
    path: str | PathLike[str], entries: dict[str, Entry], document: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """All tensors of the file; the file and what it decodes to must have their checksums."""
    with open(path, "rb") as file:
        data = file.read()
    if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        bad(path, "is corrupted: its checksum does not match; copy or save it again")
    at = _START + int.from_bytes(data[9:_START], "little")
    found = {}
    for name, entry in entries.items():
        size = document["coded"][name][2]
        try:
            found[name] = decode(data[at : at + size], entry.dtype, entry.shape)
        except CodingError as error:
            bad(path, f"is malformed: {name!r} cannot be decoded: {error}")
        at += size
    if _digest_of(found) != data[-2 * _DIGEST : -_DIGEST]:
        bad(
            path,
            "decodes to other tensors than were saved: its checksum does not match; "
            "was it written with another version of the library constriction?",
        )
    return found

"""A teacher's outputs on disk: computed once, read by sample."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sized
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tautorch import distributed
from tautorch._batches import Batches, call_model, check_batches, model_device, to_device
from tautorch.distill.arguments import at_least_single, positive, whole

INDEX = "cache.json"
FORMAT = 1
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def cache_teacher(
    teacher: nn.Module,
    batches: Batches,
    folder: str | PathLike[str],
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    output: Callable[[Any], Any] | None = None,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = 256 << 20,
) -> TeacherCache:
    """Run the teacher over `batches` once and keep its log-probabilities on disk; returns the cache, opened.

    Sample i of the cache is the i-th row of all batches, so they must come in the order of the data set (a
    DataLoader without shuffling). At most `shard_bytes` and one batch are in memory. Shards are written whole
    or not at all, and the index last: a folder without it is not a cache.

    Args:
        teacher: in eval mode (ValueError otherwise); logits [B, C] or [B, L, C] with L as it comes.
        batches: a tensor, a tuple of positional or a dict of keyword arguments each.
        folder: made if missing; must not hold a cache (FileExistsError).
        top_k: keep the k largest of each row and the logarithm of what the rest sum to; None keeps all.
        temperature: T > 0 that logits are divided by first. It fixes that of the loss with `top_k`; a full
            cache serves every T and takes only 1 here.
        output: what to take of the teacher's output, e.g. `lambda out: out.logits`.
        dtype: of the log-probabilities: float16, bfloat16 or float32. float16 changes each by at most
            |log p| / 2048, so least where p is large.
        shard_bytes: the size from which a shard is written.

    With a vocabulary of 50,000, k = 50 takes 304 bytes a token, all in float16 100,000.
    """
    op = "cache_teacher"
    check_batches(op, batches)
    if distributed.active():
        raise ValueError(f"{op}: one process must write a cache, got several ranks; use distributed.local()")
    if not isinstance(teacher, nn.Module) or any(module.training for module in teacher.modules()):
        raise ValueError(f"{op}: teacher must be an nn.Module in eval mode; call teacher.eval()")
    if top_k is not None:
        whole(op, "top_k", top_k)
    temperature = positive(op, "temperature", temperature)
    if top_k is None and temperature != 1:
        raise ValueError(
            f"{op}: temperature must be 1 without top_k (any can be had later), got {temperature}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"{op}: dtype must be float16, bfloat16 or float32, got {dtype}")
    whole(op, "shard_bytes", shard_bytes)
    target = Path(folder)
    if (target / INDEX).exists():
        raise FileExistsError(
            f"{op}: {target / INDEX} exists; open it with TeacherCache, or delete the folder"
        )
    target.mkdir(parents=True, exist_ok=True)
    writer = _Writer(target, shard_bytes)
    kind: dict[str, Any] | None = None
    with torch.no_grad():
        for batch in batches:
            out = call_model(op, teacher, to_device(batch, model_device(teacher)))
            logits = _checked(out if output is None else output(out), writer.count)
            found = {"classes": logits.shape[-1], "sequence": logits.dim() == 3}
            if kind is not None and kind != found:
                raise ValueError(f"{op}: teacher must give logits of one kind, got {kind}, then {found}")
            kind = found
            if top_k is not None and top_k > found["classes"]:
                raise ValueError(f"{op}: top_k must be at most {found['classes']} classes, got {top_k}")
            rows = _compressed(at_least_single(logits) / temperature, top_k, dtype)
            writer.add(rows, logits.shape[0], 1 if logits.dim() == 2 else logits.shape[1])
    if kind is None:
        raise ValueError(f"{op}: batches must hold at least one batch, got none (a spent generator?)")
    writer.close({"format": FORMAT, "top_k": top_k, "temperature": temperature, **kind})
    return TeacherCache(target)


def _checked(logits: Any, at: int) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() not in (2, 3):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"cache_teacher: teacher must give logits [B, C] or [B, L, C], got {got}; give output="
        )
    if bool(torch.isnan(logits).any()):
        raise ValueError(f"cache_teacher: teacher must give no NaN, got one in the batch after sample {at}")
    return logits


def _compressed(logits: Tensor, top_k: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a shard, [rows, ...] on the CPU."""
    log_p = F.log_softmax(logits.flatten(0, -2), -1)
    if top_k is None:
        return {"log_probs": log_p.to(dtype).cpu()}
    values, indices = log_p.topk(top_k, -1)
    rest = log_p.scatter(-1, indices, float("-inf")).logsumexp(-1)
    return {
        "log_probs": values.to(dtype).cpu(),
        "indices": indices.to(torch.int32).cpu(),
        "log_rest": rest.float().cpu(),
    }


class _Writer:
    """Gathers rows and writes a shard whenever there are enough of them."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._parts: list[dict[str, Tensor]] = []
        self._lengths: list[int] = []
        self._size = self.count = 0
        self._shards: list[dict[str, Any]] = []

    def add(self, rows: dict[str, Tensor], samples: int, length: int) -> None:
        self._parts.append(rows)
        self._lengths += [length] * samples
        self._size += sum(tensor.nbytes for tensor in rows.values())
        self.count += samples
        if self._size >= self._limit:
            self._flush()

    def _flush(self) -> None:
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        tensors["starts"] = torch.tensor([0, *self._lengths]).cumsum(0)
        name, data = f"{len(self._shards):05d}.safetensors", save(tensors)
        _write_atomic(self._folder / name, data)
        checksum = hashlib.sha256(data).hexdigest()
        shard = {"file": name, "samples": len(self._lengths), "bytes": len(data), "sha256": checksum}
        self._shards.append(shard)
        self._parts, self._lengths, self._size = [], [], 0

    def close(self, about: dict[str, Any]) -> None:
        if self._parts:
            self._flush()
        text = json.dumps({**about, "shards": self._shards}, indent=1)
        _write_atomic(self._folder / INDEX, text.encode())


def _write_atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class TeacherCache:
    """What `cache_teacher` wrote: `cache[i]` is a dict of tensors for sample i, `len(cache)` their number.

    "log_probs" [k] or [L, k], and of a top-k cache "indices" (int64, alike) and "log_rest" [] or [L], the
    logarithm of what all other classes sum to. Files are mapped into memory and read where asked; a cache
    can be handed to a DataLoader's workers.

    Args:
        folder: of the cache.
        verify: read everything and compare with the checksums of the index.

    Raises FileNotFoundError where there is no cache, ValueError for one that is damaged or newer.
    """

    def __init__(self, folder: str | PathLike[str], *, verify: bool = False) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).exists():
            raise FileNotFoundError(
                f"TeacherCache: {self.folder / INDEX} must exist; write it with cache_teacher (an unfinished "
                "cache has none)"
            )
        try:
            about = json.loads((self.folder / INDEX).read_text())
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, not {FORMAT}")
            self.top_k: int | None = about["top_k"]
            self.temperature = float(about["temperature"])
            self.classes, self.sequence = int(about["classes"]), bool(about["sequence"])
            self._files = [str(shard["file"]) for shard in about["shards"]]
            counts = torch.tensor([0, *(int(shard["samples"]) for shard in about["shards"])])
            self._first: Tensor = counts.cumsum(0)
            for shard in about["shards"]:
                self._check(shard, verify)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"TeacherCache: {self.folder} must be a whole cache, got {error}; write it again"
            ) from error
        self._open: dict[int, tuple[Any, Tensor]] = {}

    def _check(self, shard: dict[str, Any], verify: bool) -> None:
        path = self.folder / shard["file"]
        if path.parent != self.folder or not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{shard['file']} missing or not of {shard['bytes']} bytes")
        if verify:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise ValueError(f"{shard['file']} with another checksum")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"TeacherCache: index must be in [0, {len(self)}), got {index}")
        shard = int(torch.searchsorted(self._first, index, right=True)) - 1
        file, starts = self._shard(shard)
        local = index - int(self._first[shard])
        start, stop = int(starts[local]), int(starts[local + 1])
        names = ["log_probs"] if self.top_k is None else ["log_probs", "indices", "log_rest"]
        entry = {name: file.get_slice(name)[start:stop] for name in names}
        if self.top_k is not None:
            entry["indices"] = entry["indices"].long()
        return entry if self.sequence else {name: tensor[0] for name, tensor in entry.items()}

    def _shard(self, number: int) -> tuple[Any, Tensor]:
        if number not in self._open:
            try:
                file = safe_open(self.folder / self._files[number], "pt")
                self._open[number] = (file, file.get_tensor("starts"))  # type: ignore[no-untyped-call]
            except SafetensorError as error:
                raise ValueError(f"TeacherCache: {self._files[number]} is damaged: {error}") from error
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process maps the files for itself


class CachedDataset(Dataset[Any]):
    """A data set with the teacher's cached outputs: (inputs, (target, entry)) for each of its pairs.

    Items that are not pairs become (item, entry). Train with `Distiller(None, student, CachedTarget(cache),
    optimizer)`; ValueError if the lengths differ.
    """

    def __init__(self, dataset: Any, cache: TeacherCache) -> None:
        length = len(dataset) if isinstance(dataset, Sized) else None
        if length != len(cache):
            got = type(dataset).__name__ if length is None else length
            raise ValueError(f"CachedDataset: dataset must have the cache's {len(cache)} samples, got {got}")
        self.dataset: Any = dataset
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        item, entry = self.dataset[index], self.cache[index]
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return item[0], (item[1], entry)
        return item, entry

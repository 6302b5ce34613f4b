"""Weights in safetensors files, read tensor by tensor: one file, or a folder of shards with their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


class Shards:
    """Where each tensor of a checkpoint is.

    A file, or a folder: with `model.safetensors.index.json` as large models are shipped, otherwise with
    `*.safetensors` files. ValueError for what is neither, or not readable.
    """

    def __init__(self, op: str, path: str | PathLike[str]) -> None:
        self._op, self.path = op, Path(path)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._found():
            try:
                with safe_open(file, "pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 - not a dict
                        self._files[name] = file
                        self.shapes[name] = tuple(shard.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{op}: weights must be safetensors, got {file}: {error}") from error

    def _found(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        index = self.path / INDEX
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [self.path / name for name in sorted(set(places.values()))]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{self._op}: weights must be a .safetensors file or a folder of them, got {self.path}"
            )
        return files

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The named tensors, in memory of their own: no file stays mapped."""
        found: dict[str, Tensor] = {}
        wanted = sorted(names, key=lambda name: (str(self._files[name]), name))
        file: Path | None = None
        while wanted:
            file = self._files[wanted[0]]
            with safe_open(file, "pt") as shard:
                while wanted and self._files[wanted[0]] == file:
                    name = wanted.pop(0)
                    found[name] = shard.get_tensor(name).to(device, copy=True)
        return found


class ShardWriter:
    """Writes a folder of shards, and last their index: without it the folder is not complete."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, str] = {}
        self._bytes = 0

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """One shard; `file` without its extension."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, self.folder / f"{file}.safetensors", {"format": "pt"})
        self._places |= dict.fromkeys(kept, f"{file}.safetensors")
        self._bytes += sum(tensor.nbytes for tensor in kept.values())

    def copy(self, source: Shards, names: Iterable[str], limit: int) -> None:
        """The named tensors of another checkpoint, at most `limit` bytes (or one tensor) at a time."""
        for number, part in enumerate(_parts(source, names, limit)):
            self.write(f"rest-{number:05d}", source.read(part))

    def finish(self) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _parts(source: Shards, names: Iterable[str], limit: int) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        # Eight bytes an element at most.
        more = 8 * torch.Size(source.shapes[name]).numel()
        if part and size + more > limit:
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    if part:
        yield part

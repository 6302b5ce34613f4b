"""Checkpoints of a training run: written whole or not at all, and holding every source of randomness."""

from __future__ import annotations

import os
import pickle
import random
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tautorch import distributed

LAST = "last.pt"
BEST = "best.pt"
_TEMPORARY = ".tmp"
FORMAT = 2


def save_atomic(state: Mapping[str, Any], path: Path) -> None:
    """Write `state` with torch.save so that `path` holds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in `folder`."""
    for name in (LAST, BEST):
        for part in folder.glob(f".{name}.*{_TEMPORARY}"):
            part.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises ValueError for a truncated, altered, foreign or newer file, naming it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums that torch.save writes.
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(
            f"Distiller: {path} must be a readable checkpoint, got {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no detail'}; delete it to start afresh"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"Distiller: {path} must be a Distiller checkpoint of format {FORMAT}; delete it")
    return state


def loader_generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """The random generators that decide a DataLoader's order, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = [
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    found: list[torch.Generator] = []
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is known for known in found):
            found.append(generator)
    return found


def random_state(generators: Iterable[torch.Generator]) -> dict[str, Any]:
    """The state of torch's, CUDA's, Python's and numpy's global generators, and of the given ones."""
    # The words as tensors: as 625 ints each they take longer to pickle than the rest of a small run.
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, torch.tensor(words), gauss),
        "generators": [generator.get_state() for generator in generators],
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # One GPU for each rank: asking after the others would put a context on each of them.
        alone = not distributed.active()
        state["cuda"] = torch.cuda.get_rng_state_all() if alone else [torch.cuda.get_rng_state()]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, normal = numpy.random.get_state()
        words = torch.tensor(keys.astype("int64"))
        state["numpy"] = (str(name), words, int(position), int(has_gauss), float(normal))
    return state


def set_random_state(state: Mapping[str, Any], generators: list[torch.Generator]) -> None:
    """Put back what `random_state` gave; ValueError when the loader has other generators than then."""
    if len(state["generators"]) != len(generators):
        raise ValueError(
            f"Distiller: the loader must have {len(state['generators'])} random generators as at the "
            f"checkpoint, got {len(generators)}"
        )
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    for generator, value in zip(generators, state["generators"], strict=True):
        generator.set_state(value)
    if "cuda" in state and torch.cuda.is_available():
        if distributed.active():
            torch.cuda.set_rng_state(state["cuda"][0])
        else:
            torch.cuda.set_rng_state_all(state["cuda"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        name, words, position, has_gauss, normal = state["numpy"]
        keys = numpy.array(words.tolist(), dtype=numpy.uint32)
        numpy.random.set_state((name, keys, position, has_gauss, normal))


def check_fits(what: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """ValueError if `state` has not exactly the names and shapes of the module's `state_dict`."""
    mine = module.state_dict()
    if mine.keys() != state.keys():
        odd = sorted(mine.keys() ^ state.keys())
        raise ValueError(
            f"Distiller: the {what} must be the checkpoint's, got other tensors: {', '.join(odd[:6])}"
        )
    for name, value in mine.items():
        if isinstance(value, torch.Tensor) and value.shape != state[name].shape:
            raise ValueError(
                f"Distiller: {name} of the {what} must be {list(state[name].shape)} as in the checkpoint, "
                f"got {list(value.shape)}"
            )

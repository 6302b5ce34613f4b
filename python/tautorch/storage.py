"""One safetensors file for a compressed model, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from torch import nn


class CheckpointError(ValueError):
    """A file that cannot be loaded: truncated, corrupted, tampered with, or for another architecture."""


def save(model: nn.Module, path: str | PathLike[str], *, info: Mapping[str, Any] | None = None) -> None:
    """Writes `model` to one safetensors file; see `load`.

    The file is complete or not there: it is written beside `path`, synced, and moved over it. `info` is any
    JSON-able dict to travel with the model (measurements, device, versions); `describe` reads it back.
    """
    raise NotImplementedError


def load(path: str | PathLike[str], skeleton: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Rebuilds a saved model from its architecture's code and returns it.

    skeleton: the float model's class or function (called without arguments), or a module, which is changed in
    place and returned. The result keeps the skeleton's training flag: call `.eval()` to run it. Raises
    `CheckpointError` (a ValueError) for a bad file; the module that was passed is then unchanged.
    """
    raise NotImplementedError


def describe(path: str | PathLike[str]) -> dict[str, Any]:
    """The structure, versions and `info` stored in a file, without loading its tensors."""
    raise NotImplementedError

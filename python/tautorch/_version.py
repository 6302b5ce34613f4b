"""The version, from the installed distribution; "unknown" where the source tree is run as it is."""

from __future__ import annotations

from importlib import metadata


def _installed() -> str:
    try:
        return metadata.version("tautorch")
    except metadata.PackageNotFoundError:
        return "unknown"


__version__: str = _installed()

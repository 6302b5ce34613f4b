"""The table of tiles that ships for a device: ``python -m benches.gpu.tiles [DEVICE]``.

On that device it measures, as ``tautorch.warmup`` does, and writes the choices with "measured": true. Without
a GPU it writes what the kernels' own rules choose for DEVICE, with "measured": false.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import astuple
from typing import Any

import torch

from tautorch import tuning
from tautorch.triton_kernels import _lowrank_tiles as lowrank
from tautorch.triton_kernels import sparse_linear as sparse

ROWS = (16, 64, 256, 1024, 4096)
# (N, K) of an 8-billion-parameter Llama and of BERT-large
SHAPES = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1024, 1024), (4096, 1024), (1024, 4096)]
RANKS = (32, 128)
DTYPES = (torch.int8, torch.bfloat16)


def by_rule() -> dict[str, Any]:
    """Choices by the part of their key after the device, without a measurement, for 132 multiprocessors."""
    choices: dict[str, Any] = {}
    for m in ROWS:
        for n, k in SHAPES:
            for dtype in DTYPES:
                for r in RANKS:
                    key = ("lowrank_linear", m, n, k, r, dtype, False)
                    tile = astuple(lowrank.choose(m, n, k, r, dtype.itemsize))
                    choices["|".join(map(str, key))] = tile
                for block in sparse.BLOCKS:
                    key = ("sparse_linear", f"{block}x{block}", m, n, k, dtype, dtype)
                    choices["|".join(map(str, key))] = astuple(sparse.choose(m, block, dtype.itemsize))
    return choices


def measured() -> dict[str, Any]:
    """The same keys, measured here."""
    from tautorch.nn import Int8Linear, LowRankLinear, SparseLinear
    from tautorch.prune.patterns import make_mask

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TAUTORCH_CACHE"] = folder
        with tuning.measuring(), torch.no_grad():
            for n, k in SHAPES:
                linear = torch.nn.Linear(k, n, device="cuda")
                layers: list[torch.nn.Module] = [Int8Linear.from_float(linear)]
                for dtype in (torch.int8, torch.float32):
                    layers += [LowRankLinear.from_float(linear, rank=r, weight_dtype=dtype) for r in RANKS]
                    for block in sparse.BLOCKS:
                        pattern = f"{block}x{block}"
                        mask = make_mask(linear.weight.detach().abs(), pattern, 0.8)
                        layers.append(
                            SparseLinear.from_float(linear, pattern=pattern, mask=mask, weight_dtype=dtype)
                        )
                for layer in layers:
                    for m in ROWS:
                        layer(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
        found: dict[str, Any] = json.loads(tuning.cache_file().read_text())["choices"]
    return {key.partition("|")[2]: tile for key, tile in found.items()}


def write(device: str, choices: dict[str, Any], is_measured: bool) -> None:
    """The table of a device."""
    path = tuning.shipped_file(device)
    path.parent.mkdir(exist_ok=True)
    table = {f"{device}|{key}": tile for key, tile in sorted(choices.items())}
    note = "measured by benches/gpu/tiles.py" if is_measured else "defaults by rule: nothing was measured"
    head = json.dumps({"version": tuning.VERSION, "measured": is_measured, "note": note})[:-1]
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(tile)}" for key, tile in table.items())
    path.write_text(f'{head}, "choices": {{\n{rows}\n}}}}\n')
    print(f"{len(table)} choices in {path}")


def main() -> None:
    """See the module."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = sys.argv[1] if len(sys.argv) > 1 else here or "NVIDIA H200"
    write(device, measured() if device == here else by_rule(), device == here)


if __name__ == "__main__":
    main()

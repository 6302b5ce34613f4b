"""The installed package with torch: layers of each kind converted, run, saved and loaded.

python try_package.py [--expect neon_dotprod]     # the kernel that must be chosen unasked
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
from pathlib import Path

import torch
from torch import nn

import tautorch as tt


def network() -> nn.Sequential:
    """A float network for 3-channel images of 12 x 12."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 25, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(),
        nn.Linear(80, 10),
    ).eval()  # fmt: skip


def compressed(model: nn.Sequential) -> nn.Module:
    """The same with int8 layers: convolutions, dense, 4x1 sparse, low-rank, weight-only."""
    plan = {
        "0": tt.nn.Int8Conv2d.from_float,
        "2": tt.nn.Int8Conv2d.from_float,
        "5": tt.nn.Int8Linear.from_float,
        "7": lambda m: tt.nn.SparseLinear.from_float(
            m, pattern="4x1", mask=tt.prune.make_mask(m.weight, "4x1", 0.5)
        ),
        "9": lambda m: tt.nn.LowRankLinear.from_float(m, rank=40, weight_dtype=torch.int8),
        "11": lambda m: tt.nn.Int8Linear.from_float(m, quant="weight_only"),
    }
    return tt.convert(copy.deepcopy(model), plan)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expect", metavar="KERNEL", help="the kernel that must be chosen unasked")
    expect = parser.parse_args().expect
    here = [name for name, available in tt._C.isas().items() if available]
    model, x = network(), torch.randn(7, 3, 12, 12)
    ours = compressed(model)
    results = {}
    with torch.inference_mode():
        layer, rows = ours[5], torch.randn(7, 600)
        results[""] = layer(rows)
        chosen = tt.dispatch.last_used("int8_linear")
        assert chosen == (expect or here[0]), f"{chosen} was chosen of {here}"
        for name in here:
            with tt.dispatch.force("int8_linear", name):
                results[name] = layer(rows)
        # Integers are equal, and what follows them is the same float arithmetic.
        assert all(torch.equal(y, results[""]) for y in results.values())
        y, exact = ours(x), model(x)
        error = float((y - exact).norm() / exact.norm())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            tt.save(ours, path)
            again = tt.load(path, network)
            assert torch.equal(again.eval()(x), y), "another result after loading"
    print(
        f"{platform.machine()}, torch {torch.__version__}: {chosen} chosen of {', '.join(here)}, all equal; "
        f"six layers converted ({error:.0%} off float), saved and loaded"
    )


if __name__ == "__main__":
    main()

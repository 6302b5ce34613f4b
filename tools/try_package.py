"""The installed package with torch: layers of each kind converted, run, saved and loaded.

python try_package.py [--expect neon_dotprod]     # the kernel that must be chosen unasked
"""

from __future__ import annotations

import argparse
import contextlib
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
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 25, 128), nn.ReLU(),
        nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 10),
    ).eval()  # fmt: skip


def compressed(model: nn.Sequential) -> nn.Module:
    """The same with an int8 layer of each operator, and a weight-only one."""
    plan = {
        "0": tt.nn.Int8Conv2d.from_float,
        "2": lambda m: tt.nn.SparseConv2d.from_float(
            m, pattern="unstructured", mask=tt.prune.make_mask(m.weight, "unstructured", 0.5)
        ),
        "4": lambda m: tt.nn.LowRankConv2d.from_float(m, rank=16, weight_dtype=torch.int8),
        "7": tt.nn.Int8Linear.from_float,
        "9": lambda m: tt.nn.SparseLinear.from_float(
            m, pattern="4x1", mask=tt.prune.make_mask(m.weight, "4x1", 0.5)
        ),
        "11": lambda m: tt.nn.LowRankLinear.from_float(m, rank=40, weight_dtype=torch.int8),
        "13": lambda m: tt.nn.Int8Linear.from_float(m, quant="weight_only"),
    }
    return tt.convert(copy.deepcopy(model), plan)


def by(kernel: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The model's output with every operator forced to one kernel."""
    with contextlib.ExitStack() as stack:
        for op in tt.dispatch.OPS:
            stack.enter_context(tt.dispatch.force(op, kernel))
        return model(x)


def apart(y: torch.Tensor, exact: torch.Tensor) -> float:
    """How far from a result, in parts of it."""
    return float((y - exact).norm() / exact.norm())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expect", metavar="KERNEL", help="the kernel that must be chosen unasked")
    expect = parser.parse_args().expect
    here = [name for name, available in tt._C.isas().items() if available]
    model, x = network(), torch.randn(7, 3, 12, 12)
    ours = compressed(model)
    with torch.inference_mode():
        y = ours(x)
        for op in tt.dispatch.OPS:
            chosen = tt.dispatch.last_used(op)
            assert chosen == (expect or here[0]), f"{op}: {chosen} was chosen of {here}"
        # Integers are equal, and what follows them is the same float arithmetic.
        layer, rows = ours[7], torch.randn(7, 600)
        assert all(torch.equal(by(name, layer, rows), layer(rows)) for name in here)
        # Floats are rounded in another order, and then quantised again.
        exact = by("reference", ours, x)
        off = {name: apart(by(name, ours, x), exact) for name in here}
        assert max(off.values()) < 0.02, off
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            tt.save(ours, path)
            again = tt.load(path, network)
            assert torch.equal(again.eval()(x), y), "another result after loading"
    print(
        f"{platform.machine()}, torch {torch.__version__}: {chosen} chosen of {', '.join(here)}; seven "
        f"layers converted, on every kernel within {max(off.values()):.1e} of the reference, saved and loaded"
    )


if __name__ == "__main__":
    main()

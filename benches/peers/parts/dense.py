"""Dense int8 linear layers, float in and float out, dynamic quantisation inside."""

from __future__ import annotations

from benches.peers.parts.common import (
    TorchLinears,
    a_linear,
    check_int8,
    empty_call,
    ours,
    random_x,
)
from benches.peers.results import Case, Target
from benches.peers.session import Session

from tautorch.nn import Int8Linear

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024)
SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (1024, 4096), (4096, 4096), (1000, 1003))
QUICK_ROWS, QUICK_SHAPES = (1, 16, 128), ((384, 384), (1024, 4096), (1000, 1003))


def run(session: Session) -> None:
    """Every M for every (K, N): ours, torch's own, OpenVINO, ONNX Runtime."""
    for k, n in QUICK_SHAPES if session.quick else SHAPES:
        rows = [m for m in (QUICK_ROWS if session.quick else ROWS) if session.wanted(f"{m}x{k}x{n}")]
        if not rows:
            continue
        linear = a_linear(k, n)
        layer, torchs = Int8Linear.from_float(linear), TorchLinears(linear)
        files = {"weight": session.array("weight", linear.weight), "bias": session.array("bias", linear.bias)}
        for m in rows:
            x = random_x(m, k)
            check_int8(layer, linear, x)
            meta = {"m": m, "k": k, "n": n}
            case = Case("dense", f"{m}x{k}x{n}", meta, 2 * m * k * n, ours(session, "ours", layer, x))
            expected = linear(x)
            torchs.add(session, case, x, expected)
            about = {"kind": "linear", "dtype": "int8", "x": session.array("x", x), **files}
            session.add_remote(case, "openvino", "OpenVINO int8", about, expected)
            session.add_remote(case, "onnxruntime", "ONNX Runtime int8", about, expected)
            case.limits = [session.peak(), empty_call(session, x, n)]
            case.share = 0.88 if m >= 64 and min(k, n) >= 1024 else None
            case.targets = [Target("best peer", 1.0, tuple(c.name for c in case.peers))]
            session.measure(case)

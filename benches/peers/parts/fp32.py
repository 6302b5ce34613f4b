"""Sparse linear layers with float32 values: beside DeepSparse's, and beside everybody's dense ones."""

from __future__ import annotations

import torch
from benches.peers.parts.common import a_linear, add_local, check_float, ours, random_x
from benches.peers.parts.sparse import mask_of, name_of
from benches.peers.results import Case, Target
from benches.peers.session import Session
from torch import nn

from tautorch.nn import SparseLinear

SHAPES = ((1024, 4096), (4096, 1024), (4096, 4096), (768, 3072))
CASES = (*((k, n, m) for k, n in SHAPES for m in (16, 128)), (1024, 4096, 1024))
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
DENSE = ("torch fp32", "OpenVINO fp32", "ONNX Runtime fp32", "DeepSparse fp32 dense")


def run(session: Session) -> None:
    """Unstructured and 4x1 masks, each in turn as ours."""
    for k, n, m in ((1024, 4096, 128),) if session.quick else CASES:
        for sparsity in (0.8,) if session.quick else SPARSITIES:
            if session.wanted(name_of("unstructured", sparsity, m, k, n)):
                _case(session, k, n, m, sparsity)


def _case(session: Session, k: int, n: int, m: int, sparsity: float) -> None:
    x = random_x(m, k)
    layers, linears = {}, {}
    for pattern in ("unstructured", "4x1"):
        mask = mask_of(k, n, pattern, sparsity)
        linears[pattern] = a_linear(k, n, mask)
        layers[pattern] = SparseLinear.from_float(
            linears[pattern], pattern=pattern, mask=mask, weight_dtype=torch.float32
        )
        check_float(layers[pattern], linears[pattern], x)
    meta = {"pattern": "unstructured", "sparsity": sparsity, "m": m, "k": k, "n": n}
    first = ours(session, "ours", layers["unstructured"], x)
    case = Case("fp32", name_of("unstructured", sparsity, m, k, n), meta, 2 * m * k * n, first)
    case.own = [ours(session, "ours 4x1", layers["4x1"], x)]
    whole = a_linear(k, n)
    add_local(session, case, "torch fp32", lambda: whole(x), whole(x))
    rest = {"kind": "linear", "dtype": "fp32", "x": session.array("x", x)}
    sparse = {**rest, **_files(session, "sparse", linears["unstructured"])}
    dense = {**rest, **_files(session, "dense", whole)}
    session.add_remote(case, "deepsparse", "DeepSparse fp32", sparse, linears["unstructured"](x))
    session.add_remote(case, "deepsparse", "DeepSparse fp32 dense", dense, whole(x))
    session.add_remote(case, "openvino", "OpenVINO fp32", dense, whole(x))
    session.add_remote(case, "onnxruntime", "ONNX Runtime fp32", dense, whole(x))
    if sparsity >= 0.8:
        case.targets.append(Target("DeepSparse fp32", 1.0, ("DeepSparse fp32",)))
    if sparsity >= 0.7:
        case.targets.append(Target("best dense fp32", 1.0, DENSE))
    case.targets.append(Target("4x1: best dense fp32", 1.0, DENSE, ("ours 4x1",)))
    session.measure(case)


def _files(session: Session, name: str, linear: nn.Linear) -> dict[str, str]:
    return {part: session.array(f"{name}_{part}", getattr(linear, part)) for part in ("weight", "bias")}

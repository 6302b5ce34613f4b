"""Sparse linear layers with int8 values: beside DeepSparse, and beside our own dense int8 layer."""

from __future__ import annotations

import torch
from benches.peers.parts import pruned
from benches.peers.parts.common import (
    a_linear,
    check_int8,
    dense,
    empty_call,
    ours,
    random_x,
    static_range,
)
from benches.peers.results import Case, Target
from benches.peers.session import Session
from torch import Tensor, nn

from tautorch import prune
from tautorch.nn import Int8Linear, SparseLinear

SHAPES = ((1024, 4096), (4096, 1024), (4096, 4096), (768, 3072))
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
ROWS = (16, 128, 1024)

DEEPSPARSE = {0.7: 1.0, 0.8: 1.1, 0.9: 1.3, 0.95: 1.5}
"""What unstructured layers are asked to be over DeepSparse."""
BLOCK_4X1 = {0.5: 1.8, 0.7: 3.0, 0.8: 4.2, 0.9: 8.0, 0.95: 14.0}
"""What 4x1 layers are asked to be over our dense ones at 4096 x 4096, and at 1024 -> 4096."""
BLOCK_4X1_SMALL = {0.5: 1.7, 0.7: 2.7, 0.8: 3.8, 0.9: 6.5, 0.95: 10.0}
BATCH_1 = {0.5: 1.2, 0.7: 1.7, 0.8: 2.5, 0.9: 5.0, 0.95: 8.0}
"""What the best pattern is asked to be over our dense layer at batch 1, net of an empty call."""


def run(session: Session) -> None:
    """Unstructured, 4x1, blocks, batch 1, two layers in a row, masks of trained layers."""
    shapes, sparsities, rows = SHAPES, SPARSITIES, ROWS
    if session.quick:
        shapes, sparsities, rows = ((1024, 4096),), (0.8, 0.9), (16, 128)
    for k, n in shapes:
        for sparsity in sparsities:
            unstructured(session, k, n, sparsity, rows)
    for k, n, ms in ((4096, 4096, (64, 128, 512)), (1024, 4096, (128,))):
        for sparsity in sparsities:
            against_dense(
                session, k, n, sparsity, ms, "4x1", (BLOCK_4X1 if k == n else BLOCK_4X1_SMALL)[sparsity]
            )
        if session.quick:
            break
    for pattern in ("16x16", "32x32"):
        against_dense(session, 4096, 4096, 0.9, (64, 128, 512), pattern, 7.0)
    for sparsity in sparsities:
        batch_1(session, 4096, 4096, sparsity)
    for sparsity in sparsities:
        for m in rows:
            two_layers(session, 1024, 4096, sparsity, m)
    trained(session, (0.9,) if session.quick else (0.8, 0.9, 0.95), rows)


def mask_of(k: int, n: int, pattern: str, sparsity: float) -> Tensor:
    """The mask of random magnitudes."""
    scores = torch.rand(n, k, generator=torch.Generator().manual_seed(2))
    return prune.make_mask(scores, pattern, sparsity)


def name_of(pattern: str, sparsity: float, m: int, k: int, n: int) -> str:
    return f"{pattern} {sparsity:.0%} {m}x{k}x{n}"


def unstructured(session: Session, k: int, n: int, sparsity: float, rows: tuple[int, ...]) -> None:
    """Random masks: ours, quantising dynamically, and statically as DeepSparse does."""
    rows = tuple(m for m in rows if session.wanted(name_of("unstructured", sparsity, m, k, n)))
    if rows:
        linear = a_linear(k, n, mask_of(k, n, "unstructured", sparsity))
        _unstructured(session, linear, "unstructured", sparsity, rows)


def _unstructured(
    session: Session, linear: nn.Linear, label: str, sparsity: float, rows: tuple[int, ...]
) -> None:
    k, n = linear.in_features, linear.out_features
    pack = {"pattern": "unstructured", "mask": linear.weight != 0}
    layer, whole = SparseLinear.from_float(linear, **pack), Int8Linear.from_float(linear)  # type: ignore[arg-type]
    files = {"weight": session.array("weight", linear.weight), "bias": session.array("bias", linear.bias)}
    for m in rows:
        x = random_x(m, k)
        fixed = static_range(x)
        static = SparseLinear.from_float(linear, **pack, quant="static", **fixed)  # type: ignore[arg-type]
        check_int8(layer, linear, x)
        check_int8(static, linear, x, **fixed)
        meta = {"pattern": label, "sparsity": sparsity, "m": m, "k": k, "n": n}
        first = ours(session, "ours", layer, x)
        case = Case("sparse", name_of(label, sparsity, m, k, n), meta, 2 * m * k * n, first)
        case.own = [ours(session, "ours static", static, x), dense(session, whole, x)]
        about = {"kind": "linear", "dtype": "int8", "x": session.array("x", x), **files}
        session.add_remote(case, "deepsparse", "DeepSparse int8", about, linear(x))
        if sparsity in DEEPSPARSE:
            names = ("DeepSparse int8",)
            case.targets = [
                Target("DeepSparse", DEEPSPARSE[sparsity], names),
                Target("DeepSparse, both static", DEEPSPARSE[sparsity], names, ("ours static",)),
            ]
        session.measure(case)


def against_dense(
    session: Session, k: int, n: int, sparsity: float, rows: tuple[int, ...], pattern: str, asked: float
) -> None:
    """Blocks beside our dense layer."""
    rows = tuple(m for m in rows if session.wanted(name_of(pattern, sparsity, m, k, n)))
    if not rows:
        return
    mask = mask_of(k, n, pattern, sparsity)
    linear = a_linear(k, n, mask)
    layer = SparseLinear.from_float(linear, pattern=pattern, mask=mask)
    whole = Int8Linear.from_float(linear)
    for m in rows:
        x = random_x(m, k)
        check_int8(layer, linear, x)
        meta = {"pattern": pattern, "sparsity": sparsity, "m": m, "k": k, "n": n}
        first = ours(session, "ours", layer, x)
        case = Case("sparse", name_of(pattern, sparsity, m, k, n), meta, 2 * m * k * n, first)
        case.own = [dense(session, whole, x)]
        case.targets = [Target("Int8Linear", asked, ("Int8Linear",))]
        session.measure(case)


def batch_1(session: Session, k: int, n: int, sparsity: float) -> None:
    """One row of x: every pattern that has this sparsity, beside our dense layer, net of an empty call."""
    label = "best pattern"
    if not session.wanted(name_of(label, sparsity, 1, k, n)):
        return
    x, layers = random_x(1, k), {}
    for pattern in ("unstructured", "4x1", "16x16", "32x32", *(["2:4"] if sparsity == 0.5 else [])):
        mask = mask_of(k, n, pattern, sparsity)
        linear = a_linear(k, n, mask)
        layers[pattern] = SparseLinear.from_float(linear, pattern=pattern, mask=mask)
        check_int8(layers[pattern], linear, x)
    meta = {"pattern": label, "sparsity": sparsity, "m": 1, "k": k, "n": n}
    first = dense(session, Int8Linear.from_float(a_linear(k, n)), x)
    first.name = "ours"
    case = Case("sparse", name_of(label, sparsity, 1, k, n), meta, 2 * k * n, first)
    case.own = [ours(session, pattern, layer, x) for pattern, layer in layers.items()]
    case.limits = [empty_call(session, x, n)]
    case.targets = [Target("Int8Linear, net", BATCH_1[sparsity], ("ours",), tuple(layers), net=True)]
    if "2:4" in layers:
        case.targets.append(Target("2:4 over Int8Linear", 1.0, ("ours",), ("2:4",)))
    session.measure(case)


def two_layers(session: Session, k: int, n: int, sparsity: float, m: int) -> None:
    """K -> N -> K with float between our two layers; DeepSparse has both in one graph, uint8 between them."""
    name = name_of("two layers", sparsity, m, k, n)
    if not session.wanted(name):
        return
    up = a_linear(k, n, mask_of(k, n, "unstructured", sparsity))
    down = a_linear(n, k, mask_of(n, k, "unstructured", sparsity), seed=1)
    x = random_x(m, k)
    model = nn.Sequential(*(SparseLinear.from_float(layer, pattern="unstructured") for layer in (up, down)))
    check_int8(model[0], up, x)
    check_int8(model[1], down, up(x))
    model(x)
    meta = {"pattern": "two layers", "sparsity": sparsity, "m": m, "k": k, "n": n}
    first = session.local("ours", lambda: model(x), kernel=str(model[0].kernel()))
    case = Case("sparse", name, meta, 4 * m * k * n, first)
    about = {"kind": "mlp", "dtype": "int8", "x": session.array("x", x)}
    for suffix, layer in (("", up), ("2", down)):
        about["weight" + suffix] = session.array("weight" + suffix, layer.weight)
        about["bias" + suffix] = session.array("bias" + suffix, layer.bias)
    session.add_remote(case, "deepsparse", "DeepSparse int8", about, down(up(x)))
    session.measure(case)


def trained(session: Session, sparsities: tuple[float, ...], rows: tuple[int, ...]) -> None:
    """Masks of a layer that was trained, pruned by magnitude and trained again."""
    label = "trained, unstructured"
    k, n = pruned.SHAPE
    wanted = {s: tuple(m for m in rows if session.wanted(name_of(label, s, m, k, n))) for s in sparsities}
    if not any(wanted.values()):
        return
    for sparsity, linear in pruned.layers([s for s in sparsities if wanted[s]]):
        _unstructured(session, linear, label, sparsity, wanted[sparsity])

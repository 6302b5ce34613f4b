"""Results of a machine that does not exist, made as a run makes them, by a formula instead of a clock."""

from __future__ import annotations

from typing import Any

from benches.peers.arena import Contestant, Timed
from benches.peers.parts import conv, dense, fp32, sparse
from benches.peers.results import Case, Target, make_row

PEAK = 1e-12  # seconds per operation of one core
AO = ("torch.ao x86", "torch.ao onednn")
PEERS = {**dict.fromkeys(AO, 1.2), "torch bf16": 3.0, "torch fp32": 9.0, "OpenVINO int8": 1.05}


def row_of(case: Case, times: dict[str, float], lost: dict[str, str] | None = None) -> dict[str, Any]:
    """The case's row where each contestant took as long as `times` says; who is not in it is of no part."""

    def named(names: list[str]) -> list[Contestant]:
        return [Contestant(name, {"": lambda s: [0.0]}) for name in names]

    own = {"ours static", "ours 4x1", "Int8Linear", "4x1", "unstructured", "4x1 80%"}
    limits = {"peak", "empty call"}
    case.peers = named([n for n in times if n not in own | limits | {"ours"}])
    case.own, case.limits = named([n for n in times if n in own]), named([n for n in times if n in limits])
    timed = {name: Timed(name, "", "avx512vnni", (s, s * 1.02, s)) for name, s in times.items()}
    return {**make_row(case, timed, lost or {}, 2), "date": "2026-01-02"}


def a_case(part: str, name: str, meta: dict[str, Any], operations: float, *targets: Target) -> Case:
    ours = Contestant("ours", {"": lambda s: [0.0]})
    return Case(part, name, meta, operations, ours, targets=list(targets))


def rows() -> list[dict[str, Any]]:
    """Some of every part; at M = 16 OpenVINO is ahead, and DeepSparse is lost in one row."""
    made = []
    for k, n in dense.SHAPES:
        for m in dense.ROWS:
            operations = 2.0 * m * k * n
            seconds = 2e-6 + operations * PEAK / 2 / (0.93 - 0.5 / (m + 1))
            case = a_case("dense", f"{m}x{k}x{n}", {"m": m, "k": k, "n": n}, operations)
            case.targets = [Target("best peer", 1.0, tuple(PEERS))]
            times = {name: seconds * slower for name, slower in PEERS.items()}
            times["OpenVINO int8"] *= 0.8 if m == 16 else 1.5
            made.append(row_of(case, {"ours": seconds, **times, "peak": PEAK, "empty call": 1e-6}))
    for k, n in sparse.SHAPES:
        for m in sparse.ROWS:
            for sparsity in sparse.SPARSITIES:
                operations = 2.0 * m * k * n
                whole = operations * PEAK / 2
                meta = {"pattern": "unstructured", "sparsity": sparsity, "m": m, "k": k, "n": n}
                name = sparse.name_of("unstructured", sparsity, m, k, n)
                case = a_case(
                    "sparse", name, meta, operations, Target("DeepSparse", 1.1, ("DeepSparse int8",))
                )
                ours = whole * (1 - sparsity) * 2
                times = {
                    "ours": ours,
                    "ours static": ours,
                    "Int8Linear": whole,
                    "DeepSparse int8": ours * 1.3,
                }
                gone = (k, m, sparsity) == (768, 16, 0.5)
                if gone:
                    times.pop("DeepSparse int8")
                made.append(row_of(case, times, {"DeepSparse int8": "its process ended"} if gone else None))
                meta = {**meta, "pattern": "unstructured"}
                name = sparse.name_of("unstructured", sparsity, m, k, n)
                case = a_case("fp32", name, meta, operations, Target("best dense fp32", 1.0, fp32.DENSE))
                times = {"ours": ours * 8, "ours 4x1": ours * 4, "DeepSparse fp32": ours * 9}
                made.append(row_of(case, {**times, **dict.fromkeys(fp32.DENSE, whole * 4)}))
    for k, n, ms in ((4096, 4096, (64, 128)), (1024, 4096, (128,))):
        for sparsity, asked in sparse.BLOCK_4X1.items():
            for m in ms:
                meta = {"pattern": "4x1", "sparsity": sparsity, "m": m, "k": k, "n": n}
                name = sparse.name_of("4x1", sparsity, m, k, n)
                case = a_case(
                    "sparse", name, meta, 2.0 * m * k * n, Target("Int8Linear", asked, ("Int8Linear",))
                )
                made.append(row_of(case, {"ours": 1.1e-4 * (1 - sparsity), "Int8Linear": 1e-4}))
    for sparsity, asked in sparse.BATCH_1.items():
        meta = {"pattern": "best pattern", "sparsity": sparsity, "m": 1, "k": 4096, "n": 4096}
        target = Target("Int8Linear, net", asked, ("ours",), ("4x1", "unstructured"), net=True)
        case = a_case("sparse", sparse.name_of("best pattern", sparsity, 1, 4096, 4096), meta, 1e7, target)
        fast = 1e-4 * (1 - sparsity)
        times = {"ours": 1e-4, "4x1": fast + 2e-6, "unstructured": fast * 1.4 + 2e-6, "empty call": 1e-6}
        made.append(row_of(case, times))
    for i, layer in enumerate(conv.LAYERS):
        for batch in (1, 8):
            meta = {"kind": "int8", "layer": str(layer), "batch": batch}
            operations = 2.0 * batch * layer.macs
            ours = operations * PEAK / 2 / (0.5 + 0.02 * i)
            case = a_case(
                "conv", f"int8 {layer} batch {batch}", meta, operations, Target("torch.ao", 1.0, AO)
            )
            made.append(row_of(case, {"ours": ours, AO[0]: ours * (0.8 + 0.03 * i), "peak": PEAK}))
    return made


def results() -> dict[str, Any]:
    about = {"machine": "Made-up CPU 2 threads", "date": "2026-01-02", "threads": 2, "rounds": 7}
    return {**about, "slice_ms": 15.0, "versions": {"tautorch": "0", "openvino": "1.2"}, "rows": rows()}

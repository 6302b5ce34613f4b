"""Golden hashes of q, scales, int32 accumulators and weight-only products.

``python -m tests.golden.generate`` writes golden.json.

A change of the file is a change of the numerical contract: every saved model would compute other integers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import digits_numpy
from . import quantizer_numpy as nq

GOLDEN = Path(__file__).with_name("golden.json")
STATIC_SCALE = np.float32(0.0073)
ZERO_POINT = -11
PATTERNS = ("unstructured", "2:4", "4x1", "16x16", "32x32", "64x64")


@dataclass
class Golden:
    """One case: what goes in (numpy, names as in the functional form) and what must come out."""

    op: str
    mode: str
    inputs: dict[str, np.ndarray]
    config: dict[str, object] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Key in golden.json."""
        config = [str(self.config.get(key, "")) for key in ("pattern", "dtype")]
        parts = [self.op, self.mode, *config, f"g{self.config.get('groups', '')}"]
        return "-".join(p for p in parts if p not in ("", "g"))


def digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes; every NaN counts as one."""
    array = np.ascontiguousarray(array)
    if array.dtype == np.float32:
        array = np.where(np.isnan(array), np.float32(np.nan), array)
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()


def _inputs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    x = nq.floats(shape, seed)
    x[1] = 0
    x.reshape(shape[0], -1)[2, -1] = np.nan
    x[3] *= np.float32(2.0**-110)
    return x


def _quantised(x: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, q - zero point, row scale of x [M, K]."""
    if mode == "dynamic":
        q, scale = nq.quantize_rows(x)
        return q, q, scale
    q = nq.quantize_static(x, STATIC_SCALE, ZERO_POINT)
    scale = np.where(np.isfinite(x).all(1), STATIC_SCALE, np.float32(np.nan)).astype(np.float32)
    return q, q - ZERO_POINT, scale


def _weight(shape: tuple[int, ...], seed: int) -> np.ndarray:
    weight = nq.integers(shape, -127, 127, seed)
    weight[0] = -127
    weight[-1] = 127
    return weight


def _linear(mode: str) -> Iterator[Golden]:
    m, n, k, rank = 9, 70, 131, 24
    x = _inputs((m, k), 101)
    q, centred, scale = _quantised(x, mode)
    out = {"q": q.astype(np.int8), "scale": scale}
    weight = _weight((n, k), 102)
    yield Golden(
        "int8_linear",
        mode,
        {"x": x, "weight": weight.astype(np.int8)},
        {},
        {**out, "acc": centred @ weight.T},
    )
    for pattern in PATTERNS:
        mask = nq.keep((n, k), pattern, 1, 103)
        inputs = {"x": x, "weight": weight.astype(np.int8), "mask": mask}
        yield Golden(
            "sparse_linear", mode, inputs, {"pattern": pattern}, {"acc": centred @ (weight * mask).T}
        )
    down, up = _weight((rank, k), 104), _weight((n, rank), 105)
    down_scale = np.abs(nq.floats((rank,), 106)) + np.float32(2.0**-20)
    inner = (centred @ down.T).astype(np.float32) * scale[:, None] * down_scale
    inputs = {"x": x, "down": down.astype(np.int8), "up": up.astype(np.int8), "down_scale": down_scale}
    inner_q, inner_scale = nq.quantize_rows(inner)
    yield Golden("lowrank_linear", mode, inputs, {}, {"inner_scale": inner_scale, "acc": inner_q @ up.T})


def _weight_only() -> Iterator[Golden]:
    """Rows that kernels with digits multiply as such, exact up to the last roundings."""
    m, n, k = 6, 64, 263
    weight = _weight((n, k), 302)
    for dtype, significant in (("float32", 24), ("float16", 11), ("bfloat16", 8)):
        x = nq.integers((m, k), 1 - 2**significant, 2**significant - 1, 301).astype(np.float32)
        x *= np.float32(2.0**-significant)
        x[1] = 0
        x[2, 9] *= 16  # stays apart, or makes others do so
        x[3, ::8] *= np.float32(2.0**-6)  # three digits, where two are enough for the rest
        x[4] *= np.float32(2.0**9)
        inputs: dict[str, np.ndarray] = {"x": x, "weight": weight.astype(np.int8)}
        y = digits_numpy.product(x, weight, significant)
        yield Golden("int8_linear", "weight_only", inputs, {"dtype": dtype}, {"y": y})


def _conv(mode: str, groups: int) -> Iterator[Golden]:
    b, i, h, w, o, rank = 5, 6, 7, 6, 36, 4
    config: dict[str, object] = {"stride": 2, "padding": 2, "dilation": 2, "groups": groups}
    x = _inputs((b, i, h, w), 201)
    q, centred, scale = _quantised(x.reshape(b, -1), mode)
    out = {"q": q.astype(np.int8), "scale": scale}
    centred = centred.reshape(x.shape)
    weight = _weight((o, i // groups, 3, 3), 202)
    acc = nq.convolve(centred, weight, 2, 2, 2, groups)
    inputs = {"x": x, "weight": weight.astype(np.int8)}
    yield Golden("int8_conv2d", mode, inputs, config, {**out, "acc": acc})
    for pattern in PATTERNS:
        mask = nq.keep((o, weight[0].size), pattern, groups, 203).reshape(weight.shape)
        acc = nq.convolve(centred, weight * mask, 2, 2, 2, groups)
        inputs = {"x": x, "weight": weight.astype(np.int8), "mask": mask}
        yield Golden("sparse_conv2d", mode, inputs, {**config, "pattern": pattern}, {"acc": acc})
    down, up = _weight((groups * rank, i // groups, 3, 3), 204), _weight((o, rank, 1, 1), 205)
    down_scale = np.abs(nq.floats((groups * rank,), 206)) + np.float32(2.0**-20)
    inner = nq.convolve(centred, down, 2, 2, 2, groups).astype(np.float32)
    inner = inner * scale[:, None, None, None] * down_scale[:, None, None]
    oh, ow = inner.shape[2:]
    rows = inner.reshape(b, groups, rank, oh * ow).transpose(0, 1, 3, 2).reshape(-1, rank)
    inner_q, _ = nq.quantize_rows(np.ascontiguousarray(rows))
    stacked = inner_q.reshape(b, groups, oh * ow, rank)
    acc = np.einsum("bglr,gor->bgol", stacked, up.reshape(groups, o // groups, rank)).reshape(b, o, oh, ow)
    inputs = {"x": x, "down": down.astype(np.int8), "up": up.astype(np.int8), "down_scale": down_scale}
    yield Golden("lowrank_conv2d", mode, inputs, config, {"acc": acc})


def cases() -> Iterator[Golden]:
    """Every golden case, accumulators as int32."""
    yield from _weight_only()
    for mode in ("dynamic", "static"):
        for part in (_linear(mode), _conv(mode, 1), _conv(mode, 3)):
            for case in part:
                case.outputs["acc"] = case.outputs["acc"].astype(np.int32)
                yield case


def hashes() -> dict[str, dict[str, str]]:
    """{case: {output: sha256}} as numpy computes it now."""
    return {case.name: {key: digest(value) for key, value in case.outputs.items()} for case in cases()}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(hashes(), indent=1) + "\n")
    print(f"wrote {GOLDEN}")

"""``sparse_linear`` passes the operator suite on every kernel."""

from __future__ import annotations

import pytest
import torch

from tautorch import _C, dispatch
from tautorch.ops import packing, sparse_entries
from tautorch.reference.layouts import encode
from tautorch.testing.cases import linear_case
from tautorch.testing.values import float_values, sparse_mask

from .agreement import agree
from .suite import LinearSuite


class TestSparseLinear(LinearSuite):
    op = "sparse_linear"


# Around a block of inputs (128, 256 where few are kept, 512 for 4x1), a tile of outputs (128) and panels of
# 4, 16, 32 and 64 rows.
FLOAT_SIZES = (
    (1, 127, 128),
    (4, 128, 129),
    (5, 129, 255),
    (16, 130, 257),
    (17, 257, 127),
    (32, 61, 512),
    (33, 4, 513),
    (64, 131, 1025),
    (65, 5, 1031),
    (129, 126, 131),
)
KERNELS = [name for name, available in _C.isas().items() if available]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("keep", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x16"])
def test_float_blocks(pattern: str, keep: float, kernel: str) -> None:
    for m, n, k in FLOAT_SIZES:
        with dispatch.force("sparse_linear", kernel):
            agree(linear_case("sparse_linear", m, n, k, mode="float", pattern=pattern, keep=keep), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_blocks_of_rows_that_threads_share(pattern: str, threads: int, kernel: str) -> None:
    """Blocks of 64 and 16 rows that do not come out even; the last outputs belong to no whole group."""
    torch.set_num_threads(threads)
    for m in (17, 33, 63, 64, 65, 80, 100, 144, 192, 197, 320):
        with dispatch.force("sparse_linear", kernel):
            agree(linear_case("sparse_linear", m, 509, 130, pattern=pattern, keep=0.2), kernel)


@pytest.mark.parametrize("keep", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x16"])
def test_float_packs_give_the_weight_back(pattern: str, keep: float) -> None:
    for _, n, k in FLOAT_SIZES:
        weight = float_values((n, k), seed=n)
        layout = encode(weight, sparse_mask((n, k), pattern, keep, seed=k), pattern)
        packed = sparse_entries.pack(*layout, pattern, (n, k), kernel="scalar", op="sparse_linear")
        for given, back in zip(layout, sparse_entries.unpack(packed, pattern, (n, k)), strict=True):
            assert torch.equal(given, back.to(given.dtype))


def test_tampered_float_blocks_are_refused() -> None:
    """Segments say which group of a tile has how many entries: each once, as many as the block has."""
    n, k = 131, 300
    layout = encode(float_values((n, k)), sparse_mask((n, k), "unstructured", 0.3), "unstructured")
    packed = sparse_entries.pack(*layout, "unstructured", (n, k), kernel="scalar", op="sparse_linear")
    info = packing.pack_info(packed)
    codes = {}

    def refused(offset: int, value: int) -> None:
        broken = packed.clone()
        assert broken[offset] != value
        broken[offset] = value
        with pytest.raises(ValueError, match="inputs they do not have"):
            _C.sparse_linear_plan(broken.data_ptr(), broken.numel(), k, codes)
        with pytest.raises(ValueError, match="inputs they do not have"):
            sparse_entries.unpack(broken, "unstructured", (n, k))

    start, index = int(info["start_offset"]), int(info["index_offset"])
    segments = start + 64  # 2 tiles x 3 blocks of 100 inputs + 1 starts, rounded up to 64 bytes
    refused(start + 4, int(packed[start + 4]) ^ 1)
    refused(segments, int(packed[segments]) ^ 1)  # a group twice
    refused(segments + 1, int(packed[segments + 1]) ^ 1)  # two entries more or fewer
    refused(segments + 2 * 3 * 128, 3)  # the last tile has three groups
    refused(index, 100)

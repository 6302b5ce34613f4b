"""Every form of a sparse int8 pack (lists, SELL, both) gives exact integers and its entries back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import _C, dispatch, prune
from tautorch.ops import packing
from tautorch.ops import sparse_entries as entries
from tautorch.ops.sparse_linear import sparse_linear
from tautorch.reference.layouts import encode

FORMS = {"lists": entries.LISTS, "sell": entries.SELL, "both": entries.BOTH}
KERNEL = "avx512vnni"


def _supported() -> bool:
    if not _C.isas().get(KERNEL, False):
        return False
    values, crow, col = encode(torch.ones(1, 1, dtype=torch.int8), None, "unstructured", 1)
    packed = entries.pack(
        values, crow, col, "unstructured", (1, 1), kernel=KERNEL, op="test", form=entries.SELL
    )
    return int(packing.pack_info(packed)["slots"]) > 0


needs_sell = pytest.mark.skipif(not _supported(), reason="this CPU has no AVX512-VBMI")


def weight(n: int, k: int, pattern: str, density: float) -> tuple[Tensor, Tensor]:
    """int8 weight with extreme values, and its mask."""
    mask = prune.make_mask(torch.rand(n, k), pattern, 1 - density) if density else torch.zeros(n, k) > 0
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    w[torch.rand(n, k) < 0.1] = -127
    w[torch.rand(n, k) < 0.1] = 0  # kept zeros stay entries
    return w * mask, mask


def packs(w: Tensor, mask: Tensor, pattern: str) -> dict[str, Tensor]:
    layout = encode(w, mask, pattern, 1)
    where = (pattern, tuple(w.shape))
    return {
        name: entries.pack(*layout, *where, kernel=KERNEL, op="test", form=form)
        for name, form in FORMS.items()
    }


def run(x: Tensor, packed: Tensor, pattern: str, n: int) -> Tensor:
    with dispatch.force("sparse_linear", KERNEL):
        return sparse_linear(
            x, packed, None, None, torch.ones(n), pattern=pattern, out_features=n,
            x_scale=torch.tensor([1.0]), out_dtype=torch.int32,
        )  # fmt: skip


@needs_sell
@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x16"])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (1, 1),
        (3, 63),
        (16, 64),
        (17, 65),
        (64, 96),
        (65, 97),
        (130, 512),
        (129, 513),
        (200, 1031),
        (19, 8209),
    ],
)
def test_forms_agree(n: int, k: int, pattern: str, density: float) -> None:
    w, mask = weight(n, k, pattern, density)
    made = packs(w, mask, pattern)
    info = {name: packing.pack_info(packed) for name, packed in made.items()}
    kept = bool(mask.any())
    assert int(info["lists"]["slots"]) == 0
    assert (int(info["sell"]["blocks"]) == 0) == kept  # nothing kept: empty lists say it
    assert (int(info["both"]["slots"]) > 0) == kept
    layout = encode(w, mask, pattern, 1)
    for packed in made.values():
        for got, want in zip(entries.unpack(packed, pattern, (n, k)), layout, strict=True):
            assert got is not None and want is not None
            assert torch.equal(got.long(), want.long())
    for m in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 23, 24, 25, 49, 64, 65, 97):
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        want = (x.double() @ w.double().T).to(torch.int32)
        for name, packed in made.items():
            assert torch.equal(run(x, packed, pattern, n), want), (name, m)


@needs_sell
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_of_several_blocks(threads: int) -> None:
    """More rows than one pass takes, split over rows."""
    w, mask = weight(257, 300, "4x1", 0.3)
    x = torch.randint(-128, 128, (413, 300), dtype=torch.int8)
    want = (x.double() @ w.double().T).to(torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for packed in packs(w, mask, "4x1").values():
            assert torch.equal(run(x, packed, "4x1", 257), want)
    finally:
        torch.set_num_threads(before)


@needs_sell
@pytest.mark.parametrize("name", ["sell", "both"])
def test_tampered_slots_are_refused(name: str) -> None:
    w, mask = weight(40, 200, "unstructured", 0.3)
    packed = packs(w, mask, "unstructured")[name]
    at = int(packing.pack_info(packed)["sell_offset"])
    strips = 3
    for byte in (at + 3, at + 4 * strips + 3, at + 4 * (strips + 1) + 1):  # starts, the last one, an offset
        broken = packed.clone()
        broken[byte] = 0xFF
        with pytest.raises(ValueError, match="inputs they do not have"):
            run(torch.zeros(1, 200, dtype=torch.int8), broken, "unstructured", 40)


@needs_sell
def test_automatic_keeps_what_pays() -> None:
    """SELL alone where it wins for every number of rows, lists besides where many rows run faster by them."""
    for density, lists in ((0.3, False), (0.04, True)):
        w, mask = weight(512, 1024, "unstructured", density)
        layout = encode(w, mask, "unstructured", 1)
        info = packing.pack_info(entries.pack(*layout, "unstructured", (512, 1024), kernel=KERNEL, op="test"))
        assert int(info["slots"]) > 0
        assert (int(info["blocks"]) > 0) == lists


@pytest.mark.skipif(not _C.isas().get(KERNEL, False), reason=f"this CPU cannot run {KERNEL}")
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("k", [96, 4097, 8209], ids=["one block", "two", "three"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_scaled_outputs_of_lists(pattern: str, k: int, activation: str) -> None:
    """More than 32 rows: sums of 4x1 are scaled and turned where they are, over those of earlier blocks.

    As codes they leave by a kernel of their own, but for tiles in which an output may be NaN.
    """
    for n in (1, 7, 66, 129, 257):
        w, mask = weight(n, k, pattern, 0.3)
        layout = encode(w, mask, pattern, 1)
        lists = entries.pack(*layout, pattern, (n, k), kernel=KERNEL, op="test", form=entries.LISTS)
        if k > 4096:
            assert packing.pack_info(lists)["blocks"] > 1
        scale, bias = torch.rand(n) * 1e-3, torch.randn(n)
        for m, spoiled in ((33, "x"), (64, ""), (97, "x"), (97, ""), (80, ""), (80, "bias")):
            x = torch.randn(m, k)
            if spoiled == "x":
                x[m // 2, k // 2] = float("nan")
            if spoiled == "bias":
                bias.view(torch.int32)[n // 2] = -1  # NaN whose low bits no carry may turn into a number
            for codes in (False, True):
                options: dict[str, Any] = {"pattern": pattern, "out_features": n, "activation": activation}
                if codes:
                    # Both bounds are met; with 80 rows by numbers that are no int32.
                    options["out_scale"] = torch.tensor([1e-10 if m == 80 else 0.01])
                    options["out_zero_point"] = torch.tensor([-5], dtype=torch.int32)
                for dtype in (torch.int8,) if codes else (torch.float32, torch.bfloat16, torch.float16):
                    with dispatch.force("sparse_linear", KERNEL):
                        got = sparse_linear(x, lists, None, None, scale, bias, out_dtype=dtype, **options)
                    with dispatch.force("sparse_linear", "scalar"):
                        want = sparse_linear(x, *layout, scale, bias, out_dtype=dtype, **options)
                    if activation == "silu":  # a series, by vectors and not
                        near = {"rtol": 1e-2, "atol": 1.0 if codes else 1e-4}
                        torch.testing.assert_close(got, want, equal_nan=True, **near)
                    else:
                        torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)

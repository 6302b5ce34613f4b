"""An extension that works on the CPU's memory, for the tests of what hands tensors to the real one.

It reads and writes through the addresses and strides it is given, and nothing else, so a wrong stride,
offset, padding or lifetime shows as a wrong number.
"""

from __future__ import annotations

import ctypes
import itertools
import pickle
from typing import Any

import torch
from torch import Tensor

from tautorch.ops import tails
from tautorch.reference import quantize_rows as rows_reference
from tautorch.reference.int8_conv2d import int8_conv2d as conv_reference
from tautorch.reference.int8_linear import int8_linear as reference
from tautorch.reference.layouts import decode

OP = "int8_linear"
FACTS: dict[str, object] = {"capability": 90, "multiprocessors": 132}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32)


def view(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The memory at an address as a tensor that shares it."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    buffer = (ctypes.c_uint8 * (span * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


def up(n: int, to: int) -> int:
    return -(-n // to) * to


class Extension:
    """``tautorch._cuda`` in plain torch, on addresses of the CPU; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.layouts: list[tuple[int, int]] = []
        self.kept: list[Tensor] = []

    def int8_linear_kernels(self) -> list[str]:
        return ["tile_a", "tile_b"]

    def int8_linear_layout(self, n: int, k: int) -> dict[str, int]:
        ldw = up(k, 16)
        sums = 128 + up(n * ldw, 128)
        return {"ldw": ldw, "weight_off": 128, "sums_off": sums, "total": sums + up(4 * n, 128)}

    def int8_linear_pack(self, weight: int, stride: int, n: int, k: int, packed: int, *_: int) -> None:
        self.calls.append("pack")
        layout = self.int8_linear_layout(n, k)
        rows = view(packed + layout["weight_off"], torch.int8, (n, layout["ldw"]), (layout["ldw"], 1))
        rows.zero_()[:, :k] = view(weight, torch.int8, (n, k), (stride, 1))
        self.int8_linear_sums(weight, stride, n, k, packed + layout["sums_off"])

    def int8_linear_sums(self, weight: int, stride: int, n: int, k: int, sums: int, *_: int) -> None:
        self.calls.append("sums")
        view(sums, torch.int32, (n,), (1,)).copy_(view(weight, torch.int8, (n, k), (stride, 1)).sum(1))

    def int8_linear_plan(self, *arguments: Any) -> bytes:
        return pickle.dumps(arguments)

    MAX_HELD = 512

    def quantize_rows(self, x: int, code: int, sm: int, sk: int, m: int, k: int, *rest: int) -> None:
        self.calls.append("quantize_rows")
        self._quantise(view(x, DTYPES[code], (m, k), (sm, sk)), *rest)

    def quantize_rows_after(self, x: int, code: int, stride: int, m: int, k: int, *rest: Any) -> None:
        self.calls.append("quantize_rows_after")
        stage, weight, bias, gate, gate_stride, eps, *rest = rest
        width = 16 // DTYPES[code].itemsize
        assert k % width == stride % width == gate_stride % width == 0 and k <= self.MAX_HELD
        assert all(p % 16 == 0 for p in (x, weight, bias, gate)) and stride >= k
        vectors = [view(p, torch.float32, (k,), (1,)) if p else None for p in (weight, bias)]
        gates = view(gate, DTYPES[code], (m, k), (gate_stride, 1)) if gate else None
        name = {number: name for name, number in rows_reference.STAGES.items()}[stage]
        rows = view(x, DTYPES[code], (m, k), (stride, 1))
        self._quantise(rows_reference.stage(rows, name, *vectors, gates, eps), *rest)

    def _quantise(self, rows: Tensor, x_scale: int, zero_point: int, q: int, ldq: int, *rest: int) -> None:
        scale, device, stream = rest
        assert (device, stream, ldq % 16) == (-1, 7, 0)
        static = view(x_scale, torch.float32, (1,), (1,)) if x_scale else None
        zero = view(zero_point, torch.int32, (1,), (1,)) if zero_point else None
        got_q, got_scale = rows_reference.quantize_rows(rows, x_scale=static, x_zero_point=zero)
        view(q, torch.int8, tuple(rows.shape), (ldq, 1)).copy_(got_q)
        view(scale, torch.float32, (rows.shape[0],), (1,)).copy_(got_scale)

    def int8_linear_supports(self, name: str, *_: Any) -> str | None:
        return None

    def int8_linear_workspace(
        self,
        plan: bytes,
        kernel: int,
        x: int,
        code: int,
        m: int,
        stride_m: int,
        stride_k: int,
        y_code: int,
        device: int,
    ) -> int:
        _, _, _, _, k, tail = pickle.loads(plan)
        weight_only = tail["mode"] == tails.NONE
        assert (code != 3 and not weight_only) or (stride_k == 1 and stride_m >= k), (
            "rows are copied by pitch"
        )
        if code == 3 and stride_k == 1 and stride_m % 16 == 0 and x % 16 == 0:
            return 0
        return up(m * up(k, 16), 128) + up(4 * m, 128)

    def int8_linear_run(self, plan: bytes, kernel: int, x: int, x_code: int, m: int, *rest: int) -> int:
        stride_m, stride_k, y_code, device, y, ldy, _, stream = rest
        assert (device, stream) == (-1, 7)
        weight, ldw, sums, n, k, tail = pickle.loads(plan)
        assert ldw % 16 == 0 and weight % 16 == 0 and ldy * DTYPES[y_code].itemsize % 16 == 0 and ldy >= n
        self.calls.append("run")

        def value(name: str, dtype: torch.dtype, count: int = 1) -> Tensor | None:
            return view(tail[name], dtype, (count,), (1,)).clone() if tail[name] else None

        w = view(weight, torch.int8, (n, up(k, 16)), (ldw, 1))
        assert not w[:, k:].any()
        zero_point = value("x_zero_point", torch.int32)
        if zero_point is not None:
            assert torch.equal(view(sums, torch.int32, (n,), (1,)), w.sum(1, dtype=torch.int32))
        if m:
            out = reference(
                view(x, DTYPES[x_code], (m, k), (stride_m, stride_k)),
                w[:, :k].contiguous(),
                view(tail["weight_scale"], torch.float32, (n,), (1,)),
                value("bias", torch.float32, n),
                x_scale=value("x_scale", torch.float32, tail["x_scales"] or 1),
                x_zero_point=zero_point,
                activation=("none", "relu", "gelu", "gelu_tanh", "silu")[tail["activation"]],
                weight_only=tail["mode"] == tails.NONE,
                out_scale=value("out_scale", torch.float32),
                out_zero_point=value("out_zero_point", torch.int32),
                out_dtype=DTYPES[y_code],
            )
            view(y, DTYPES[y_code], (m, ldy), (ldy, 1))[:, :n] = out
        return 1 if kernel < 0 else kernel

    # 2:4: the pack is the dense weight and the sums of its rows.

    def sparse_linear_kernels(self) -> list[str]:
        return ["sp_a", "sp_b", "sp_float", "bitmap_a"]

    def sparse_linear_choose(self, *problem: int) -> str:
        return "sp_b" if problem[-1] == 3 else "sp_float"

    def sparse_linear_order(self, name: str) -> int:
        return {"sp_a": 1, "sp_b": 0, "sp_float": 2}[name]

    def sparse_linear_bitmap(self, rows: int) -> str:
        return "bitmap_a"

    def sparse_linear_bitmap_layout(self, n: int, k: int) -> dict[str, int]:
        tiles, steps = up(n, 16) // 16, up(k, 64) // 64
        offsets = tiles * steps * 128
        sums = offsets + up(4 * (tiles * steps + 1), 128)
        layout = {"tiles": tiles, "steps": steps, "offsets_off": offsets, "sums_off": sums}
        self.calls.append("layout")
        return {**layout, "values_off": sums + up(4 * n, 128)}

    def _of_bits(self, packed: int, n: int, k: int) -> Tensor:
        """The dense weight of a pack of single weights, bit by bit, as the header of the kernels says."""
        parts = self.sparse_linear_bitmap_layout(n, k)
        tiles, steps = parts["tiles"], parts["steps"]
        maps = view(packed, torch.int32, (tiles, steps, 32), (steps * 32, 32, 1))
        offsets = view(packed + parts["offsets_off"], torch.int32, (tiles * steps + 1,), (1,))
        dense = torch.zeros(tiles * 16, steps * 64, dtype=torch.int8)
        for unit in range(tiles * steps):
            at = packed + parts["values_off"] + 16 * int(offsets[unit])
            tile, step = divmod(unit, steps)
            for lane, half, i in itertools.product(range(32), range(2), range(16)):
                if int(maps[tile, step, lane]) >> (16 * half + 4 * (i % 4) + i // 4) & 1:
                    value = int(view(at, torch.int8, (1,), (1,)))
                    dense[16 * tile + lane // 4 + 8 * half, 64 * step + 16 * (lane % 4) + i] = value
                    at += 1
            assert at <= packed + parts["values_off"] + 16 * int(offsets[unit + 1])
        assert not dense[n:].any() and not dense[:, k:].any()
        return dense[:n, :k]

    def sparse_linear_layout(self, n: int, k: int, order: int = 0) -> dict[str, int]:
        size = 2 if order == 2 else 1
        return {"sums_off": up(n * k * size, 128), "total": up(n * k * size, 128) + 4 * n}

    def sparse_linear_pack(
        self, values: int, places: int, n: int, kept: int, packed: int, order: int, *_: int
    ) -> None:
        self.calls.append("pack for wgmma" if order == 1 else "pack")
        if order == 2:  # as it comes: all 16 bits are carried
            halves = view(values, torch.int16, (n, kept), (kept, 1)).float()
            dense = decode(
                halves, None, view(places, torch.uint8, (n, kept // 4), (kept // 4, 1)), "2:4", (n, 2 * kept)
            )
            view(packed, torch.int16, (n, 2 * kept), (2 * kept, 1)).copy_(dense)
            return
        layout = (
            view(values, torch.int8, (n, kept), (kept, 1)),
            view(places, torch.uint8, (n, kept // 4), (kept // 4, 1)),
        )
        dense = decode(layout[0], None, layout[1], "2:4", (n, 2 * kept))
        view(packed, torch.int8, (n, 2 * kept), (2 * kept, 1)).copy_(dense)
        sums = packed + self.sparse_linear_layout(n, 2 * kept)["sums_off"]
        view(sums, torch.int32, (n,), (1,)).copy_(dense.sum(1))

    def sparse_linear_plan(self, packed: int, n: int, k: int, order: int, tail: dict[str, int]) -> bytes:
        padded = up(k, 8)
        assert (order == 2) == (tail["mode"] == tails.NONE)
        if order == 2:
            return pickle.dumps((packed, padded, n, k, tail))
        dense = torch.zeros(n * up(k, 16) + 16, dtype=torch.int8)
        dense = dense[-dense.data_ptr() % 16 :][: n * up(k, 16)].view(n, -1)
        if order == 3:
            sums = packed + self.sparse_linear_bitmap_layout(n, k)["sums_off"]
            dense[:, :k] = self._of_bits(packed, n, k)
        else:
            sums = packed + self.sparse_linear_layout(n, padded)["sums_off"]
            dense[:, :k] = view(packed, torch.int8, (n, padded), (padded, 1))[:, :k]
        self.kept.append(dense)
        return pickle.dumps((dense.data_ptr(), dense.shape[1], sums, n, k, tail))

    def sparse_linear_workspace(self, *arguments: Any) -> int:
        if len(pickle.loads(arguments[0])) == 5:  # float values: x as it is, or a copy
            assert arguments[6] == 1 or arguments[1] == 1
            return 2 * arguments[4] * up(arguments[5], 16) + 256
        return self.int8_linear_workspace(*arguments)

    def sparse_linear_run(self, *arguments: Any) -> int:
        if len(held := pickle.loads(arguments[0])) == 5:
            return self._float_product(held, *arguments[1:])
        return self.int8_linear_run(*arguments)

    def _float_product(
        self, held: tuple[Any, ...], kernel: int, x: int, x_code: int, m: int, *rest: int
    ) -> int:
        stride_m, stride_k, y_code, device, y, ldy, _, stream = rest
        packed, padded, n, k, tail = held
        assert (device, stream) == (-1, 7) and (stride_k == 1 or k == 1) and (m < 2 or stride_m >= k)
        if m == 0:
            return 2 if kernel < 0 else kernel
        rows = view(x, DTYPES[x_code], (m, k), (stride_m, stride_k)).double()
        weight = view(packed, DTYPES[x_code], (n, k), (padded, 1)).double()
        out = rows @ weight.T
        if tail["bias"]:
            out += view(tail["bias"], torch.float32, (n,), (1,))
        view(y, DTYPES[y_code], (m, ldy), (ldy, 1))[:, :n] = out.relu() if tail["activation"] == 1 else out
        return 2 if kernel < 0 else kernel

    # The same for pixels: a 1x1 convolution of the dense weight.

    def sparse_conv2d_kernels(self) -> list[str]:
        return ["conv_a", "conv_b"]

    def sparse_conv2d_workspace(self, *arguments: int) -> int:
        return self.int8_conv2d_workspace(*arguments)

    def sparse_conv2d_plan(self, *arguments: Any) -> bytes:
        return self.int8_conv2d_plan(*arguments)

    def sparse_conv2d_run(self, *arguments: Any) -> int:
        return self.int8_conv2d_run(*arguments)

    # Convolution: the pack is the weight with channels last, and the sums of its rows.

    def int8_conv2d_kernels(self) -> list[str]:
        return ["conv_a", "conv_b"]

    def int8_conv2d_layout(self, outputs: int, k: int) -> dict[str, int]:
        return self.sparse_linear_layout(outputs, k)

    def int8_conv2d_pack(self, weight: int, outputs: int, k: int, packed: int, *_: int) -> None:
        self.calls.append("pack")
        rows = view(weight, torch.int8, (outputs, k), (k, 1))
        view(packed, torch.int8, (outputs, k), (k, 1)).copy_(rows)

    def int8_conv2d_plan(self, *arguments: Any) -> bytes:
        return pickle.dumps(arguments)

    def int8_conv2d_workspace(self, batch: int, sample: int) -> int:
        return up(batch * up(sample, 16), 128) + up(4 * batch, 128) + 128

    def int8_conv2d_run(self, plan: bytes, kernel: int, x: int, x_code: int, *rest: int) -> int:
        batch, height, width, y, ldy, y_code, _, device, stream = rest
        assert (device, stream) == (-1, 7)
        packed, n, (channels, kh, kw, sh, sw, ph, pw, dh, dw), tail = pickle.loads(plan)
        self.calls.append("run")

        def value(name: str, dtype: torch.dtype, count: int = 1) -> Tensor | None:
            return view(tail[name], dtype, (count,), (1,)).clone() if tail[name] else None

        if batch == 0:
            return 1 if kernel < 0 else kernel
        sample = height * width * channels
        pixels = view(
            x, DTYPES[x_code], (batch, height, width, channels), (sample, width * channels, channels, 1)
        )
        k = kh * kw * channels
        weight = view(packed, torch.int8, (n, kh, kw, channels), (k, kw * channels, channels, 1))
        out = conv_reference(
            pixels.permute(0, 3, 1, 2),
            weight.permute(0, 3, 1, 2),
            view(tail["weight_scale"], torch.float32, (n,), (1,)),
            value("bias", torch.float32, n),
            stride=(sh, sw),
            padding=(ph, pw),
            dilation=(dh, dw),
            x_scale=value("x_scale", torch.float32, tail["x_scales"] or 1),
            x_zero_point=value("x_zero_point", torch.int32),
            activation=("none", "relu", "gelu", "gelu_tanh", "silu")[tail["activation"]],
            out_scale=value("out_scale", torch.float32),
            out_zero_point=value("out_zero_point", torch.int32),
            out_dtype=DTYPES[y_code],
        ).permute(0, 2, 3, 1)
        oh, ow = out.shape[1:3]
        view(y, DTYPES[y_code], (batch, oh, ow, ldy), (oh * ow * ldy, ow * ldy, ldy, 1))[..., :n] = out
        return 1 if kernel < 0 else kernel

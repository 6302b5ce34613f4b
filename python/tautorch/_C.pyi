"""CPU kernels. Pointers are integers (``Tensor.data_ptr()``); whoever calls keeps the memory alive."""

from typing import Any

def isas() -> dict[str, bool]: ...
def set_thread_pool(parallel_for: int, num_threads: int) -> None: ...
def max_threads() -> int: ...
def scratch_allocations() -> int: ...
def fork_join(repeats: int, tasks: int) -> None: ...
def read_lines(address: int, bytes: int) -> int: ...  # benches: the sum of a word of every cache line
def unchanged(
    seen: list[tuple[dict[str, Any], str, object]], stamps: list[tuple[Any, tuple[Any, ...]]], /
) -> bool: ...
def recall(
    entries: dict[int, list[tuple[Any, ...]]],
    epoch: int,
    dtype: object,
    width: int,
    arguments: tuple[Any, ...],
    /,
) -> Any: ...
def where_plain(state: tuple[Any, ...], parameters: dict[str, Any], x: Any, /) -> int: ...
def eager_call(state: tuple[Any, ...], module: dict[str, Any], x: Any, /) -> tuple[Any, ...] | None: ...
def direct_call(
    state: tuple[Any, ...],
    usual: tuple[Any, ...],
    forward: Any,
    makers: tuple[Any, Any] | None,
    type: Any,
    module: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    /,
) -> Any: ...
def run_rows(run: Any, call: tuple[Any, ...], x: Any, /) -> Any: ...
def run_images(makers: tuple[Any, Any], run: Any, call: tuple[Any, ...], x: Any, /) -> Any: ...
def peak_i8(kernel: str, rounds: int) -> int: ...
def peak_f32(kernel: str, rounds: int) -> int: ...
def last_used(op: str) -> str | None: ...
def dense_pack_bytes(kernel: str, kind: int, groups: int, n: int, k: int, taps: int) -> int: ...
def pairs_pay(kernel: str, n: int, k: int) -> bool: ...
def grouped_fits(kernel: str, groups: int, n: int, k: int, taps: int) -> bool: ...
def dense_pack(
    kernel: str,
    kind: int,
    groups: int,
    n: int,
    k: int,
    taps: int,
    w: int,
    sn: int,
    sk: int,
    st: int,
    out: int,
) -> None: ...
def dense_unpack(packed: int, bytes: int, w: int, sn: int, sk: int, st: int) -> None: ...
def sparse_pack_bytes(
    kernel: str,
    kind: int,
    gs: int,
    groups: int,
    n: int,
    k: int,
    taps: int,
    sparse_groups: int,
    start: int,
    index: int,
    form: int,
) -> int: ...
def sparse_pack(
    kernel: str,
    kind: int,
    gs: int,
    groups: int,
    n: int,
    k: int,
    taps: int,
    sparse_groups: int,
    start: int,
    index: int,
    values: int,
    form: int,
    out: int,
) -> None: ...
def sparse_unpack(packed: int, bytes: int, start: int, index: int, values: int) -> int: ...
def pack_info(packed: int, bytes: int) -> dict[str, int | str]: ...
def int8_linear_plan(packed: int, bytes: int, k: int, tail: dict[str, int]) -> bytes: ...
def int8_linear_run(
    plan: bytes, x: int, x_dtype: int, m: int, x_stride: int, out: int, out_dtype: int, /
) -> None: ...
def sparse_linear_plan(packed: int, bytes: int, k: int, tail: dict[str, int]) -> bytes: ...
def sparse_linear_run(
    plan: bytes, x: int, x_dtype: int, m: int, x_stride: int, out: int, out_dtype: int, /
) -> None: ...
def lowrank_linear_plan(
    down: int,
    down_bytes: int,
    up: int,
    up_bytes: int,
    k: int,
    down_scale: int,
    residual: int,
    residual_bytes: int,
    residual_scale: int,
    tail: dict[str, int],
) -> bytes: ...
def lowrank_linear_run(
    plan: bytes, x: int, x_dtype: int, m: int, x_stride: int, out: int, out_dtype: int, /
) -> None: ...

# in_channels, kh, kw, sh, sw, ph, pw, dh, dw
_Geometry = tuple[int, ...]

def int8_conv2d_plan(packed: int, bytes: int, geometry: _Geometry, tail: dict[str, int]) -> bytes: ...
def sparse_conv2d_plan(packed: int, bytes: int, geometry: _Geometry, tail: dict[str, int]) -> bytes: ...
def lowrank_conv2d_plan(
    down: int,
    down_bytes: int,
    up: int,
    up_bytes: int,
    down_scale: int,
    geometry: _Geometry,
    tail: dict[str, int],
) -> bytes: ...
def int8_conv2d_run(
    plan: bytes,
    x: int,
    x_dtype: int,
    batch: int,
    height: int,
    width: int,
    x_channels_last: int,
    out: int,
    out_dtype: int,
    out_channels_last: int,
    /,
) -> None: ...
def sparse_conv2d_run(
    plan: bytes,
    x: int,
    x_dtype: int,
    batch: int,
    height: int,
    width: int,
    x_channels_last: int,
    out: int,
    out_dtype: int,
    out_channels_last: int,
    /,
) -> None: ...
def lowrank_conv2d_run(
    plan: bytes,
    x: int,
    x_dtype: int,
    batch: int,
    height: int,
    width: int,
    x_channels_last: int,
    out: int,
    out_dtype: int,
    out_channels_last: int,
    /,
) -> None: ...

"""CUDA kernels. Addresses are integers (``Tensor.data_ptr()``, 0 for none), ``stream`` is a ``cudaStream_t``.

Whoever calls keeps the memory alive. Everything is asynchronous on ``stream`` of ``device`` and can be captured.
"""

def runtime_version() -> int: ...
def driver_version() -> int: ...
def quantize_rows(
    x: int,
    dtype: int,
    stride_m: int,
    stride_k: int,
    m: int,
    k: int,
    x_scale: int,
    zero_point: int,
    q: int,
    ldq: int,
    scale: int,
    device: int,
    stream: int,
    /,
) -> None: ...

MAX_HELD: int

def quantize_rows_after(
    x: int,
    dtype: int,
    stride_m: int,
    m: int,
    k: int,
    stage: int,
    weight: int,
    bias: int,
    gate: int,
    gate_stride_m: int,
    eps: float,
    x_scale: int,
    zero_point: int,
    q: int,
    ldq: int,
    scale: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def int8_linear_kernels() -> list[str]: ...
def int8_linear_supports(
    kernel: str, capability: int, m: int, n: int, k: int, weight_only: bool, x_dtype: int, /
) -> str | None: ...
def int8_linear_choose(
    capability: int, multiprocessors: int, m: int, n: int, k: int, weight_only: bool, x_dtype: int, /
) -> str | None: ...
def int8_linear_layout(n: int, k: int, /) -> dict[str, int]: ...
def int8_linear_pack(
    weight: int, stride_n: int, n: int, k: int, packed: int, device: int, stream: int, /
) -> None: ...
def int8_linear_sums(
    weight: int, stride_n: int, n: int, k: int, sums: int, device: int, stream: int, /
) -> None: ...
def int8_linear_plan(weight: int, ldw: int, sums: int, n: int, k: int, tail: dict[str, int], /) -> bytes: ...
def int8_linear_kernel_workspace(
    kernel: str, multiprocessors: int, m: int, n: int, k: int, y_dtype: int, /
) -> int: ...
def int8_linear_workspace(
    plan: bytes,
    kernel: int,
    x: int,
    x_dtype: int,
    m: int,
    stride_m: int,
    stride_k: int,
    y_dtype: int,
    device: int,
    /,
) -> int: ...
def int8_linear_run(
    plan: bytes,
    kernel: int,
    x: int,
    x_dtype: int,
    m: int,
    stride_m: int,
    stride_k: int,
    y_dtype: int,
    device: int,
    y: int,
    ldy: int,
    workspace: int,
    stream: int,
    /,
) -> int: ...
def sparse_linear_kernels() -> list[str]: ...
def sparse_linear_supports(
    kernel: str, capability: int, m: int, n: int, k: int, x_dtype: int, /
) -> str | None: ...
def sparse_linear_choose(
    capability: int, multiprocessors: int, m: int, n: int, k: int, x_dtype: int, /
) -> str | None: ...
def sparse_linear_order(kernel: str, /) -> int: ...
def sparse_linear_layout(n: int, k: int, order: int, /) -> dict[str, int]: ...
def sparse_linear_pack(
    values: int, places: int, n: int, kept: int, packed: int, order: int, device: int, stream: int, /
) -> None: ...
def sparse_linear_bitmap(rows: int, /) -> str: ...
def sparse_linear_bitmap_layout(n: int, k: int, /) -> dict[str, int]: ...
def sparse_linear_plan(packed: int, n: int, k: int, order: int, tail: dict[str, int], /) -> bytes: ...
def sparse_linear_workspace(
    plan: bytes,
    kernel: int,
    x: int,
    x_dtype: int,
    m: int,
    stride_m: int,
    stride_k: int,
    y_dtype: int,
    device: int,
    /,
) -> int: ...
def sparse_linear_run(
    plan: bytes,
    kernel: int,
    x: int,
    x_dtype: int,
    m: int,
    stride_m: int,
    stride_k: int,
    y_dtype: int,
    device: int,
    y: int,
    ldy: int,
    workspace: int,
    stream: int,
    /,
) -> int: ...
def int8_conv2d_kernels() -> list[str]: ...
def int8_conv2d_supports(
    capability: int, groups: int, channels: int, outputs: int, taps: int, /
) -> str | None: ...
def int8_conv2d_choose(multiprocessors: int, pixels: int, outputs: int, /) -> str: ...
def int8_conv2d_layout(outputs: int, k: int, /) -> dict[str, int]: ...
def int8_conv2d_pack(weight: int, outputs: int, k: int, packed: int, device: int, stream: int, /) -> None: ...
def int8_conv2d_plan(
    packed: int, outputs: int, geometry: tuple[int, ...], tail: dict[str, int], /
) -> bytes: ...
def int8_conv2d_workspace(batch: int, sample: int, /) -> int: ...
def int8_conv2d_run(
    plan: bytes,
    kernel: int,
    x: int,
    x_dtype: int,
    batch: int,
    height: int,
    width: int,
    y: int,
    ldy: int,
    y_dtype: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> int: ...
def sparse_conv2d_kernels() -> list[str]: ...
def sparse_conv2d_supports(
    capability: int, groups: int, channels: int, outputs: int, taps: int, /
) -> str | None: ...
def sparse_conv2d_choose(multiprocessors: int, pixels: int, outputs: int, /) -> str: ...
def sparse_conv2d_layout(outputs: int, k: int, /) -> dict[str, int]: ...
def sparse_conv2d_plan(
    packed: int, outputs: int, geometry: tuple[int, ...], tail: dict[str, int], /
) -> bytes: ...
def sparse_conv2d_workspace(batch: int, sample: int, /) -> int: ...
def sparse_conv2d_run(
    plan: bytes,
    kernel: int,
    x: int,
    x_dtype: int,
    batch: int,
    height: int,
    width: int,
    y: int,
    ldy: int,
    y_dtype: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> int: ...

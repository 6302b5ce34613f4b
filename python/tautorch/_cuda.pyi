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
def int8_linear_kernels() -> list[str]: ...
def int8_linear_supports(kernel: str, capability: int, m: int, n: int, k: int, /) -> str | None: ...
def int8_linear_choose(capability: int, multiprocessors: int, m: int, n: int, k: int, /) -> str | None: ...
def int8_linear_layout(n: int, k: int, /) -> dict[str, int]: ...
def int8_linear_pack(
    weight: int, stride_n: int, n: int, k: int, packed: int, device: int, stream: int, /
) -> None: ...
def int8_linear_sums(
    weight: int, stride_n: int, n: int, k: int, sums: int, device: int, stream: int, /
) -> None: ...
def int8_linear_plan(weight: int, ldw: int, sums: int, n: int, k: int, tail: dict[str, int], /) -> bytes: ...
def int8_linear_workspace(x: int, x_dtype: int, m: int, k: int, stride_m: int, stride_k: int, /) -> int: ...
def int8_linear_run(
    plan: bytes,
    kernel: int,
    x: int,
    x_dtype: int,
    m: int,
    stride_m: int,
    stride_k: int,
    y: int,
    ldy: int,
    y_dtype: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> int: ...

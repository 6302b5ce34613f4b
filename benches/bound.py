"""Threads of torch bound to cores, one each; import before torch.

As ONNX Runtime, OpenVINO and DeepSparse bind theirs. Otherwise Linux at times keeps two threads on one core
for tenths of a second: in 3 of 20 looks at a machine with two cores a layer took what it takes one thread.
"""

from __future__ import annotations

import os

CORES: set[int] | None = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
"""What this process may run on; its first thread is bound to one of them once torch is there."""

os.environ.setdefault("OMP_PROC_BIND", "true")


def unbind(pid: int) -> None:
    """Give a process that was just started all of them: it inherits its parent's one."""
    if CORES is not None:
        os.sched_setaffinity(pid, CORES)

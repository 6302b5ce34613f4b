"""ONNX Runtime: dynamically quantised as its own tool does it, and statically; the harness takes the better.

Layers between QuantizeLinear and DequantizeLinear (QDQ) with float output are not among them: ONNX Runtime
1.31 dequantises the weight at every call there (4.5 ms against 36 us at 1 x 1024 x 4096).
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_models as models
import onnxruntime as ort
from loaded import Loaded, arrays


def version() -> str:
    return str(ort.__version__)


def load(case: dict[str, Any]) -> dict[str, Loaded]:
    if case["kind"] != "linear":
        raise ValueError(f"ONNX Runtime worker: no {case['dtype']} {case['kind']}")
    x, weight, bias = arrays(case)
    if case["dtype"] == "fp32":
        return {"fp32": _session(models.linear_fp32(x, weight, bias), x, case["threads"])}
    return {
        "dynamic": _session(models.linear_dynamic(x, weight, bias), x, case["threads"]),
        "static": _session(models.linear_static(x, weight, bias), x, case["threads"]),
    }


def _session(model: onnx.ModelProto, x: Any, threads: int) -> Loaded:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x}
    # `run` takes 20 us less than `run_with_iobinding`
    return Loaded(lambda: session.run(None, feed), lambda: session.run(None, feed)[0], "CPUExecutionProvider")

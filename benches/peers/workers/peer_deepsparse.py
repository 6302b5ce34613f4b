"""DeepSparse 1.8.0: static int8 in the two forms it runs by itself.

DynamicQuantizeLinear ends its process, and layers between QuantizeLinear and DequantizeLinear (QDQ) go to the
ONNX Runtime inside it, in float.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "1"

import deepsparse
import numpy as np
import onnx
import onnx_models as models
from deepsparse.engine import Engine
from loaded import Loaded, arrays


def version() -> str:
    return str(deepsparse.__version__)


def load(case: dict[str, Any]) -> dict[str, Loaded]:
    if case["kind"] == "mlp":
        x, *weights = (np.load(case[name]) for name in ("x", "weight", "weight2", "bias", "bias2"))
        model = models.two_static(x, weights[:2], weights[2:])
        return {"MatMulInteger": _engine(model, x, case["threads"])}
    if case["kind"] != "linear":
        raise ValueError(f"DeepSparse worker: no {case['dtype']} {case['kind']}")
    x, weight, bias = arrays(case)
    if case["dtype"] == "fp32":
        return {"MatMul": _engine(models.linear_fp32(x, weight, bias), x, case["threads"])}
    return {
        "MatMulInteger": _engine(models.linear_static(x, weight, bias), x, case["threads"]),
        "QLinearMatMul": _engine(models.linear_qlinear(x, weight, bias), x, case["threads"]),
    }


def _engine(model: onnx.ModelProto, x: Any, threads: int) -> Loaded:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        onnx.save(model, path)
        engine = Engine(path, batch_size=len(x), num_cores=threads)
    share = engine.fraction_of_supported_ops
    kernel = engine.cpu_avx_type if share == 1 else f"{share:.0%} in its own engine"
    feed = [x]
    return Loaded(lambda: engine.run(feed, val_inp=False), lambda: engine.run(feed)[0], kernel)

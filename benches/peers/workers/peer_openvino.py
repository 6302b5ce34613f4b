"""OpenVINO: the graphs that NNCF makes, written with OpenVINO's own operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from loaded import Loaded, arrays, quantize_weight, range_of
from openvino import opset13 as op

_CORE = ov.Core()


def version() -> str:
    return str(ov.__version__).split("-")[0]


def load(case: dict[str, Any]) -> dict[str, Loaded]:
    """Each way of quantising, each with the blocking and the asynchronous call: which is faster varies."""
    x, weight, bias = arrays(case)
    loaded: dict[str, Loaded] = {}
    for name, model, fed, settings in _models(case, x, weight, bias):
        compiled = _CORE.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": case["threads"],
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",  # the default may be bf16
                **settings,
            },
        )
        kernel = _kernel(compiled)
        if name in ("static", "NCHW", "NHWC") and "i8" not in kernel.lower():
            raise RuntimeError(f"OpenVINO did not run its {name} model in int8 but on {kernel}")
        for way in ("infer", "async"):
            loaded[f"{name}, {way}"] = _loaded(compiled, fed, way, kernel, name)
    return loaded


def _loaded(compiled: Any, fed: Any, way: str, kernel: str, name: str) -> Loaded:
    """The input is bound once: less work per call than handing an array over."""
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(fed, shared_memory=True))

    def blocking() -> None:
        request.infer()

    def asynchronous() -> None:
        request.start_async()
        request.wait()

    def output() -> Any:
        assert fed is not None  # the request reads its memory and does not keep it alive
        y = request.get_output_tensor().data
        return y.transpose(0, 3, 1, 2) if name == "NHWC" else y

    return Loaded(blocking if way == "infer" else asynchronous, output, kernel)


def _models(case: dict[str, Any], x: Any, weight: Any, bias: Any) -> Any:
    """(name, model, input array, settings)"""
    if case["kind"] == "linear" and case["dtype"] == "fp32":
        yield "fp32", _linear(x, op.constant(weight), bias, None), x, {}
    elif case["kind"] == "linear":
        yield "static", _linear(x, _int8_constant(weight), bias, range_of(x)), x, {}
        group = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": int(x.shape[1])}
        yield "dynamic", _linear(x, _int8_constant(weight), bias, None), x, group
    elif case["kind"] == "conv":
        yield "NCHW", _conv(case, x, weight, bias), x, {}
        nhwc = ov.preprocess.PrePostProcessor(_conv(case, x, weight, bias))
        nhwc.input().tensor().set_layout(ov.Layout("NHWC"))
        nhwc.input().model().set_layout(ov.Layout("NCHW"))
        nhwc.output().model().set_layout(ov.Layout("NCHW"))
        nhwc.output().tensor().set_layout(ov.Layout("NHWC"))
        yield "NHWC", nhwc.build(), np.ascontiguousarray(x.transpose(0, 2, 3, 1)), {}
    else:
        raise ValueError(f"OpenVINO worker: no {case['dtype']} {case['kind']}")


def _int8_constant(weight: Any) -> Any:
    q, scale = quantize_weight(weight)
    shape = (-1, *([1] * (weight.ndim - 1)))
    return op.multiply(op.convert(op.constant(q), np.float32), op.constant(scale.reshape(shape)))


def _fake_quantize(x: Any, r: Any) -> Any:
    low, high = op.constant(np.float32(r.low)), op.constant(np.float32(r.high))
    return op.fake_quantize(x, low, high, low, high, 256)


def _linear(x: Any, weight: Any, bias: Any, static: Any) -> Any:
    given = op.parameter([*x.shape], np.float32, name="x")
    quantized = given if static is None else _fake_quantize(given, static)
    y = op.add(op.matmul(quantized, weight, False, True), op.constant(bias))
    return ov.Model([op.result(y)], [given], "linear")


def _conv(case: dict[str, Any], x: Any, weight: Any, bias: Any) -> Any:
    given = op.parameter([*x.shape], np.float32, name="x")
    stride, pad = [case["stride"]] * 2, [case["padding"]] * 2
    filters = _int8_constant(weight)
    y = op.convolution(_fake_quantize(given, range_of(x)), filters, stride, pad, pad, [1, 1])
    y = op.add(y, op.constant(bias.reshape(1, -1, 1, 1)))
    return ov.Model([op.result(y)], [given], "conv")


def _kernel(compiled: Any) -> str:
    """What the product runs on, as OpenVINO names it."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items() if "Type" in key}
        if info.get("layerType") in ("FullyConnected", "MatMul", "Convolution"):
            return str(info.get("primitiveType", ""))
    return "?"

"""Linear layers as ONNX graphs, float in and float out."""

from __future__ import annotations

from typing import Any

import numpy as np
from loaded import quantize_weight, range_of
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSET, IR = 13, 7  # what DeepSparse 1.8 takes; newer runtimes take it too


class _Graph:
    """Nodes and constants in the order they come."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, op: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, list(outputs), **attributes))
        return outputs[0]

    def model(self, shape_in: list[int], shape_out: list[int]) -> ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)
        graph = helper.make_graph(self.nodes, "linear", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR
        return model


def linear_fp32(x: Any, weight: Any, bias: Any) -> ModelProto:
    """MatMul, Add."""
    g = _Graph()
    g.constant("w", weight.T)
    g.constant("b", bias)
    g.add("MatMul", ["x", "w"], "xw")
    g.add("Add", ["xw", "b"], "y")
    return g.model([*x.shape], [x.shape[0], weight.shape[0]])


def linear_dynamic(x: Any, weight: Any, bias: Any) -> ModelProto:
    """DynamicQuantizeLinear, MatMulInteger, scale, Add: what ONNX Runtime's quantize_dynamic makes."""
    g = _Graph()
    g.add("DynamicQuantizeLinear", ["x"], "x_q", "x_scale", "x_zero")
    _integer(g, "x", weight, bias, "y")
    return g.model([*x.shape], [x.shape[0], weight.shape[0]])


def linear_static(x: Any, weight: Any, bias: Any) -> ModelProto:
    """QuantizeLinear by a calibrated range, MatMulInteger, scale, Add: what SparseML exports."""
    g = _Graph()
    _quantize(g, "x", x)
    _integer(g, "x", weight, bias, "y")
    return g.model([*x.shape], [x.shape[0], weight.shape[0]])


def two_static(x: Any, weights: list[Any], biases: list[Any]) -> ModelProto:
    """Two layers of `linear_static` in a row; runtimes pass uint8 from the first to the second."""
    g = _Graph()
    _quantize(g, "x", x)
    _integer(g, "x", weights[0], biases[0], "h")
    _quantize(g, "h", x @ weights[0].T + biases[0])
    _integer(g, "h", weights[1], biases[1], "y")
    return g.model([*x.shape], [x.shape[0], weights[1].shape[0]])


def _quantize(g: _Graph, name: str, values: Any) -> None:
    r = range_of(values)
    g.constant(f"{name}_scale", r.scale)
    g.constant(f"{name}_zero", r.zero_point)
    g.add("QuantizeLinear", [name, f"{name}_scale", f"{name}_zero"], f"{name}_q")


def _integer(g: _Graph, x: str, weight: Any, bias: Any, y: str) -> None:
    """y from quantised x; the weight has one scale per output."""
    q, scale = quantize_weight(weight)
    g.constant(f"{y}_wq", q.T)
    g.constant(f"{y}_w_scale", scale)
    g.constant(f"{y}_w_zero", np.zeros_like(scale, dtype=np.int8))
    g.constant(f"{y}_bias", bias)
    g.add("MatMulInteger", [f"{x}_q", f"{y}_wq", f"{x}_zero", f"{y}_w_zero"], f"{y}_acc")
    g.add("Cast", [f"{y}_acc"], f"{y}_wide", to=TensorProto.FLOAT)
    g.add("Mul", [f"{x}_scale", f"{y}_w_scale"], f"{y}_factor")
    g.add("Mul", [f"{y}_wide", f"{y}_factor"], f"{y}_product")
    g.add("Add", [f"{y}_product", f"{y}_bias"], y)


def linear_qlinear(x: Any, weight: Any, bias: Any) -> ModelProto:
    """QuantizeLinear, QLinearMatMul, DequantizeLinear, Add: uint8 on the way out, one weight scale."""
    g, out = _Graph(), range_of(x[:64] @ weight.T)
    q, scale = quantize_weight(weight.reshape(1, *weight.shape))
    _quantize(g, "x", x)
    for name, value in (
        ("wq", q[0].T), ("w_scale", scale[0]), ("w_zero", np.int8(0)),
        ("p_scale", out.scale), ("p_zero", out.zero_point), ("b", bias),
    ):  # fmt: skip
        g.constant(name, value)
    weights, product = ["wq", "w_scale", "w_zero"], ["p_scale", "p_zero"]
    g.add("QLinearMatMul", ["x_q", "x_scale", "x_zero", *weights, *product], "p_q")
    g.add("DequantizeLinear", ["p_q", *product], "p")
    g.add("Add", ["p", "b"], "y")
    return g.model([*x.shape], [x.shape[0], weight.shape[0]])

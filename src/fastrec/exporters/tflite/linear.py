"""Matrix products: FULLY_CONNECTED with bias and ReLU where weights are constant, in int8 too."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastrec.errors import BackendError
from fastrec.exporters.tflite.conversion import Conversion, attributes, int8_scales
from fastrec.exporters.tflite.graph import Scales


def matrix_product(c: Conversion, node: Any) -> None:
    """MatMul; what follows it (a bias, a ReLU) becomes part of it."""
    left, right = node.input
    weight = c.constants.get(right)
    if right in c.quantised:
        weight = c.quantised[right][0]
    if weight is None or weight.ndim != 2:
        options = c.graph.options("BatchMatMul")
        inputs = [c.read(left), c.read(right)]
        c.graph.operator("BATCH_MATMUL", inputs, [c.result(node.output[0])], options)
        return
    bias, relu, end = _what_follows(c, node.output[0], weight.shape[1])
    if right in c.quantised and c.int8 == "kernels" and _int8_layer(c, node, bias, relu, end):
        return
    if right in c.quantised:
        values, scales = c.quantised[right]
        rows = c.dequantised(values.T, Scales(scales.scale, scales.zero_point, 0), f"{right}.rows")
    else:
        rows = _rows(c, weight.T, f"{right}.rows")
    _fully_connected(c, [c.read(left), rows, bias], c.result(end), relu)


def linear_layer(c: Conversion, node: Any) -> None:
    """Gemm of a row-wise input with a constant weight, as exporters write linear layers."""
    given = attributes(node)
    weight = c.value(node.input[1])
    if given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0 or given.get("transA"):
        raise BackendError("no TFLite form of a Gemm with factors or a transposed input")
    rows = _rows(c, weight if given.get("transB") else weight.T, f"{node.input[1]}.rows")
    bias = c.read(node.input[2]) if len(node.input) > 2 and node.input[2] else -1
    _, relu, end = _what_follows(c, node.output[0], -1)
    _fully_connected(c, [c.read(node.input[0]), rows, bias], c.result(end), relu)


def _what_follows(c: Conversion, name: str, width: int) -> tuple[int, bool, str]:
    """The bias (or -1) and ReLU that alone read a product, and the value at their end."""
    bias, relu = -1, False
    add = c.only_reader(name, "Add")
    if add is not None:
        other = add.input[1] if add.input[0] == name else add.input[0]
        if other in c.constants and c.constants[other].shape == (width,):
            bias, name = c.graph.constant(c.constants[other], name=other), add.output[0]
            c.done.add(id(add))
    after = c.only_reader(name, "Relu")
    if after is not None:
        relu, name = True, after.output[0]
        c.done.add(id(after))
    return bias, relu, name


def _rows(c: Conversion, weight: np.ndarray, name: str) -> int:
    """A float weight [N, K] as it is to be stored; int8 rows make LiteRT quantise the input too."""
    if c.weights != "int8":
        return c.weight(weight, name)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0).astype(np.float32) / 127
    values = np.rint(weight / scale).astype(np.int8)
    return c.graph.constant(values, name=name, scales=Scales.of(scale, np.zeros(len(scale))))


def _fully_connected(c: Conversion, inputs: list[int], output: int, relu: bool) -> None:
    options = c.graph.options(
        "FullyConnected",
        keepNumDims=True,
        # Of a float input with int8 weights: with a zero point, which ReLU's outputs gain by.
        asymmetricQuantizeInputs=c.weights == "int8",
        fusedActivationFunction=c.graph.relu() if relu else 0,
    )
    c.graph.operator("FULLY_CONNECTED", inputs, [output], options)


def _int8_layer(c: Conversion, node: Any, bias: int, relu: bool, end: str) -> bool:
    """A layer from integers to integers on LiteRT's int8 kernel; whether it is one."""
    before, after = c.makers.get(node.input[0]), c.only_reader(end, "QuantizeLinear")
    if before is None or before.op_type != "DequantizeLinear" or after is None:
        return False
    source = c.read(before.input[0])
    in_scales = c.graph.tensors[source].scales
    assert in_scales is not None
    values, scales = c.quantised[node.input[1]]
    by_row = Scales(scales.scale, scales.zero_point, 0)
    rows = c.graph.constant(values.T, name=f"{node.input[1]}.rows", scales=by_row)
    if bias != -1:
        stored = c.graph.tensors[bias]
        scale = in_scales.scale * scales.scale
        whole = np.rint(c.constants[stored.name] / scale)
        limits = np.iinfo(np.int32)
        bias = c.graph.constant(
            whole.clip(limits.min, limits.max).astype(np.int32),
            name=f"{stored.name}.int32",
            scales=Scales.of(scale, np.zeros(len(scale))),
        )
    target = c.result(
        after.output[0],
        scales=int8_scales(c.value(after.input[1]), c.value(after.input[2])),
    )
    c.done.add(id(after))
    _fully_connected(c, [source, rows, bias], target, relu)
    return True

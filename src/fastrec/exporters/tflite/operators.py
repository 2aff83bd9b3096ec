"""ONNX operators as TFLite ones, a function each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastrec.errors import BackendError
from fastrec.exporters.tflite.conversion import Conversion, attributes, int8_scales
from fastrec.exporters.tflite.convolution import depthwise
from fastrec.exporters.tflite.linear import linear_layer, matrix_product

Translation = Callable[[Conversion, Any], None]
_INT32_MAX = 2**31 - 1


def _same(kind: str, options: str | None = None) -> Translation:
    """An operator that TFLite has with the same inputs."""

    def translate(c: Conversion, node: Any) -> None:
        inputs = [c.read(name) for name in node.input]
        chosen = None if options is None else c.graph.options(options)
        c.graph.operator(kind, inputs, [c.result(node.output[0])], chosen)

    return translate


def _moves(c: Conversion, node: Any) -> int:
    """The result of an operator that only moves its first input's elements."""
    scales = c.graph.tensors[c.read(node.input[0])].scales
    return c.result(node.output[0], scales=scales)


def _cast(c: Conversion, node: Any) -> None:
    source, name = c.read(node.input[0]), node.output[0]
    if c.graph.tensors[source].dtype == c.dtypes[name]:
        c.tensors[name] = source
        return
    c.graph.operator("CAST", [source], [c.result(name)], c.graph.options("Cast"))


def _identity(c: Conversion, node: Any) -> None:
    c.tensors[node.output[0]] = c.read(node.input[0])


def _clip(c: Conversion, node: Any) -> None:
    limits = [*node.input[1:], "", ""][:2]
    present = [(k, name) for k, name in zip(("MAXIMUM", "MINIMUM"), limits, strict=True) if name]
    source = c.read(node.input[0])
    for i, (kind, name) in enumerate(present):
        last = i == len(present) - 1
        target = c.result(node.output[0]) if last else c.between(node.output[0])
        c.graph.operator(kind, [source, c.read(name)], [target], c.graph.options("MaximumMinimum"))
        source = target
    c.tensors[node.output[0]] = source


def _gather(c: Conversion, node: Any) -> None:
    options = c.graph.options("Gather", axis=attributes(node).get("axis", 0))
    table, name = c.constants.get(node.input[0]), node.output[0]
    rows = c.read(node.input[1])
    if table is not None and c.halved(table):
        # Rows are widened once they are picked: the table stays half as large in memory too.
        stored = c.graph.constant(table.astype(np.float16), name=f"{node.input[0]}.half")
        narrow = c.between(name, dtype="float16")
        c.graph.operator("GATHER", [stored, rows], [narrow], options)
        c.graph.operator("CAST", [narrow], [c.result(name)], c.graph.options("Cast"))
        return
    # A table of int8 rows keeps no scales here: the model multiplies by its own.
    c.graph.operator("GATHER", [c.read(node.input[0]), rows], [c.result(name)], options)


def _reshape(c: Conversion, node: Any) -> None:
    name = node.output[0]
    shape, free = c.shapes[name], c.free[name]
    if sum(free) > 1 and node.op_type != "Reshape":
        _ones(c, node)
        return
    if sum(free) > 1:
        target = c.read(node.input[1])
    else:
        sizes = [-1 if f else d for d, f in zip(shape, free, strict=True)]
        target = c.graph.constant(np.array(sizes, np.int32))
    inputs = [c.read(node.input[0]), target]
    c.graph.operator("RESHAPE", inputs, [_moves(c, node)], c.graph.options("Reshape"))


def _ones(c: Conversion, node: Any) -> None:
    """Squeeze or Unsqueeze around several free sizes, which a RESHAPE could not tell apart."""
    g, name = c.graph, node.output[0]
    source, rank = c.read(node.input[0]), len(c.shapes[node.input[0]])
    if node.op_type == "Squeeze":
        axes = [int(a) % rank for a in c.value(node.input[1]).reshape(-1)]
        g.operator("SQUEEZE", [source], [_moves(c, node)], g.options("Squeeze", squeezeDims=axes))
        return
    axes = sorted(int(a) % len(c.shapes[name]) for a in c.value(node.input[1]).reshape(-1))
    shape, free = list(c.shapes[node.input[0]]), list(c.free[node.input[0]])
    for i, axis in enumerate(axes):
        shape.insert(axis, 1)
        free.insert(axis, False)
        target = _moves(c, node)
        if i < len(axes) - 1:
            target = g.tensor(f"{name}.{i}", shape, c.dtypes[name], free=free)
        inputs = [source, g.constant(np.int32(axis))]
        g.operator("EXPAND_DIMS", inputs, [target], g.options("ExpandDims"))
        source = target


def _transpose(c: Conversion, node: Any) -> None:
    rank = len(c.shapes[node.input[0]])
    order = attributes(node).get("perm", list(range(rank))[::-1])
    inputs = [c.read(node.input[0]), c.graph.constant(np.array(order, np.int32))]
    c.graph.operator("TRANSPOSE", inputs, [_moves(c, node)], c.graph.options("Transpose"))


def _concat(c: Conversion, node: Any) -> None:
    inputs = [c.read(name) for name in node.input]
    options = c.graph.options("Concatenation", axis=attributes(node)["axis"])
    c.graph.operator("CONCATENATION", inputs, [_moves(c, node)], options)


def _slice(c: Conversion, node: Any) -> None:
    name = node.input[0]
    rank = len(c.shapes[name])
    if any(n and n not in c.constants for n in node.input[1:]):
        _computed_slice(c, node)
        return
    starts, ends = (c.value(n).reshape(-1) for n in node.input[1:3])
    has_axes, has_steps = (len(node.input) > i and node.input[i] for i in (3, 4))
    axes = c.value(node.input[3]).reshape(-1) if has_axes else np.arange(len(starts))
    steps = c.value(node.input[4]).reshape(-1) if has_steps else np.ones(len(starts), np.int64)
    begin, end, stride = np.zeros(rank, np.int64), np.zeros(rank, np.int64), np.ones(rank, np.int64)
    whole = (1 << rank) - 1  # bits: this dimension is taken from its start, up to its end
    begin_mask = end_mask = whole
    for axis, start, stop, step in zip(axes % rank, starts, ends, steps, strict=True):
        begin[axis], end[axis], stride[axis] = start, stop, step
        begin_mask &= ~(1 << int(axis))
        # The largest numbers mean "to the end" and do not fit 32 bits.
        if abs(int(stop)) < _INT32_MAX:
            end_mask &= ~(1 << int(axis))
        if abs(int(start)) >= _INT32_MAX:
            begin_mask |= 1 << int(axis)
    options = c.graph.options("StridedSlice", beginMask=begin_mask, endMask=end_mask)
    inputs = [c.read(name)]
    inputs += [
        c.graph.constant(a.clip(-_INT32_MAX, _INT32_MAX).astype(np.int32))
        for a in (begin, end, stride)
    ]
    c.graph.operator("STRIDED_SLICE", inputs, [_moves(c, node)], options)


def _computed_slice(c: Conversion, node: Any) -> None:
    """One axis, from and to what the graph computes."""
    g, name = c.graph, node.input[0]
    rank = len(c.shapes[name])
    axes = c.value(node.input[3]).reshape(-1) if len(node.input) > 3 else np.arange(1)
    steps = c.value(node.input[4]).reshape(-1) if len(node.input) > 4 else np.ones(1)
    if len(axes) != 1 or steps.tolist() != [1]:
        raise BackendError("no TFLite form of a Slice of several axes with computed bounds")
    axis = int(axes[0]) % rank

    def bound(source: str) -> int:
        zeros = [g.constant(np.zeros(n, np.int32)) for n in (axis, rank - 1 - axis)]
        parts = [zeros[0], c.read(source), zeros[1]]
        sizes = (axis, 1, rank - 1 - axis)
        present = [p for p, size in zip(parts, sizes, strict=True) if size]
        if len(present) == 1:
            return present[0]
        joined = g.tensor(f"{node.output[0]}.{len(g.tensors)}", (rank,), "int32")
        g.operator("CONCATENATION", present, [joined], g.options("Concatenation"))
        return joined

    mask = ((1 << rank) - 1) & ~(1 << axis)
    end_mask = mask
    if (
        node.input[2] in c.constants
        and int(c.constants[node.input[2]].reshape(-1)[0]) >= _INT32_MAX
    ):
        end_mask |= 1 << axis
    inputs = [c.read(name), *map(bound, node.input[1:3]), g.constant(np.ones(rank, np.int32))]
    options = g.options("StridedSlice", beginMask=mask, endMask=end_mask)
    g.operator("STRIDED_SLICE", inputs, [_moves(c, node)], options)


def _split(c: Conversion, node: Any) -> None:
    axis = attributes(node).get("axis", 0)
    lengths = np.array([c.shapes[n][axis] for n in node.output], np.int32)
    scales = c.graph.tensors[c.read(node.input[0])].scales
    outputs = [c.result(n, scales=scales) for n in node.output]
    inputs = [c.read(node.input[0]), c.graph.constant(lengths), c.graph.constant(np.int32(axis))]
    options = c.graph.options("SplitV", numSplits=len(outputs))
    c.graph.operator("SPLIT_V", inputs, outputs, options)


def _expand(c: Conversion, node: Any) -> None:
    name, source = node.output[0], c.read(node.input[0])
    if not any(c.free[name]):
        target = c.graph.constant(np.array(c.shapes[name], np.int32))
        c.graph.operator("BROADCAST_TO", [source, target], [_moves(c, node)])
        return
    # ONNX's sizes of 1 mean "as it is", BROADCAST_TO's do not: a product broadcasts as ONNX does.
    ones = c.between(name)
    fill = [c.read(node.input[1]), c.graph.constant(np.ones((), c.dtypes[name]))]
    c.graph.operator("FILL", fill, [ones], c.graph.options("Fill"))
    kind, options = ("MUL", "Mul") if c.dtypes[name] != "bool" else ("LOGICAL_AND", "LogicalAnd")
    c.graph.operator(kind, [source, ones], [c.result(name)], c.graph.options(options))


def _pad(c: Conversion, node: Any) -> None:
    if attributes(node).get("mode", b"constant") != b"constant":
        raise BackendError("no TFLite form of a Pad that repeats or mirrors")
    rank = len(c.shapes[node.input[0]])
    if node.input[1] in c.constants:
        around = c.graph.constant(c.value(node.input[1]).reshape(2, rank).T)
    else:
        rows = c.between(node.input[1], shape=(2, rank))
        shape = c.graph.constant(np.array([2, rank], np.int32))
        c.graph.operator(
            "RESHAPE", [c.read(node.input[1]), shape], [rows], c.graph.options("Reshape")
        )
        around = c.between(node.input[1], shape=(rank, 2))
        order = c.graph.constant(np.array([1, 0], np.int32))
        c.graph.operator("TRANSPOSE", [rows, order], [around], c.graph.options("Transpose"))
    inputs = [c.read(node.input[0]), around]
    if len(node.input) > 2 and node.input[2]:
        value = c.value(node.input[2]).reshape(1)
        if value[0]:
            raise BackendError("no TFLite form of a Pad with anything but zeros")
    c.graph.operator("PAD", inputs, [_moves(c, node)], c.graph.options("Pad"))


def _softmax(c: Conversion, node: Any) -> None:
    rank = len(c.shapes[node.input[0]])
    if attributes(node).get("axis", -1) % rank != rank - 1:
        raise BackendError("no TFLite form of a Softmax over another axis than the last")
    options = c.graph.options("Softmax", beta=1.0)
    c.graph.operator("SOFTMAX", [c.read(node.input[0])], [c.result(node.output[0])], options)


def _layer_norm(c: Conversion, node: Any) -> None:
    g, given, name = c.graph, attributes(node), node.input[0]
    rank, x = len(c.shapes[name]), c.read(node.input[0])
    first = given.get("axis", -1) % rank
    axes = g.constant(np.arange(first, rank, dtype=np.int32))
    shape = (*c.shapes[name][:first], *[1] * (rank - first))

    def row() -> int:
        number = c.between(name, shape=shape)
        g.tensors[number].free = (*c.free[name][:first], *[False] * (rank - first))
        return number

    def binary(kind: str, a: int, b: int, target: int) -> int:
        options = {"SUB": "Sub", "MUL": "Mul", "ADD": "Add"}.get(kind, "SquaredDifference")
        g.operator(kind, [a, b], [target], g.options(options))
        return target

    keep = g.options("Reducer", keepDims=True)
    mean, variance, deviation = row(), row(), row()
    g.operator("MEAN", [x, axes], [mean], keep)
    square = binary("SQUARED_DIFFERENCE", x, mean, c.between(name))
    g.operator("MEAN", [square, axes], [variance], keep)
    epsilon = g.constant(np.float32(given.get("epsilon", 1e-5)))
    g.operator("RSQRT", [binary("ADD", variance, epsilon, row())], [deviation])
    y = binary("SUB", x, mean, c.between(name))
    y = binary("MUL", y, deviation, c.between(name))
    has_bias = len(node.input) > 2 and node.input[2]
    scaled = c.between(name) if has_bias else c.result(node.output[0])
    y = binary("MUL", y, c.read(node.input[1]), scaled)
    if has_bias:
        binary("ADD", y, c.read(node.input[2]), c.result(node.output[0]))


def _reduction(kind: str) -> Translation:
    def translate(c: Conversion, node: Any) -> None:
        given = attributes(node)
        rank = len(c.shapes[node.input[0]])
        if len(node.input) > 1 and node.input[1]:
            axes = c.value(node.input[1]).reshape(-1)
        else:
            axes = np.array(given.get("axes", range(rank)))
        options = c.graph.options("Reducer", keepDims=bool(given.get("keepdims", 1)))
        inputs = [c.read(node.input[0]), c.graph.constant((axes % rank).astype(np.int32))]
        c.graph.operator(kind, inputs, [c.result(node.output[0])], options)

    return translate


def _range(c: Conversion, node: Any) -> None:
    inputs = [c.read(n) for n in node.input]
    c.graph.operator("RANGE", inputs, [c.result(node.output[0])], c.graph.options("Range"))


def _shape(c: Conversion, node: Any) -> None:
    g, given, name = c.graph, attributes(node), node.output[0]
    rank = len(c.shapes[node.input[0]])
    start, end = given.get("start", 0), given.get("end", rank)
    start, end = (v + rank if v < 0 else min(v, rank) for v in (start, end))
    options = g.options("Shape", outType=g.tensor_type("int32"))
    part = (start, end) != (0, rank)
    whole = c.between(name, shape=(rank,)) if part else c.result(name)
    g.operator("SHAPE", [c.read(node.input[0])], [whole], options)
    if part:
        chosen = g.constant(np.arange(start, end, dtype=np.int32))
        g.operator("GATHER", [whole, chosen], [c.result(name)], g.options("Gather"))


def _constant_of_shape(c: Conversion, node: Any) -> None:
    from onnx import numpy_helper

    given = attributes(node).get("value")
    value = np.float32(0) if given is None else numpy_helper.to_array(given).reshape(())
    inputs = [c.read(node.input[0]), c.graph.constant(value)]
    c.graph.operator("FILL", inputs, [c.result(node.output[0])], c.graph.options("Fill"))


def _quantize(c: Conversion, node: Any) -> None:
    scales = int8_scales(c.value(node.input[1]), c.value(node.input[2]))
    target = c.result(node.output[0], scales=scales)
    c.graph.operator("QUANTIZE", [c.read(node.input[0])], [target], c.graph.options("Quantize"))


def _dequantize(c: Conversion, node: Any) -> None:
    name = node.output[0]
    if node.input[0] in c.constants:
        axis = attributes(node).get("axis", 1)
        scale, zero = (c.value(n) for n in node.input[1:3])
        values = c.constants[node.input[0]]
        c.quantised[name] = values, int8_scales(scale, zero, axis if scale.ndim else 0)
        return
    options = c.graph.options("Dequantize")
    c.graph.operator("DEQUANTIZE", [c.read(node.input[0])], [c.result(name)], options)


def _div(c: Conversion, node: Any) -> None:
    """Division, or the beginning of GELU: x / sqrt(2), Erf, + 1, * 0.5, * x."""
    end = _gelu_from(c, node)
    if end is None:
        _same("DIV", "Div")(c, node)
        return
    options = c.graph.options("Gelu", approximate=False)
    c.graph.operator("GELU", [c.read(node.input[0])], [c.result(end)], options)


def _gelu_from(c: Conversion, node: Any) -> str | None:
    """The value at the end of a GELU that begins with this Div, or None; its nodes are done."""
    if node.input[1] not in c.constants or c.constants[node.input[1]].size != 1:
        return None
    if not math.isclose(float(c.constants[node.input[1]].reshape(())), math.sqrt(2), rel_tol=1e-6):
        return None
    nodes = [node]
    for kind in ("Erf", "Add", "Mul", "Mul"):
        after = c.only_reader(nodes[-1].output[0], kind)
        if after is None:
            return None
        nodes.append(after)
    _, _, add, half, product = nodes

    def constant(of: Any) -> float | None:
        known = [c.constants[n] for n in of.input if n in c.constants]
        return float(known[0].reshape(())) if known and known[0].size == 1 else None

    factors = {constant(half), constant(product)} - {None}
    takes_x = node.input[0] in (*half.input, *product.input)
    if constant(add) != 1.0 or factors != {0.5} or not takes_x:
        return None
    c.done.update(id(n) for n in nodes[1:])
    return str(product.output[0])


def _erf(c: Conversion, node: Any) -> None:
    raise BackendError("no TFLite form of Erf outside a GELU")


def _trilu(c: Conversion, node: Any) -> None:
    """The triangle, as a comparison of row and column numbers that are counted when it runs."""
    g, source, name = c.graph, node.input[0], node.output[0]
    offset = int(c.value(node.input[1]).reshape(())) if len(node.input) > 1 and node.input[1] else 0
    shape, free = c.shapes[source], c.free[source]
    sizes = g.tensor(f"{name}.sizes", (len(shape),), "int32")
    options = g.options("Shape", outType=g.tensor_type("int32"))
    g.operator("SHAPE", [c.read(source)], [sizes], options)
    zero, one = g.constant(np.int32(0)), g.constant(np.int32(1))

    def count(axis: int) -> int:
        """0, 1, .. along an axis."""
        size = g.tensor(f"{name}.size{axis}", (), "int32")
        place = g.constant(np.int32(len(shape) + axis))
        g.operator("GATHER", [sizes, place], [size], g.options("Gather"))
        numbers = g.tensor(f"{name}.count{axis}", shape[axis:][:1], "int32", free=free[axis:][:1])
        g.operator("RANGE", [zero, size, one], [numbers], g.options("Range"))
        return numbers

    rows, columns = count(-2), count(-1)
    standing = g.tensor(f"{name}.rows", (shape[-2], 1), "int32", free=(free[-2], False))
    upright = g.constant(np.array([-1, 1], np.int32))
    g.operator("RESHAPE", [rows, upright], [standing], g.options("Reshape"))
    moved = g.tensor(f"{name}.moved", (shape[-2], 1), "int32", free=(free[-2], False))
    g.operator("ADD", [standing, g.constant(np.int32(offset))], [moved], g.options("Add"))
    inside = g.tensor(f"{name}.inside", shape[-2:], "bool", free=free[-2:])
    pair = [columns, moved] if attributes(node).get("upper", 1) else [moved, columns]
    g.operator("GREATER_EQUAL", pair, [inside], g.options("GreaterEqual"))
    nothing = g.constant(np.zeros((), c.dtypes[name]))
    inputs = [inside, c.read(source), nothing]
    g.operator("SELECT_V2", inputs, [c.result(name)], g.options("SelectV2"))


TRANSLATIONS: dict[str, Translation] = {
    "Abs": _same("ABS", "Abs"),
    "Add": _same("ADD", "Add"),
    "And": _same("LOGICAL_AND", "LogicalAnd"),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": depthwise,
    "Cos": _same("COS", "Cos"),
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Equal": _same("EQUAL", "Equal"),
    "Erf": _erf,
    "Exp": _same("EXP", "Exp"),
    "Expand": _expand,
    "Floor": _same("FLOOR"),
    "Gather": _gather,
    "Gemm": linear_layer,
    "Greater": _same("GREATER", "Greater"),
    "GreaterOrEqual": _same("GREATER_EQUAL", "GreaterEqual"),
    "Identity": _identity,
    "LayerNormalization": _layer_norm,
    "Less": _same("LESS", "Less"),
    "LessOrEqual": _same("LESS_EQUAL", "LessEqual"),
    "Log": _same("LOG"),
    "MatMul": matrix_product,
    "Max": _same("MAXIMUM", "MaximumMinimum"),
    "Min": _same("MINIMUM", "MaximumMinimum"),
    "Mul": _same("MUL", "Mul"),
    "Neg": _same("NEG", "Neg"),
    "Not": _same("LOGICAL_NOT", "LogicalNot"),
    "Or": _same("LOGICAL_OR", "LogicalOr"),
    "Pad": _pad,
    "Pow": _same("POW", "Pow"),
    "QuantizeLinear": _quantize,
    "Range": _range,
    "ReduceMax": _reduction("REDUCE_MAX"),
    "ReduceMean": _reduction("MEAN"),
    "ReduceSum": _reduction("SUM"),
    "Relu": _same("RELU"),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _same("LOGISTIC"),
    "Sin": _same("SIN"),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _same("SQRT"),
    "Squeeze": _reshape,
    "Sub": _same("SUB", "Sub"),
    "Tanh": _same("TANH"),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _reshape,
    "Where": _same("SELECT_V2", "SelectV2"),
}

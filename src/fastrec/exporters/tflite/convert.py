"""From an ONNX graph to a TFLite one: shapes, constants, and a walk over the nodes.

Shapes come from ONNX's own inference, twice, with the free sizes one apart: a dimension that
differs is free in the file too. int64 becomes int32 (what mobile delegates read, and far beyond any
table of 2 GB); uint8 becomes int8 with a zero point 128 lower, which is the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.errors import BackendError
from fastrec.exporters.tflite.conversion import Conversion
from fastrec.exporters.tflite.graph import Graph
from fastrec.exporters.tflite.operators import TRANSLATIONS

# Initialisers above this are left out of the shape inference, which needs only their shapes.
_LARGE_BYTES = 1 << 12


def to_tflite(
    proto: Any,
    path: Path,
    sizes: Mapping[str, int],
    *,
    int8: str = "float",
    weights: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an ONNX model of fastrec as a TFLite file.

    Args:
        proto: the ONNX model; free sizes are named as in ``sizes``.
        path: the file.
        sizes: the examples' value of each free size, at which the file is set up.
        int8: what a quantised linear layer is. "float": its input rounded to our uint8 integers,
            the product in float32, where the integers' sums are exact up to K = 518 and rounded at
            2^-24 beyond. "kernels": LiteRT's int8 kernel where the layer hands on integers (its
            bias and its output scale are then LiteRT's: integers now and then differ by one), else
            as "float", because LiteRT's int8 kernels have no float output.
        weights: how float weights and tables are stored. "float32"; "float16": half the file, the
            arithmetic in float32 where the machine has no other; "int8": the weights of linear
            layers with a scale a row, their inputs quantised by LiteRT row by row in each call.
        metadata: name -> text, kept in the file.

    Raises:
        BackendError: an operator has no TFLite form, or the file would exceed 2 GB.
        MissingDependencyError: ai-edge-litert is not installed.
    """
    from onnx import numpy_helper

    missing = sorted({node.op_type for node in proto.graph.node} - TRANSLATIONS.keys())
    if missing:
        raise BackendError(f"ONNX operator {missing[0]} has no TFLite form here")
    graph = Graph()
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    shapes, dtypes = _shapes(proto, sizes)
    others, _ = _shapes(proto, {name: size + 1 for name, size in sizes.items()})
    free = {
        name: tuple(a != b for a, b in zip(shape, others[name], strict=True))
        for name, shape in shapes.items()
    }
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for value in proto.graph.output:
        readers.setdefault(value.name, []).append(None)
    makers = {name: node for node in proto.graph.node for name in node.output}
    c = Conversion(graph, constants, shapes, free, dtypes, readers, makers, int8, weights)
    for value in proto.graph.input:
        c.result(value.name)
    inputs = {value.name: c.tensors[value.name] for value in proto.graph.input}
    for node in proto.graph.node:
        if id(node) in c.done or _folded(c, node):
            continue
        TRANSLATIONS[node.op_type](c, node)
    outputs = {value.name: c.read(value.name) for value in proto.graph.output}
    graph.write(path, inputs, outputs, dict(metadata or {}))


def _folded(c: Conversion, node: Any) -> bool:
    """Compute a node whose inputs are all constants; whether it was one.

    Tables and weights stay as they are: a DequantizeLinear of them is kept for the file's size.
    """
    from onnx.reference import ReferenceEvaluator

    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return False
    names = [name for name in node.input if name]
    values = {name: c.constants[name] for name in names if name in c.constants}
    first_of_two = ("Expand", "Reshape", "ConstantOfShape")
    if node.op_type in first_of_two and not any(c.free[node.output[0]]):
        # The shape is known, though the graph computes it.
        values.setdefault(names[-1], np.array(c.shapes[node.output[0]], np.int64))
    if len(values) < len(set(names)) or (not names and node.op_type != "Constant"):
        return False
    results = ReferenceEvaluator(node).run(None, values)
    c.constants.update(zip(node.output, map(np.asarray, results), strict=True))
    return True


def _shapes(
    proto: Any, sizes: Mapping[str, int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Every value's shape with the free sizes at ``sizes``, and its dtype in the file."""
    import onnx

    light = onnx.ModelProto()
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() <= _LARGE_BYTES:
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    known = sizes.keys()
    for value in proto.graph.value_info:
        # What torch knew and inference may not find (the length of a Range).
        params = {d.dim_param for d in value.type.tensor_type.shape.dim} - {""}
        if params <= known:
            graph.value_info.append(value)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    while True:
        # Not strict: its propagation of values stumbles over broadcasts that shapes do not need.
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        shapes = {t.name: tuple(t.dims) for t in (*proto.graph.initializer, *graph.initializer)}
        dtypes = {t.name: _dtype(t.data_type) for t in proto.graph.initializer}
        unknown = []
        for value in (*inferred.input, *inferred.output, *inferred.value_info):
            kind = value.type.tensor_type
            dims = kind.shape.dim
            dtypes[value.name] = _dtype(kind.elem_type)
            if kind.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                shapes[value.name] = tuple(d.dim_value for d in dims)
            else:
                unknown.append(value.name)
        if not unknown:
            dtypes.update((t.name, _dtype(t.data_type)) for t in graph.initializer)
            return shapes, dtypes
        if not _sizes_computed(graph, shapes):
            raise BackendError(f"ONNX's shape inference leaves {unknown[0]!r} without a size")


def _sizes_computed(graph: Any, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Replace nodes of an ONNX graph that compute with known sizes by their results; whether there
    was one. Inference itself does not follow sizes through arithmetic."""
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    kept, before = [], len(known)
    for node in graph.node:
        names = [name for name in node.input if name]
        if node.op_type == "Shape" and node.input[0] in shapes:
            values = {node.input[0]: np.broadcast_to(np.float32(0), shapes[node.input[0]])}
        elif names and all(name in known for name in names):
            values = {name: known[name] for name in names}
        else:
            kept.append(node)
            continue
        results = ReferenceEvaluator(node).run(None, values)
        known.update(zip(node.output, map(np.asarray, results), strict=True))
    for name in list(known)[before:]:
        graph.initializer.append(numpy_helper.from_array(known[name], name))
    del graph.node[:]
    graph.node.extend(kept)
    return len(known) > before


def _dtype(elem_type: int) -> str:
    """An ONNX element type's dtype in the file."""
    import onnx

    name = str(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    return {"int64": "int32", "uint8": "int8"}.get(name, name)

"""From an ONNX graph to a TFLite one: shapes, constants, and a walk over the nodes.

Shapes come from ONNX's own inference, twice, with the free sizes one apart: a dimension that
differs is free in the file too. int64 becomes int32 (what mobile delegates read, and far beyond any
table of 2 GB); uint8 becomes int8 with a zero point 128 lower, which is the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.errors import BackendError
from fastrec.exporters.tflite.graph import Graph, Scales

# Initialisers above this are left out of the shape inference, which needs only their shapes.
_LARGE_BYTES = 1 << 12
_UINT8_SHIFT = 128


@dataclass
class Conversion:
    """What the operators' translations share.

    Attributes:
        graph: what is built.
        constants: ONNX name -> value.
        shapes: ONNX name -> sizes on the example inputs.
        free: ONNX name -> which of them may change.
        dtypes: ONNX name -> the tensor's dtype in the file.
        readers: ONNX name -> the nodes that read it.
        makers: ONNX name -> the node that computes it.
        int8: "float" or "kernels", see :func:`to_tflite`.
        weights: how float weights are stored, see :func:`to_tflite`.
        quantised: int8 constants behind a DequantizeLinear: ONNX name -> (values, scales).
        done: nodes that a translation before has taken with it, by ``id``.
    """

    graph: Graph
    constants: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    free: dict[str, tuple[bool, ...]]
    dtypes: dict[str, str]
    readers: dict[str, list[Any]]
    makers: dict[str, Any]
    int8: str
    weights: str
    quantised: dict[str, tuple[np.ndarray, Scales]] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    def read(self, name: str) -> int:
        """The tensor of an ONNX value; a constant enters the graph when it is first read."""
        if name not in self.tensors:
            if name in self.quantised:
                values, scales = self.quantised[name]
                self.tensors[name] = self.dequantised(values, scales, name)
            elif name in self.constants:
                self.tensors[name] = self.weight(self.constants[name], name)
            else:
                raise BackendError(f"the ONNX graph reads {name!r} before it is computed")
        return self.tensors[name]

    def weight(self, value: np.ndarray, name: str = "") -> int:
        """A constant; in float16 behind a DEQUANTIZE where weights are to be halved."""
        if not self.halved(value):
            return self.graph.constant(value, name=name)
        stored = self.graph.constant(value.astype(np.float16), name=f"{name}.half")
        wide = self.graph.tensor(name, value.shape, "float32")
        self.graph.operator("DEQUANTIZE", [stored], [wide], self.graph.options("Dequantize"))
        return wide

    def halved(self, value: np.ndarray) -> bool:
        """Whether a constant is stored as float16."""
        return self.weights == "float16" and value.dtype == np.float32 and value.ndim > 1

    def dequantised(self, values: np.ndarray, scales: Scales, name: str) -> int:
        """An int8 constant as float32; LiteRT unpacks it once, when the model is loaded."""
        stored = self.graph.constant(values, name=f"{name}.int8", scales=scales)
        wide = self.graph.tensor(name, values.shape, "float32")
        self.graph.operator("DEQUANTIZE", [stored], [wide], self.graph.options("Dequantize"))
        return wide

    def value(self, name: str) -> np.ndarray:
        """A constant's value.

        Raises:
            BackendError: it is computed.
        """
        if name not in self.constants:
            raise BackendError(f"no TFLite form where {name!r} is computed and not a constant")
        return self.constants[name]

    def result(self, name: str, *, scales: Scales | None = None) -> int:
        """A new tensor for an ONNX value that a node computes."""
        number = self.graph.tensor(
            name, self.shapes[name], self.dtypes[name], free=self.free[name], scales=scales
        )
        self.tensors[name] = number
        return number

    def between(self, like: str, dtype: str | None = None, shape: Any = None) -> int:
        """A tensor inside a translation; shaped as an ONNX value unless ``shape`` says else."""
        sizes = self.shapes[like] if shape is None else tuple(shape)
        marks = self.free[like] if shape is None else ()
        name = f"{like}.{len(self.graph.tensors)}"
        return self.graph.tensor(name, sizes, dtype or self.dtypes[like], free=marks)

    def only_reader(self, name: str, kind: str) -> Any:
        """The one node that reads a value, where it is of that kind."""
        found = self.readers.get(name, [])
        if len(found) != 1 or found[0] is None:  # None: the graph's output
            return None
        return found[0] if found[0].op_type == kind else None


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

    from fastrec.exporters.tflite.operators import TRANSLATIONS

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


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes: name -> value."""
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def int8_scales(scale: Any, zero_point: Any, axis: int = 0) -> Scales:
    """The scales of an ONNX quantiser; a uint8 zero point is shifted as its values are."""
    zero = np.asarray(zero_point)
    shift = _UINT8_SHIFT if zero.dtype == np.uint8 else 0
    return Scales.of(scale, zero.astype(np.int64) - shift, axis)

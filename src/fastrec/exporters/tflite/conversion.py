"""The state that the translations of operators share while a graph is converted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastrec.errors import BackendError
from fastrec.exporters.tflite.graph import Graph, Scales

# uint8 becomes int8 with a zero point 128 lower, which is the same number.
UINT8_SHIFT = 128


@dataclass
class Conversion:
    """The state that the operators' translations share.

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


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes: name -> value."""
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def int8_scales(scale: Any, zero_point: Any, axis: int = 0) -> Scales:
    """The scales of an ONNX quantiser; a uint8 zero point is shifted as its values are."""
    zero = np.asarray(zero_point)
    shift = UINT8_SHIFT if zero.dtype == np.uint8 else 0
    return Scales.of(scale, zero.astype(np.int64) - shift, axis)

"""Our uint8 activations as signed, symmetric int8, for engines that have no zero points (TensorRT).

``clip(round(x / s) + z, 0, 255) - 128`` is ``clip(round((x + c) / s), -128, 127)`` with
``c = (z - 128) * s``: the same 256 integers, each less 128, so no bit of the activations is lost.
c is added before QuantizeLinear, and what DequantizeLinear gives is then too large by c: c times
the sum of a weight's column is taken off the product's bias. Only where x lies on the edge between
two integers may x + c round the other way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MIDDLE = 128


def symmetric_int8(proto: Any) -> int:
    """Rewrite an exported model in place; how many QuantizeLinear it has.

    Tables of int8 rows, which the export reads through Gather and Cast, are read through Gather
    and DequantizeLinear of scale 1: TensorRT takes int8 only in front of that.
    """
    graph = proto.graph
    edit = _Edit(graph)
    shifts: dict[str, np.float32] = {}  # uint8 tensor -> c
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "QuantizeLinear" and edit.dtype(node.input[2]) == np.uint8:
            nodes.pop()
            shift = edit.shift(node)
            shifts[node.output[0]] = shift
            if shift:
                moved = edit.name(f"{node.output[0]}.shifted")
                constant = edit.constant(f"{node.output[0]}.shift", shift)
                nodes.append(edit.node("Add", [node.input[0], constant], moved))
                node.input[0] = moved
            node.input[2] = edit.constant(f"{node.output[0]}.zero", np.int8(0))
            nodes.append(node)
        elif node.op_type == "DequantizeLinear" and node.input[0] in shifts:
            shift = shifts[node.input[0]]
            node.input[2] = edit.constant(f"{node.output[0]}.zero", np.int8(0))
            if shift:
                nodes += _take_off(edit, node, shift)
        elif node.op_type == "Cast" and edit.is_int8_gather(node.input[0]):
            one = edit.constant(f"{node.output[0]}.one", np.float32(1))
            nodes[-1] = edit.node("DequantizeLinear", [node.input[0], one], node.output[0])
    # An Add behind a product was put in where its DequantizeLinear stands, before the product.
    del graph.node[:]
    graph.node.extend(_sorted(nodes, edit))
    edit.drop_unread()
    # Shapes and types that the export wrote down name uint8 where int8 is now.
    for value in graph.value_info:
        if value.name in shifts:
            value.type.tensor_type.elem_type = edit.int8
    return len(shifts)


def _take_off(edit: _Edit, node: Any, shift: np.float32) -> list[Any]:
    """Nodes, and changes to constants, that take a shift off what reads ``node``'s output."""
    output = node.output[0]
    readers = edit.readers(output)
    weights = [edit.weight(reader) for reader in readers]
    if any(w is None for w in weights):  # read by something else: taken off at once
        shifted = edit.name(f"{output}.shifted")
        node.output[0] = shifted
        constant = edit.constant(f"{output}.unshift", -shift)
        return [edit.node("Add", [shifted, constant], output)]
    added = []
    for reader, weight in zip(readers, weights, strict=True):
        assert weight is not None
        columns = weight.sum(axis=0, dtype=np.float64)  # [N]
        correction = (-np.float64(shift) * columns).astype(np.float32)
        product = reader.output[0]
        following = edit.readers(product)
        bias = edit.bias(following[0], product, len(columns)) if len(following) == 1 else None
        if bias is not None:
            value, place = bias
            total = (value.astype(np.float64) + correction).astype(np.float32)
            following[0].input[place] = edit.constant(f"{product}.bias", total)
        else:
            moved = edit.name(f"{product}.shifted")
            reader.output[0] = moved
            constant = edit.constant(f"{product}.unshift", correction)
            added.append(edit.node("Add", [moved, constant], product))
    return added


class _Edit:
    """A graph's constants, readers and new nodes."""

    def __init__(self, graph: Any) -> None:
        import onnx

        self._onnx, self._graph = onnx, graph
        self.int8 = onnx.TensorProto.INT8
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in graph.output}
        self._taken = {*self._constants, *self._makers, *(v.name for v in graph.input)}

    def name(self, wanted: str) -> str:
        """A name that nothing has yet."""
        name, count = wanted, 1
        while name in self._taken:
            name, count = f"{wanted}.{count}", count + 1
        self._taken.add(name)
        return name

    def constant(self, wanted: str, value: Any) -> str:
        """A new constant's name."""
        name = self.name(wanted)
        tensor = self._onnx.numpy_helper.from_array(np.asarray(value), name)
        self._graph.initializer.append(tensor)
        self._constants[name] = tensor
        return name

    def node(self, kind: str, inputs: list[str], output: str) -> Any:
        """A new node."""
        return self._onnx.helper.make_node(kind, inputs, [output], name=f"{kind}_{output}")

    def array(self, name: str) -> np.ndarray | None:
        """A constant's value, or None where the name is none."""
        tensor = self._constants.get(name)
        if tensor is None:
            return None
        value: np.ndarray = self._onnx.numpy_helper.to_array(tensor)
        return value

    def dtype(self, name: str) -> Any:
        """A constant's dtype, or None."""
        value = self.array(name)
        return None if value is None else value.dtype

    def shift(self, node: Any) -> np.float32:
        """c of a QuantizeLinear of one scale and zero point."""
        scale, zero = self.array(node.input[1]), self.array(node.input[2])
        assert scale is not None
        assert zero is not None
        return np.float32((int(zero.reshape(())) - _MIDDLE) * np.float64(scale.reshape(())))

    def readers(self, name: str) -> list[Any]:
        """The nodes that read ``name``; one that is an output of the graph counts as read twice."""
        found = self._readers.get(name, [])
        return [*found, None] if name in self._outputs else found

    def weight(self, reader: Any) -> np.ndarray | None:
        """The [K, N] float weight of a MatMul behind DequantizeLinear, or None."""
        maker = None if reader is None else self._makers.get(reader.input[1])
        if reader is None or reader.op_type != "MatMul" or maker is None:
            return None
        if maker.op_type != "DequantizeLinear":
            return None
        integers, scale = self.array(maker.input[0]), self.array(maker.input[1])
        if integers is None or scale is None or integers.dtype != np.int8 or integers.ndim != 2:
            return None
        return integers.astype(np.float64) * scale

    def bias(self, reader: Any, product: str, outputs: int) -> tuple[np.ndarray, int] | None:
        """(value, its place among the inputs) of an Add of a constant [N], or None."""
        if reader is None or reader.op_type != "Add":
            return None
        place = 1 - list(reader.input).index(product)
        value = self.array(reader.input[place])
        return None if value is None or value.shape != (outputs,) else (value, place)

    def is_int8_gather(self, name: str) -> bool:
        """Whether this is rows of an int8 constant."""
        maker = self._makers.get(name)
        return (
            maker is not None
            and maker.op_type == "Gather"
            and self.dtype(maker.input[0]) == np.int8
        )

    def drop_unread(self) -> None:
        """Forget constants that no node reads."""
        read = {name for node in self._graph.node for name in node.input} | self._outputs
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)


def _sorted(nodes: list[Any], edit: _Edit) -> list[Any]:
    """The nodes in an order in which each follows what it reads."""
    makers = {name: node for node in nodes for name in node.output}
    placed: set[str] = set()
    ordered: list[Any] = []
    for root in nodes:
        stack: list[tuple[Any, bool]] = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node.output[0] in placed:
                continue
            if ready:
                placed.update(node.output)
                ordered.append(node)
                continue
            stack.append((node, True))
            stack += [(makers[n], False) for n in node.input if n in makers and n not in placed]
    return ordered

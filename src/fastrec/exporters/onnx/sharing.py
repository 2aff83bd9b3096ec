"""Int8 constants of an ONNX graph with one reader each.

ONNX Runtime's exact mode for CPUs without VNNI (``session.x64quantprecision``) rewrites int8
weights and zero points under names made of theirs, once a reader: one with two readers ends in
"attempt to replace the existing tensor". Exporters merge equal constants, and a layer called twice
has one weight, so both kinds are copied here; zero points are small, shared weights are few.
"""

from __future__ import annotations

from typing import Any


def unshare_int8(proto: Any) -> None:
    """Copy int8 constants, and DequantizeLinear nodes behind them, until each has one reader."""
    import onnx

    graph = proto.graph
    int8 = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    readers: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    nodes = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in int8:
            for copy, (reader, place) in enumerate(readers.get(node.output[0], [])[1:], 1):
                twin = onnx.NodeProto()
                twin.CopyFrom(node)
                twin.name = f"{node.name}.copy{copy}"
                twin.output[0] = reader.input[place] = f"{node.output[0]}.copy{copy}"
                nodes.append(twin)
        nodes.append(node)
    taken: dict[str, int] = {}
    for node in nodes:
        for place, name in enumerate(node.input):
            # An embedding's table may be large, and no quantised product reads it.
            if name not in int8 or node.op_type == "Gather":
                continue
            copies = taken[name] = taken.get(name, -1) + 1
            if copies:
                tensor = onnx.TensorProto()
                tensor.CopyFrom(int8[name])
                tensor.name = node.input[place] = f"{name}.copy{copies}"
                graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(nodes)

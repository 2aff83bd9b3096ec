"""How an ONNX graph is put into files, large tensors straight from the model's memory.

A message of protobuf holds its tensors as copies, and needs as much again to become bytes. So large
tensors never enter it: they are written to a file of their own, which is what ONNX calls external
data, and up to 2 GB :func:`join_files` makes one file of the two by copying them into place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# protobuf's limit for one message, less room for the graph itself.
LARGEST_BYTES = 2**31 - 2**24
# Smaller constants stay in the graph: shapes, scales and biases that runtimes fold when they load.
_EXTERNAL_BYTES = 1 << 10
# Where a tensor begins: for vector loads, and for those that are mapped by the page.
_ALIGNMENT, _PAGE, _PAGED_BYTES = 64, 4096, 1 << 20
_CHUNK = 1 << 20
# Numbers of fields in onnx.proto.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9

Values = Mapping[str, np.ndarray]
"""Large tensors by where the graph says they are (``location``)."""


def external_data(path: Path) -> Path:
    """Where the tensors of a model over 2 GB lie, beside it."""
    return path.with_name(f"{path.name}.data")


def set_aside(model: Any) -> dict[str, np.ndarray]:
    """Take the large initialisers out of an ``onnx_ir`` model, which then names them alone.

    Their arrays share the torch model's memory.
    """
    import onnx_ir

    values = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _EXTERNAL_BYTES:
            continue
        values[name] = tensor.numpy()
        value.const_value = onnx_ir.ExternalTensor(
            name, None, None, tensor.dtype, shape=tensor.shape, name=name
        )
    return values


def write_files(proto: Any, values: Values, path: Path) -> None:
    """Write the graph, and its large tensors into :func:`external_data`; each array once."""
    import onnx

    places: dict[str, tuple[int, int]] = {}
    tensors = [t for t in proto.graph.initializer if _is_external(t)]
    external_data(path).unlink(missing_ok=True)
    if tensors:
        with external_data(path).open("wb") as file:
            for tensor in tensors:
                name = tensor.external_data[0].value
                if name not in places:
                    places[name] = _append(file, values[name])
                offset, length = places[name]
                del tensor.external_data[:]
                entries = {"location": external_data(path).name, "offset": offset, "length": length}
                for key, entry in entries.items():
                    tensor.external_data.add(key=key, value=str(entry))
    onnx.save(proto, path)


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def _append(file: BinaryIO, values: np.ndarray) -> tuple[int, int]:
    """(offset, bytes) of an array at the end of a file."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    alignment = _PAGE if flat.size >= _PAGED_BYTES else _ALIGNMENT
    offset = -(-file.tell() // alignment) * alignment
    file.seek(offset)
    file.write(flat.data)
    return offset, flat.size


def join_files(path: Path) -> None:
    """One file of the two that :func:`write_files` made; left as they are over 2 GB."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    large = [t for t in proto.graph.initializer if _is_external(t)]
    places = [{e.key: e.value for e in tensor.external_data} for tensor in large]
    if not large or sum(int(place["length"]) for place in places) > LARGEST_BYTES:
        return
    small = [t for t in proto.graph.initializer if not _is_external(t)]
    heads = [_head(t, int(place["length"])) for t, place in zip(large, places, strict=True)]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    size = len(graph) + sum(map(len, heads)) + sum(int(place["length"]) for place in places)
    draft = path.with_name(f"{path.name}.joined")
    with draft.open("wb") as out, external_data(path).open("rb") as data:
        out.write(proto.SerializeToString() + _key(_MODEL_GRAPH, size) + graph)
        for head, place in zip(heads, places, strict=True):
            out.write(head)
            data.seek(int(place["offset"]))
            left = int(place["length"])
            while left:
                chunk = data.read(min(left, _CHUNK))
                if not chunk:
                    raise EOFError(f"{data.name} ends within a tensor")
                left -= out.write(chunk)
    os.replace(draft, path)
    external_data(path).unlink()


def _head(tensor: Any, length: int) -> bytes:
    """All of an initialiser up to its values."""
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    about = tensor.SerializeToString() + _key(_TENSOR_RAW_DATA, length)
    return _key(_GRAPH_INITIALIZER, len(about) + length) + about


def _key(number: int, size: int) -> bytes:
    """The header of a field: its number, and its size in bytes as a varint."""
    out = bytearray([number << 3 | 2])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)


def make_sparse(proto: Any, values: Values) -> int:
    """Store float weights as sparse initialisers where that is smaller; how many there were.

    A value that is kept costs its own bytes and an int64 index: float32 gains below a third of
    values kept. int8 would below a ninth, but quantised products want their weights dense.
    """
    from onnx import helper, numpy_helper

    dense, sparse = [], []
    for tensor in proto.graph.initializer:
        array = (
            values[tensor.external_data[0].value]
            if _is_external(tensor)
            else numpy_helper.to_array(tensor)
        )
        kept = np.flatnonzero(array)
        if array.dtype != np.float32 or array.ndim < 2 or 12 * kept.size >= array.nbytes:
            dense.append(tensor)
            continue
        data = numpy_helper.from_array(array.reshape(-1)[kept], tensor.name)
        places = numpy_helper.from_array(kept.astype(np.int64), f"{tensor.name}.places")
        sparse.append(helper.make_sparse_tensor(data, places, array.shape))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(dense)
    proto.graph.sparse_initializer.extend(sparse)
    return len(sparse)

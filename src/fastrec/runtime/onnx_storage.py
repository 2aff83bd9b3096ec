"""How an ONNX graph is put into files: external data over 2 GB, sparse initialisers where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# protobuf's limit for one message, less room for the graph itself.
LARGEST_BYTES = 2**31 - 2**24
# Smaller constants stay in the graph: shapes, scales and biases that runtimes fold when they load.
_EXTERNAL_BYTES = 1 << 10


def external_data(path: Path) -> Path:
    """Where the tensors of a model over 2 GB lie, beside it."""
    return path.with_name(f"{path.name}.data")


def write_files(proto: Any, path: Path) -> None:
    """Write the model; over 2 GB its large tensors go into :func:`external_data`."""
    import onnx

    size = sum(t.ByteSize() for t in proto.graph.initializer)
    if size <= LARGEST_BYTES:
        onnx.save(proto, path)
        return
    # Appended to, where it exists.
    external_data(path).unlink(missing_ok=True)
    onnx.save(
        proto,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=external_data(path).name,
        size_threshold=_EXTERNAL_BYTES,
    )


def make_sparse(proto: Any) -> int:
    """Store float weights as sparse initialisers where that is smaller; how many there were.

    A value that is kept costs its own bytes and an int64 index: float32 gains below a third of
    values kept. int8 would below a ninth, but quantised products want their weights dense.
    """
    from onnx import helper, numpy_helper

    dense, sparse = [], []
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        kept = np.flatnonzero(values)
        if values.dtype != np.float32 or values.ndim < 2 or 12 * kept.size >= values.nbytes:
            dense.append(tensor)
            continue
        data = numpy_helper.from_array(values.reshape(-1)[kept], tensor.name)
        places = numpy_helper.from_array(kept.astype(np.int64), f"{tensor.name}.places")
        sparse.append(helper.make_sparse_tensor(data, places, values.shape))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(dense)
    proto.graph.sparse_initializer.extend(sparse)
    return len(sparse)

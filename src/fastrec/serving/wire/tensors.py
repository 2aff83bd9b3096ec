"""Tensors between the wire and numpy.

Raw contents (little-endian, row-major) are viewed, never copied; typed contents are there for
hand-written clients and cost some 70 ns an element. Every size is checked before it is believed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, DtypeError, ShapeError

# Datatype -> (numpy's name, field of InferTensorContents; None: raw only)
DATATYPES: dict[str, tuple[str, str | None]] = {
    "BOOL": ("bool", "bool_contents"),
    "UINT8": ("uint8", "uint_contents"),
    "UINT16": ("uint16", "uint_contents"),
    "UINT32": ("uint32", "uint_contents"),
    "UINT64": ("uint64", "uint64_contents"),
    "INT8": ("int8", "int_contents"),
    "INT16": ("int16", "int_contents"),
    "INT32": ("int32", "int_contents"),
    "INT64": ("int64", "int64_contents"),
    "FP16": ("float16", None),
    "FP32": ("float32", "fp32_contents"),
    "FP64": ("float64", "fp64_contents"),
}
_DTYPES = {name: np.dtype(known).newbyteorder("<") for name, (known, _) in DATATYPES.items()}
_NAMES = {np.dtype(known): name for name, (known, _) in DATATYPES.items()}
_PYTHON: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
# Datatype and shape -> dtype and bytes, of those that were good; most requests look alike.
_KNOWN: dict[tuple[str, tuple[int, ...]], tuple[np.dtype, int]] = {}
_MAX_KNOWN = 1024
_MAX_RANK = 8
_MAX_EXTENT = 1 << 48
_MAX_NAME = 256


def datatype(dtype: str | np.dtype) -> str:
    """The protocol's name of a numpy dtype.

    Raises:
        DtypeError: the protocol has no such type.
    """
    try:
        return _NAMES[np.dtype(dtype)]
    except (KeyError, TypeError):
        raise DtypeError("dtype", f"one of {sorted(map(str, _NAMES))}", dtype) from None


def tensor_inputs(request: Any) -> dict[str, np.ndarray]:
    """The inputs of a ModelInferRequest, by name; raw ones are read-only views of the message.

    Raises:
        ArgumentError: raw and typed contents are mixed, a name comes twice or is too long, shared
            memory is asked for, or values do not fit the datatype.
        DtypeError: an unknown datatype.
        ShapeError: a bad shape, or contents of another size than it says.
    """
    raw = request.raw_input_contents
    tensors = request.inputs
    if not raw:
        return _typed_inputs(tensors)
    if len(raw) != len(tensors):
        raise ArgumentError(
            "raw_input_contents", f"one for each of {len(tensors)} inputs", len(raw)
        )
    arrays: dict[str, np.ndarray] = {}
    for tensor, data in zip(tensors, raw, strict=True):
        name = tensor.name
        if tensor.HasField("contents"):
            raise ArgumentError(_shown(name), "raw contents alone", "typed contents too")
        if tensor.parameters:
            _refuse_shared_memory(name, tensor.parameters)
        if name in arrays or len(name) > _MAX_NAME:
            raise _wrong_name(name)
        arrays[name] = from_raw(name, tensor.datatype, tensor.shape, data)
    return arrays


def from_raw(name: str, kind: str, shape: Sequence[int], data: Any) -> np.ndarray:
    """A read-only view of little-endian row-major bytes.

    Args:
        name: of the input, for errors.
        kind: datatype of the protocol.
        shape: sizes.
        data: bytes-like.

    Raises:
        DtypeError, ShapeError: see :func:`tensor_inputs`.
    """
    shape = tuple(shape)
    known = _KNOWN.get((kind, shape))
    if known is None:
        dtype = _dtype(name, kind)
        known = dtype, _elements(name, shape) * dtype.itemsize
    dtype, size = known
    if len(data) != size:
        raise ShapeError(
            _shown(name), f"{size} bytes for shape {list(shape)} of {kind}", f"{len(data)} bytes"
        )
    if len(_KNOWN) < _MAX_KNOWN:
        _KNOWN[kind, shape] = known
    array: np.ndarray = np.ndarray(shape, dtype, data)
    if dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:
        raise ArgumentError(_shown(name), "BOOL elements of 0 or 1", "another byte")
    return array if sys.byteorder == "little" else array.astype(dtype.newbyteorder("="))


def from_values(name: str, kind: str, shape: Sequence[int], values: Iterable[Any]) -> np.ndarray:
    """An array of a flat sequence of Python numbers.

    Args:
        name: of the input, for errors.
        kind: datatype of the protocol.
        shape: sizes.
        values: row-major.

    Raises:
        ArgumentError, DtypeError, ShapeError: see :func:`tensor_inputs`.
    """
    dtype = _dtype(name, kind).newbyteorder("=")
    shape = tuple(shape)
    elements = _elements(name, shape)
    values = values if isinstance(values, list) else list(values)
    if len(values) != elements:
        raise ShapeError(
            _shown(name), f"{elements} values for shape {list(shape)}", f"{len(values)} values"
        )
    # numpy would turn 1.5 into 1 and "1" into 1.
    wrong = set(map(type, values)) - _PYTHON[dtype.kind]
    if wrong:
        raise ArgumentError(
            _shown(name), f"values of {kind}", f"one of type {wrong.pop().__name__}"
        )
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype).reshape(shape)
    except OverflowError as error:
        raise ArgumentError(_shown(name), f"values of {kind}", str(error)) from None


def add_raw(tensors: Any, contents: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Append arrays to a message's repeated tensors and their raw contents.

    Raises:
        DtypeError: the protocol has no such type.
    """
    for name, array in arrays.items():
        tensors.add(name=name, datatype=datatype(array.dtype), shape=array.shape)
        contents.append(to_raw(array))


def to_raw(array: np.ndarray) -> bytes:
    """Little-endian row-major bytes."""
    if sys.byteorder != "little":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def _typed_inputs(tensors: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        name = tensor.name
        if tensor.parameters:
            _refuse_shared_memory(name, tensor.parameters)
        if name in arrays or len(name) > _MAX_NAME:
            raise _wrong_name(name)
        _dtype(name, tensor.datatype)
        field = DATATYPES[tensor.datatype][1]
        if field is None:
            raise ArgumentError(
                _shown(name), "raw contents (the protocol has no others for FP16)", "typed ones"
            )
        others = [f.name for f, _ in tensor.contents.ListFields() if f.name != field]
        if others:
            raise ArgumentError(_shown(name), f"{tensor.datatype} in {field}", others[0])
        values = getattr(tensor.contents, field)
        arrays[name] = from_values(name, tensor.datatype, tensor.shape, values)
    return arrays


def _dtype(name: str, kind: str) -> np.dtype:
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise DtypeError(_shown(name), f"a datatype among {', '.join(DATATYPES)}", _shown(kind))
    return dtype


def _elements(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) > _MAX_RANK:
        raise ShapeError(_shown(name), f"a rank up to {_MAX_RANK}", len(shape))
    elements, extent = 1, 1
    for size in shape:
        if size < 0:
            raise ShapeError(_shown(name), "sizes of 0 or more", list(shape))
        elements *= size
        # [0, 2^62] has no elements, and numpy cannot make it.
        extent *= max(size, 1)
    if extent > _MAX_EXTENT:
        raise ShapeError(_shown(name), f"sizes whose product is at most {_MAX_EXTENT}", list(shape))
    return elements


def _wrong_name(name: str) -> ArgumentError:
    if len(name) > _MAX_NAME:
        return ArgumentError("inputs", f"names of up to {_MAX_NAME} characters", _shown(name))
    return ArgumentError(_shown(name), "one input of this name", "two")


def _refuse_shared_memory(name: str, parameters: Any) -> None:
    if "shared_memory_region" in parameters:
        raise ArgumentError(_shown(name), "contents in the request", "shared memory, not served")


def _shown(text: str) -> str:
    """Client text, shortened for log lines and errors."""
    return text if len(text) <= 64 else f"{text[:61]}..."

"""A TFLite graph under construction: tensors, constants and operators, written as a flatbuffer.

The schema is LiteRT's own (``ai_edge_litert.schema_py_generated``). Constants with the same bytes
are stored once, operators whose result nobody reads are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.errors import BackendError, MissingDependencyError

FORMAT_VERSION = 3
_IDENTIFIER = b"TFL3"
# Offsets in a flatbuffer are signed 32-bit numbers.
LARGEST_BYTES = 2**31 - 2**20
# Operator -> the version of it that first had what is used here (1 where it is not named); an older
# runtime then says what it lacks instead of misreading the file.
_VERSIONS = {
    "BATCH_MATMUL": 1,
    "BROADCAST_TO": 2,
    "DEQUANTIZE": 5,
    "FULLY_CONNECTED": 5,
    "GELU": 1,
    "QUANTIZE": 1,
    "STRIDED_SLICE": 4,
    "TRANSPOSE": 4,
}
_DTYPES = {
    "float32": "FLOAT32",
    "float16": "FLOAT16",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}


def schema() -> Any:
    """LiteRT's flatbuffer schema.

    Raises:
        MissingDependencyError: ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise MissingDependencyError("ai-edge-litert", "litert", "LiteRT") from error
    return schema_py_generated


@dataclass(frozen=True)
class Scales:
    """How int8 values stand for numbers: ``(q - zero_point) * scale``, a pair for each index of
    ``axis`` or one for all."""

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int = 0

    @classmethod
    def of(cls, scale: Any, zero_point: Any, axis: int = 0) -> Scales:
        """From scalars or vectors."""
        return cls(
            np.asarray(scale, np.float32).reshape(-1),
            np.asarray(zero_point, np.int64).reshape(-1),
            axis,
        )


@dataclass
class _Tensor:
    name: str
    shape: tuple[int, ...]
    free: tuple[bool, ...]
    dtype: str
    buffer: int
    scales: Scales | None


@dataclass
class _Operator:
    kind: str
    inputs: list[int]
    outputs: list[int]
    options: Any


class Graph:
    """Tensors are numbers, in order of their making."""

    def __init__(self) -> None:
        self._schema = schema()
        self.tensors: list[_Tensor] = []
        self._operators: list[_Operator] = []
        # Buffer 0 is the empty one, of tensors that are computed.
        self._buffers: list[np.ndarray | None] = [None]
        self._known: dict[Any, int] = {}

    def options(self, kind: str, **values: Any) -> Any:
        """An operator's options, ``kind`` as in the schema ("FullyConnected")."""
        return getattr(self._schema, f"{kind}OptionsT")(**values)

    def relu(self) -> int:
        """The fused activation."""
        return int(self._schema.ActivationFunctionType.RELU)

    def valid_padding(self) -> int:
        """Convolutions without padding of their own."""
        return int(self._schema.Padding.VALID)

    def tensor_type(self, dtype: str) -> int:
        """numpy's name of a dtype -> the schema's number.

        Raises:
            BackendError: TFLite files of fastrec hold no such tensors.
        """
        if dtype not in _DTYPES:
            raise BackendError(f"no TFLite form of a {dtype} tensor")
        return int(getattr(self._schema.TensorType, _DTYPES[dtype]))

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        *,
        free: Sequence[bool] = (),
        scales: Scales | None = None,
    ) -> int:
        """A tensor that is computed or given; ``free`` marks dimensions that may change."""
        self.tensor_type(dtype)
        marks = tuple(free) or (False,) * len(shape)
        self.tensors.append(_Tensor(name, tuple(shape), marks, dtype, 0, scales))
        return len(self.tensors) - 1

    def constant(self, value: Any, *, name: str = "", scales: Scales | None = None) -> int:
        """A constant; one tensor for the same bytes."""
        array = np.ascontiguousarray(value)
        array = array.reshape(np.shape(value))
        if array.dtype == np.int64:
            limits = np.iinfo(np.int32)
            array = array.clip(limits.min, limits.max).astype(np.int32)
        small = array.nbytes <= 1 << 12 and scales is None
        key = (array.dtype.str, array.shape, array.tobytes()) if small else None
        if key is not None and key in self._known:
            return self._known[key]
        number = self.tensor(
            name or f"constant_{len(self.tensors)}", array.shape, str(array.dtype), scales=scales
        )
        self._buffers.append(array.reshape(-1).view(np.uint8))
        self.tensors[number].buffer = len(self._buffers) - 1
        if key is not None:
            self._known[key] = number
        return number

    def is_constant(self, tensor: int) -> bool:
        """Whether its values are in the file."""
        return self.tensors[tensor].buffer != 0

    def operator(
        self, kind: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None
    ) -> None:
        """Append an operator, ``kind`` as in ``BuiltinOperator``; input -1 means none."""
        self._operators.append(_Operator(kind, list(inputs), list(outputs), options))

    def write(
        self,
        path: Path,
        inputs: dict[str, int],
        outputs: dict[str, int],
        metadata: dict[str, str],
    ) -> None:
        """Write the file.

        Raises:
            BackendError: it would exceed the 2 GB that a flatbuffer can address.
        """
        import flatbuffers

        size = sum(b.nbytes for b in self._buffers if b is not None)
        if size > LARGEST_BYTES:
            raise BackendError(
                f"the model holds {size / 1e9:.1f} GB and a TFLite file at most 2: quantise its "
                "tables (fastrec.quantize_)"
            )
        s = self._schema
        live = self._live(set(outputs.values()))
        kinds = sorted({o.kind for o in live})
        read = {t for o in live for t in (*o.inputs, *o.outputs)}
        kept = sorted((read | {*inputs.values(), *outputs.values()}) - {-1})
        place = {-1: -1, **{tensor: i for i, tensor in enumerate(kept)}}
        buffers = sorted({self.tensors[t].buffer for t in kept} | {0})
        buffer_place = {b: i for i, b in enumerate(buffers)}
        graph = s.SubGraphT(
            tensors=[self._tensor(self.tensors[t], buffer_place) for t in kept],
            inputs=[place[t] for t in inputs.values()],
            outputs=[place[t] for t in outputs.values()],
            operators=[self._operator(o, kinds, place) for o in live],
            name="main",
        )
        stored = [s.BufferT(data=self._buffers[b]) for b in buffers]
        notes = []
        for name, text in metadata.items():
            stored.append(s.BufferT(data=np.frombuffer(text.encode(), np.uint8)))
            notes.append(s.MetadataT(name=name, buffer=len(stored) - 1))
        model = s.ModelT(
            version=FORMAT_VERSION,
            operatorCodes=[self._code(kind) for kind in kinds],
            subgraphs=[graph],
            description="fastrec",
            buffers=stored,
            metadata=notes,
            signatureDefs=[
                s.SignatureDefT(
                    inputs=[s.TensorMapT(name=n, tensorIndex=place[t]) for n, t in inputs.items()],
                    outputs=[
                        s.TensorMapT(name=n, tensorIndex=place[t]) for n, t in outputs.items()
                    ],
                    signatureKey="serving_default",
                )
            ],
        )
        builder = flatbuffers.Builder(size + (1 << 20))
        builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
        path.write_bytes(memoryview(builder.Bytes)[builder.Head() :])

    def _live(self, wanted: set[int]) -> list[_Operator]:
        """The operators that the outputs need, in order."""
        live = []
        for operator in reversed(self._operators):
            if wanted & set(operator.outputs):
                wanted |= set(operator.inputs)
                live.append(operator)
        return live[::-1]

    def _code(self, kind: str) -> Any:
        number = getattr(self._schema.BuiltinOperator, kind)
        return self._schema.OperatorCodeT(
            # The byte of older files, where 127 says that the number is in the new field.
            deprecatedBuiltinCode=min(number, 127),
            builtinCode=number,
            version=_VERSIONS.get(kind, 1),
        )

    def _operator(self, operator: _Operator, kinds: list[str], place: dict[int, int]) -> Any:
        s, options = self._schema, operator.options
        kind = 0 if options is None else getattr(s.BuiltinOptions, type(options).__name__[:-1])
        return s.OperatorT(
            opcodeIndex=kinds.index(operator.kind),
            inputs=[place[t] for t in operator.inputs],
            outputs=[place[t] for t in operator.outputs],
            builtinOptionsType=kind,
            builtinOptions=options,
        )

    def _tensor(self, tensor: _Tensor, buffers: dict[int, int]) -> Any:
        s, scales = self._schema, tensor.scales
        quantisation = None
        if scales is not None:
            quantisation = s.QuantizationParametersT(
                scale=scales.scale,
                zeroPoint=scales.zero_point,
                quantizedDimension=scales.axis,
            )
        signature = [-1 if f else d for d, f in zip(tensor.shape, tensor.free, strict=True)]
        return s.TensorT(
            shape=list(tensor.shape),
            shapeSignature=signature if any(tensor.free) else None,
            type=self.tensor_type(tensor.dtype),
            buffer=buffers[tensor.buffer],
            name=tensor.name,
            quantization=quantisation,
            hasRank=True,
        )

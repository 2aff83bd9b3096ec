"""A program as plain JSON values and back; the latter is well-formed, but not yet validated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from fastrec.runtime.native.buffers import DTYPES, SPACES, Buffer, Extent, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step

T = TypeVar("T")


def encode_program(program: Program) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The program's description, and its constants in the order of their numbers there."""
    buffers: dict[Buffer, int] = {}
    constants: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []

    def buffer(b: Buffer) -> int:
        if b not in buffers:
            buffers[b] = len(rows)
            index = b.index if b.space == "input" else 0
            if b.data is not None:
                index = len(constants)
                constants.append(b.data)
            rows.append(
                {"space": b.space, "dtype": b.dtype, "shape": _sizes(b.shape), "index": index}
            )
        return buffers[b]

    def view(v: View) -> list[Any]:
        return [buffer(v.buffer), v.offset, _sizes(v.shape), _sizes(v.strides)]

    inputs = [buffer(b) for b in program.inputs]
    steps = [
        {
            "kind": s.kind,
            "module": s.module,
            "operands": {
                name: [view(v) for v in of] if isinstance(of, list) else view(of)
                for name, of in s.operands.items()
                if of is not None
            },
            "fields": s.fields,
        }
        for s in program.steps
    ]
    outputs = [view(program.output)]
    values = {
        "symbols": list(program.symbols),
        "buffers": rows,
        "inputs": inputs,
        "steps": steps,
        "outputs": outputs,
    }
    return values, constants


def decode_program(values: dict[str, Any], constants: Sequence[np.ndarray]) -> Program:
    """Reverse of :func:`encode_program`.

    Raises:
        TypeError, ValueError, KeyError, IndexError: the values do not describe a program.
    """
    buffers: list[Buffer] = []
    for row in values["buffers"]:
        dtype, space = _named(DTYPES, row["dtype"]), _named(SPACES, row["space"])
        buffer = Buffer(dtype, _extents(row["shape"]), space)
        if buffer.space == "input":
            buffer.index = integer(row["index"])
        elif buffer.space == "constant":
            buffer.data = _one_of(constants, row["index"])
            if buffer.data.dtype != buffer.dtype:
                raise ValueError("a constant of another dtype")
        buffers.append(buffer)

    def view(row: Sequence[Any]) -> View:
        buffer, offset, shape, strides = row
        return View(_one_of(buffers, buffer), _extents(shape), _extents(strides), integer(offset))

    def operand(of: Any) -> Any:
        return [view(v) for v in of] if of and isinstance(of[0], list) else view(of) if of else []

    def step(row: dict[str, Any]) -> Step:
        operands = {text(name): operand(of) for name, of in row["operands"].items()}
        fields = dict(row["fields"])
        for name, value in fields.items():
            if type(value) is int:
                integer(value)
            elif name == "program":
                fields[name] = [_instruction(i) for i in value]
            elif name == "distances":
                fields[name] = [[integer(d) for d in distances] for distances in value]
        return Step(text(row["kind"]), operands, fields, text(row["module"]))

    inputs = [_one_of(buffers, i) for i in values["inputs"]]
    if [b.index for b in inputs] != list(range(len(inputs))):
        raise ValueError("inputs out of order")
    (output,) = map(view, values["outputs"])
    return Program(
        tuple(text(s) for s in values["symbols"]),
        inputs,
        [step(row) for row in values["steps"]],
        output,
    )


def integer(value: Any) -> int:
    """A whole number that fits 64 bits, nothing that merely converts to one."""
    if type(value) is not int or abs(value) >= 2**63:
        raise TypeError(f"{value!r} is not a number of 64 bits")
    return value


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _sizes(extents: Sequence[Extent]) -> list[list[Any]]:
    return [[int(e.coefficient), *e.symbols] for e in extents]


def _extents(values: Sequence[Any]) -> tuple[Extent, ...]:
    return tuple(Extent(integer(c), tuple(sorted(map(text, symbols)))) for c, *symbols in values)


def _instruction(row: Sequence[Any]) -> tuple[Any, ...]:
    name, *operands = row
    check: Callable[[Any], Any] = integer
    if name == "number":
        check = float
    if len(operands) > 3 or (name in ("number", "integer") and len(operands) != 1):
        raise ValueError("an instruction of another length")
    return (text(name), *map(check, operands))


def _named(names: Sequence[str], name: Any) -> str:
    if name not in names:
        raise ValueError(f"{name!r} is none of {', '.join(names)}")
    return text(name)


def _one_of(sequence: Sequence[T], position: Any) -> T:
    if not 0 <= integer(position) < len(sequence):
        raise IndexError(f"{position} of {len(sequence)}")
    return sequence[position]

"""A plan as plain JSON values, and back; what comes back is well-formed, but not yet validated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from fastrec.runtime.native.ir import DTYPES, SPACES, Buffer, Extent, Plan, Step, View

T = TypeVar("T")


def encode_plan(plan: Plan) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The plan's description, and its constants in the order that the description counts them."""
    buffers: dict[Buffer, int] = {}
    constants: list[np.ndarray] = []
    rows: list[list[Any]] = []

    def buffer(b: Buffer) -> int:
        if b not in buffers:
            buffers[b] = len(rows)
            index = b.index if b.space == "input" else 0
            if b.data is not None:
                index = len(constants)
                constants.append(b.data)
            rows.append([SPACES.index(b.space), DTYPES.index(b.dtype), _sizes(b.shape), index])
        return buffers[b]

    def view(v: View) -> list[Any]:
        return [buffer(v.buffer), v.offset, _sizes(v.shape), _sizes(v.strides)]

    inputs = [buffer(b) for b in plan.inputs]
    steps = [
        {
            "kind": s.kind,
            "module": s.module,
            "inputs": [view(v) for v in s.inputs],
            "outputs": [view(v) for v in s.outputs],
            "integers": [int(i) for i in s.integers],
            "numbers": [float(n) for n in s.numbers],
            "program": [[name, *operands] for name, *operands in s.program],
        }
        for s in plan.steps
    ]
    output = view(plan.output)
    values = {
        "symbols": list(plan.symbols),
        "buffers": rows,
        "inputs": inputs,
        "steps": steps,
        "output": output,
    }
    return values, constants


def decode_plan(values: dict[str, Any], constants: Sequence[np.ndarray]) -> Plan:
    """Reverse of :func:`encode_plan`.

    Raises:
        TypeError, ValueError, KeyError, IndexError: the values do not describe a plan.
    """
    buffers: list[Buffer] = []
    for space, dtype, shape, index in values["buffers"]:
        buffer = Buffer(_one_of(DTYPES, dtype), _extents(shape), _one_of(SPACES, space))
        if buffer.space == "input":
            buffer.index = integer(index)
        elif buffer.space == "constant":
            buffer.data = _one_of(constants, index)
            if buffer.data.dtype != buffer.dtype:
                raise ValueError("a constant of another dtype")
        buffers.append(buffer)

    def view(row: Sequence[Any]) -> View:
        buffer, offset, shape, strides = row
        return View(_one_of(buffers, buffer), _extents(shape), _extents(strides), integer(offset))

    def step(row: dict[str, Any]) -> Step:
        *extra, output = [view(v) for v in row["outputs"]]
        if len(extra) > 1:
            raise ValueError("too many results")
        return Step(
            text(row["kind"]),
            [view(v) for v in row["inputs"]],
            output,
            [integer(i) for i in row["integers"]],
            [float(n) for n in row["numbers"]],
            [_instruction(i) for i in row["program"]],
            text(row["module"]),
            extra[0] if extra else None,
        )

    inputs = [_one_of(buffers, i) for i in values["inputs"]]
    if [b.index for b in inputs] != list(range(len(inputs))):
        raise ValueError("inputs out of order")
    return Plan(
        tuple(text(s) for s in values["symbols"]),
        inputs,
        [step(row) for row in values["steps"]],
        view(values["output"]),
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


def _one_of(sequence: Sequence[T], position: Any) -> T:
    if not 0 <= integer(position) < len(sequence):
        raise IndexError(f"{position} of {len(sequence)}")
    return sequence[position]

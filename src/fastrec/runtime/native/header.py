"""A program as plain JSON values: what the compiled engine reads, from memory or from a file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastrec.runtime.native.buffers import Buffer, Shape, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step


def described(program: Program) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The program's description (csrc/cpu/engine/program.h), and its constants in the order that
    the description counts them."""
    numbers: dict[Buffer, int] = {}
    constants: list[np.ndarray] = []
    buffers: list[dict[str, Any]] = []

    def number(buffer: Buffer) -> int:
        if buffer not in numbers:
            numbers[buffer] = len(buffers)
            index = buffer.index if buffer.space == "input" else 0
            if buffer.data is not None:
                index = len(constants)
                constants.append(buffer.data)
            space = "arena" if buffer.space == "output" else buffer.space
            shape = _sizes(buffer.shape)
            buffers.append({"space": space, "dtype": buffer.dtype, "shape": shape, "index": index})
        return numbers[buffer]

    def view(v: View) -> list[Any]:
        return [number(v.buffer), int(v.offset), _sizes(v.shape), _sizes(v.strides)]

    def step(s: Step) -> dict[str, Any]:
        operands = {
            name: [view(v) for v in value] if isinstance(value, list) else view(value)
            for name, value in s.operands.items()
            if value is not None
        }
        fields = {name: _field(value) for name, value in s.fields.items()}
        return {"kind": s.kind, "module": s.module, "operands": operands, "fields": fields}

    inputs = [number(b) for b in program.inputs]
    values = {
        "symbols": list(program.symbols),
        "inputs": inputs,
        "steps": [step(s) for s in program.steps],
        "outputs": [view(v) for v in program.outputs],
        "buffers": buffers,
    }
    return values, constants


def _sizes(shape: Shape) -> list[list[Any]]:
    return [[int(e.coefficient), *e.symbols] for e in shape]


def _field(value: Any) -> Any:
    """JSON has no infinities, which the numbers of a map may be."""
    if isinstance(value, list | tuple):
        return [_field(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

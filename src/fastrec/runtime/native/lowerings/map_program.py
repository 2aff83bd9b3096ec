"""Builds the instructions of a map."""

from __future__ import annotations

from typing import Any

from fastrec.runtime.native.buffers import View
from fastrec.runtime.native.steps import Instruction


class MapProgram:
    """Instructions and inputs of a map. Each instruction's result is a register, numbered after the
    inputs."""

    def __init__(self) -> None:
        self.inputs: list[View] = []
        self._pending: list[tuple[Any, bool]] = []
        self.code: list[Instruction] = []

    def operands(self, values: list[Any], *, floating: bool) -> list[int]:
        """Registers of views and numbers, all float or all integer."""
        self.inputs = [v for v in values if isinstance(v, View)]
        registers, seen = [], 0
        for value in values:
            if isinstance(value, View):
                register, seen = seen, seen + 1
                if floating and value.dtype != "float32":
                    register = self.append("to_f32", register)
            elif floating:
                register = self.append("number", float(value))
            else:
                register = self.append("integer", int(value))
            registers.append(register)
        return registers

    def append(self, *instruction: Any) -> int:
        """The register of a new instruction's result."""
        self.code.append(instruction)
        return len(self.inputs) + len(self.code) - 1


def is_float(value: Any) -> bool:
    """Whether an operand, a view or a number, is a float."""
    return value.dtype == "float32" if isinstance(value, View) else isinstance(value, float)

"""Name functions that models spell out, such as GELU by erf and sigmoid by exp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Instruction

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# What a program may compute, in float64.
_OPS: dict[str, Callable[..., np.ndarray]] = {
    "add_f32": np.add,
    "sub_f32": np.subtract,
    "mul_f32": np.multiply,
    "div_f32": np.divide,
    "neg_f32": np.negative,
    "exp_f32": np.exp,
    "tanh_f32": np.tanh,
    "erf_f32": _erf,
    "sigmoid_f32": _sigmoid,
}
# One instruction for each function that has one.
_NAMED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_f32": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "silu_f32": lambda x: x * _sigmoid(x),
    "sigmoid_f32": _sigmoid,
    "tanh_f32": np.tanh,
}
_COSTLY = ("exp_f32", "tanh_f32", "erf_f32", "sigmoid_f32")
_PLACES = np.concatenate([np.linspace(-9, 9, 361), [-60.0, -25.0, -1e-3, 1e-3, 25.0, 60.0]])
# Where float32 overflows: e^x / (1 + e^x) is NaN there, and no sigmoid.
_EXTREMES = np.array([90, -90, 120, -120, 1e3, -1e3, np.inf, -np.inf], np.float32)
# Of the value and its argument: constants are written with five digits and more, and GELU by tanh,
# which is another function, is off by 4e-4.
_TOLERANCE = 1e-5


def name_functions(program: Program) -> None:
    """Replace the program of a map of one operand by the function that it computes.

    Compared by values: there are as many spellings as authors.
    """
    for step in program.steps:
        if step.kind == "map" and len(step.x) == 1 and len(step.program) > 1:
            name = _function(step.program)
            if name is not None:
                step.program = [(name, 0)]


def _function(program: Sequence[Instruction]) -> str | None:
    if not any(name in _COSTLY for name, *_ in program):
        return None
    with np.errstate(all="ignore"):
        values, extremes = _computed(program, _PLACES), _computed(program, _EXTREMES)
        if values is None or extremes is None:
            return None
        for name, function in _NAMED.items():
            error = np.abs(values - function(_PLACES))
            same = np.isclose(extremes, function(_EXTREMES.astype(np.float64)), equal_nan=True)
            if np.all(error <= _TOLERANCE * np.maximum(np.abs(_PLACES), 1)) and np.all(same):
                return name
    return None


def _computed(program: Sequence[Instruction], x: np.ndarray) -> np.ndarray | None:
    """The program's values in x's dtype; None where it holds another op."""
    registers = [x]
    for name, *operands in program:
        if name == "number":
            registers.append(np.full_like(x, operands[0]))
        elif name in _OPS:
            registers.append(_OPS[name](*(registers[o] for o in operands)).astype(x.dtype))
        else:
            return None
    return registers[-1]

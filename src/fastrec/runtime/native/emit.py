"""A program as the compiled executor takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastrec.kernels import _compiled
from fastrec.runtime.native.batch import batch_symbol, rows_of_layers
from fastrec.runtime.native.buffers import DTYPES, ITEMSIZE, SPACES, Buffer, View
from fastrec.runtime.native.memory import assign_slots
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.rows import row_groups, tiled
from fastrec.runtime.native.steps import ACTIVATIONS, Step
from fastrec.spec import InputSpec

_ANY = (1 << 62) - 1


def executor(
    program: Program, whole: Any = None, origins: Sequence[int] = ()
) -> tuple[Any, list[np.ndarray]]:
    """The native executor, and the constants that it borrows: keep them as long as it lives.

    A part of a program shares the packed weights of ``whole``, its executor: step i those of step
    ``origins[i]``, or of none where that is -1.
    """
    native = _compiled.native().engine
    symbols = [*program.symbols, *([""] * (native.MAX_SYMBOLS - len(program.symbols)))]
    for index, view in enumerate((program.output, *program.more_outputs)):
        view.buffer.space, view.buffer.index = "output", index
    users = batch_symbol(program)
    groups = row_groups(program, users)
    taken = assign_slots(program, ITEMSIZE, groups)
    slots = [[size.powers(symbols) for size in buffers] for buffers in taken]
    constants: dict[Buffer, int] = {}
    codes = {name: code for code, name in enumerate(native.MAP_OPS)}

    def operand(view: View, tiles: bool) -> tuple[Any, ...]:
        buffer = view.buffer
        index = buffer.index
        if buffer.space == "constant":
            index = constants.setdefault(buffer, len(constants))
        return (
            SPACES.index(buffer.space),
            index,
            DTYPES.index(buffer.dtype),
            view.offset,
            [size.powers(symbols) for size in view.shape],
            [stride.powers(symbols) for stride in view.strides],
            buffer.shape[-1].coefficient if tiles else 0,
        )

    def encoded(step: Step) -> tuple[Any, ...]:
        integers, numbers = positional(step)
        for name, *operands in step.program if step.kind == "map" else ():
            if name in ("number", "integer"):
                numbers.append(float(operands[0]))
                operands = [len(numbers) - 1]
            integers += [codes[name], *operands, *([0] * (3 - len(operands)))]
        views = [*step.inputs, *step.outputs]
        tiles = tiled(step)
        return (step.kind, [operand(v, v in tiles) for v in views], integers, numbers)

    steps = [encoded(step) for step in program.steps]
    data = [np.ascontiguousarray(b.data) for b in constants]
    made = native.Executor(
        [a.ctypes.data for a in data],
        slots,
        steps,
        whole,
        list(origins),
        -1 if users is None else program.symbols.index(users),
        [] if users is None else [r.powers(symbols) for r in rows_of_layers(program, users)],
        [(g.begin, g.end, program.symbols.index(g.symbol)) for g in groups],
    )
    return made, data


def positional(step: Step) -> tuple[list[int], list[float]]:
    """A step's fields as the lists of integers and of numbers that the executor takes today."""

    def pattern(of: Step) -> list[int]:
        lists = [[len(distances), *distances] for distances in of.distances]
        return [value for one in lists for value in one]

    def given(*names: str) -> list[int]:
        return [int(step.operands[name] is not None) for name in names]

    def flags(*names: str) -> list[int]:
        return [int(step.fields[name]) for name in names]

    def activation() -> int:
        return ACTIVATIONS.index(step.activation)

    forms: dict[str, Callable[[], tuple[list[int], list[float]]]] = {
        "attention": lambda: (given("lengths"), [step.scale]),
        "causal_attention": lambda: ([], [step.scale]),
        "masked_attention": lambda: (
            [*given("mask"), *flags("causal", "caps", "empty_is_nan")],
            [step.scale],
        ),
        "grouped_linear": lambda: ([*given("bias"), *flags("shuffle")], []),
        "layer_norm": lambda: (
            [*given("residual"), step.y_zero_point, *flags("y_tiles")],
            [step.eps, step.y_scale],
        ),
        "linear": lambda: ([*given("bias"), activation()], []),
        "linear_bf16": lambda: ([*given("bias"), activation()], []),
        "linear_int8": lambda: (
            [
                *flags("outputs", "inputs", "x_zero_point"),
                activation(),
                *given("bias"),
                *flags("y_zero_point", "x_tiles", "y_tiles"),
            ],
            [step.x_scale, step.y_scale],
        ),
        "matmul": lambda: (flags("transposed"), []),
        "quantize": lambda: ([step.zero_point], [step.scale]),
        "reduce": lambda: ([("sum", "mean", "max").index(step.operation)], []),
        "resumed_attention": lambda: (
            [1, 0, 1, step.window, len(step.distances), *pattern(step)]
            if step.has_pattern
            else [0],
            [step.scale],
        ),
        "separable_projection": lambda: ([*given("bias", "lengths"), step.before], []),
        "window_sparse_attention": lambda: (
            [*given("lengths"), *flags("causal", "window"), len(step.distances), *pattern(step)],
            [step.scale],
        ),
        "window_sparse_attention_int8": lambda: (
            [
                *given("lengths"),
                *flags("causal", "window"),
                len(step.distances),
                *flags("q_zero_point", "y_zero_point"),
                *pattern(step),
            ],
            [step.exponent_scale, step.v_scale, step.y_scale],
        ),
    }
    return forms.get(step.kind, lambda: ([], []))()


def entrance(executor: Any, constants: list[np.ndarray], program: Program, spec: InputSpec) -> Any:
    """Runs the executor on numpy arrays that are exactly as the spec says, without Python code in
    between; called with the arrays and the number of threads. It keeps the executor's
    ``constants``. None where the spec has more sizes than it can check.
    """
    native = _compiled.native().engine
    names = [*program.symbols]
    for f in spec.fields:
        names += [d for d in (*f.dims, f.rows) if isinstance(d, str) and d not in names]
    if len(names) > native.MAX_SYMBOLS:
        return None

    def size(of: int | str) -> tuple[int, int]:
        return (0, names.index(of)) if isinstance(of, str) else (of, -1)

    inputs = [
        (
            DTYPES.index(f.dtype),
            [size(d) for d in f.dims],
            f.rows is not None,
            size(0 if f.rows is None else f.rows),
        )
        for f in spec.fields
    ]
    limits = [spec.limits.get(name, (1, None)) for name in names]
    symbols = [*program.symbols, *([""] * (native.MAX_SYMBOLS - len(program.symbols)))]
    return native.Door(
        executor,
        constants,
        inputs,
        [(low, _ANY if high is None else high) for low, high in limits],
        [extent.powers(symbols) for extent in program.output.shape],
    )

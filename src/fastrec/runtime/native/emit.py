"""A plan as the compiled executor takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrec.kernels import _compiled
from fastrec.runtime.native.batch import batch_symbol, rows_of_layers
from fastrec.runtime.native.ir import DTYPES, SPACES, Buffer, Plan, Step, View
from fastrec.runtime.native.memory import assign_slots
from fastrec.runtime.native.rows import row_groups, tiled
from fastrec.spec import InputSpec

_ANY = (1 << 62) - 1

ITEMSIZE = {name: np.dtype(name).itemsize for name in DTYPES}


def executor(
    plan: Plan, whole: Any = None, origins: Sequence[int] = ()
) -> tuple[Any, list[np.ndarray]]:
    """The native executor, and the constants that it borrows: keep them as long as it lives.

    A part of a plan shares the packed weights of ``whole``, its executor: step i those of step
    ``origins[i]``, or of none where that is -1.
    """
    native = _compiled.native().engine
    symbols = [*plan.symbols, *([""] * (native.MAX_SYMBOLS - len(plan.symbols)))]
    for index, view in enumerate((plan.output, *plan.more_outputs)):
        view.buffer.space, view.buffer.index = "output", index
    users = batch_symbol(plan)
    groups = row_groups(plan, users)
    taken = assign_slots(plan, ITEMSIZE, groups)
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
        integers, numbers = list(step.integers), list(step.numbers)
        for name, *operands in step.program:
            if name in ("number", "integer"):
                numbers.append(float(operands[0]))
                operands = [len(numbers) - 1]
            integers += [codes[name], *operands, *([0] * (3 - len(operands)))]
        views = [*step.inputs, *step.outputs]
        tiles = tiled(step)
        return (step.kind, [operand(v, v in tiles) for v in views], integers, numbers)

    steps = [encoded(step) for step in plan.steps]
    data = [np.ascontiguousarray(b.data) for b in constants]
    made = native.Executor(
        [a.ctypes.data for a in data],
        slots,
        steps,
        whole,
        list(origins),
        -1 if users is None else plan.symbols.index(users),
        [] if users is None else [r.powers(symbols) for r in rows_of_layers(plan, users)],
        [(g.begin, g.end, plan.symbols.index(g.symbol)) for g in groups],
    )
    return made, data


def door(executor: Any, constants: list[np.ndarray], plan: Plan, spec: InputSpec) -> Any:
    """The way into the executor for numpy arrays that are just as the spec says: called with them
    and the number of threads, without Python code between; it keeps the executor's ``constants``.
    None where there is no such way.
    """
    native = _compiled.native().engine
    names = [*plan.symbols]
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
    symbols = [*plan.symbols, *([""] * (native.MAX_SYMBOLS - len(plan.symbols)))]
    return native.Door(
        executor,
        constants,
        inputs,
        [(low, _ANY if high is None else high) for low, high in limits],
        [extent.powers(symbols) for extent in plan.output.shape],
    )

"""Names the input behind a fault inside a step. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastrec.errors import ArgumentError, IdRangeError
from fastrec.runtime.native.buffers import Buffer, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step

# csrc/cpu/engine/plan.h: Fault.
ID_OUT_OF_RANGE = 1


def error_of(
    program: Program,
    names: Sequence[str],
    fault: int,
    position: int,
    value: int,
    sizes: Mapping[str, int],
    arrays: Sequence[np.ndarray] = (),
) -> Exception:
    """The error of a call.

    Args:
        program: what was run.
        names: of its inputs, as the caller knows them.
        fault, position, value: what the executor returned: the step, and the bad id or length.
        sizes: of the call's symbols.
        arrays: the call's inputs where they are at hand: of several that may have brought a value,
            the one that holds it is named.
    """
    step = program.steps[position]
    where = step.module or step.kind
    if fault != ID_OUT_OF_RANGE:
        held = [i for i, a in enumerate(arrays) if a.dtype.kind == "f" and np.isnan(a).any()]
        name = names[held[0]] if held else where
        return ArgumentError(name, "an input of numbers", "a NaN")
    if step.kind == "gather":
        kind, view = "ids", step.ids
        last = step.table.shape[0].at(dict(sizes)) - 1
    else:
        kind, view = "lengths", step.lengths
        rows = step.x if step.kind == "separable_projection" else step.k
        last = rows.shape[-2].at(dict(sizes))
    found = sorted(_sources(program, position, view))
    holding = [
        i
        for i in found
        if i < len(arrays) and arrays[i].dtype.kind in "iu" and (arrays[i] == value).any()
    ]
    if not found:
        return IdRangeError(where, f"{kind} in 0..{last}", value)
    name = names[holding[0]] if holding else " or ".join(names[i] for i in found)
    expected = f"{kind} in 0..{last}"
    if not holding and not _is_input(program, position, view):
        expected = f"values of which {where} gets {expected}"
    return IdRangeError(name, expected, value)


def _writers(program: Program, position: int) -> dict[Buffer, list[Step]]:
    found: dict[Buffer, list[Step]] = {}
    for step in program.steps[:position]:
        for view in step.outputs:
            found.setdefault(view.buffer, []).append(step)
    return found


def _sources(program: Program, position: int, view: View) -> set[int]:
    """Positions of the inputs that a view's values come from."""
    writers = _writers(program, position)
    open_, seen = [view.buffer], set()
    while open_:
        buffer = open_.pop()
        if buffer in seen:
            continue
        seen.add(buffer)
        open_ += [v.buffer for step in writers.get(buffer, []) for v in step.inputs]
    return {i for i, buffer in enumerate(program.inputs) if buffer in seen}


def _is_input(program: Program, position: int, view: View) -> bool:
    """Whether a view holds an input's own values, perhaps copied."""
    writers = _writers(program, position)
    buffer = view.buffer
    while (made := writers.get(buffer)) is not None:
        if len(made) > 1 or not made[0].is_copy:
            return False
        buffer = made[0].x[0].buffer
    return buffer in program.inputs

"""What a fault inside a step has to do with the caller's inputs. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastrec.errors import ArgumentError, IdRangeError
from fastrec.runtime.native.ir import Buffer, Plan, Step, View

# csrc/cpu/engine/plan.h: Fault.
ID_OUT_OF_RANGE = 1
_LENGTHS = (
    "attention",
    "separable_projection",
    "window_sparse_attention",
    "window_sparse_attention_int8",
)


def error_of(
    plan: Plan,
    names: Sequence[str],
    fault: int,
    position: int,
    value: int,
    sizes: Mapping[str, int],
    arrays: Sequence[np.ndarray] = (),
) -> Exception:
    """The error of a call.

    Args:
        plan: what was run.
        names: of its inputs, as the caller knows them.
        fault, position, value: what the executor returned: the step, and the bad id or length.
        sizes: of the call's symbols.
        arrays: the call's inputs where they are at hand: of several that may have brought a value,
            the one that holds it is named.
    """
    step = plan.steps[position]
    where = step.module or step.kind
    if fault != ID_OUT_OF_RANGE:
        held = [i for i, a in enumerate(arrays) if a.dtype.kind == "f" and np.isnan(a).any()]
        name = names[held[0]] if held else where
        return ArgumentError(name, "an input of numbers", "a NaN")
    if step.kind in _LENGTHS:
        # k's rows; x's
        kind, view = "lengths", step.inputs[-1]
        last = step.inputs[1 if "attention" in step.kind else 0].shape[-2].at(dict(sizes))
    else:
        kind, view = "ids", step.inputs[0]
        last = step.inputs[1].shape[0].at(dict(sizes)) - 1
    found = sorted(_sources(plan, position, view))
    holding = [
        i
        for i in found
        if i < len(arrays) and arrays[i].dtype.kind in "iu" and (arrays[i] == value).any()
    ]
    if not found:
        return IdRangeError(where, f"{kind} in 0..{last}", value)
    name = names[holding[0]] if holding else " or ".join(names[i] for i in found)
    expected = f"{kind} in 0..{last}"
    if not holding and not _is_input(plan, position, view):
        expected = f"values of which {where} gets {expected}"
    return IdRangeError(name, expected, value)


def _writers(plan: Plan, position: int) -> dict[Buffer, list[Step]]:
    found: dict[Buffer, list[Step]] = {}
    for step in plan.steps[:position]:
        for view in step.outputs:
            found.setdefault(view.buffer, []).append(step)
    return found


def _sources(plan: Plan, position: int, view: View) -> set[int]:
    """Positions of the inputs that a view's values come from."""
    writers = _writers(plan, position)
    open_, seen = [view.buffer], set()
    while open_:
        buffer = open_.pop()
        if buffer in seen:
            continue
        seen.add(buffer)
        open_ += [v.buffer for step in writers.get(buffer, []) for v in step.inputs]
    return {i for i, buffer in enumerate(plan.inputs) if buffer in seen}


def _is_input(plan: Plan, position: int, view: View) -> bool:
    """Whether a view holds an input's own values, perhaps copied."""
    writers = _writers(plan, position)
    buffer = view.buffer
    while (made := writers.get(buffer)) is not None:
        if len(made) > 1 or made[0].kind != "map" or made[0].program:
            return False
        buffer = made[0].inputs[0].buffer
    return buffer in plan.inputs

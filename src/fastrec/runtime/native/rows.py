"""Steps that treat the rows of one user apart (events, or candidates), to be run as one.

A group's rows are shared out among the threads once, and each thread takes its own through all the
steps: they stay in its caches, and the threads meet at the group's end, not after every step.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastrec.runtime.native.buffers import Buffer, Extent, Shape, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step

# A layer whose weights outgrow a core's second cache is better shared out by its outputs: each core
# then reads a part of them.
_MAX_WEIGHTS = 1 << 20
# The window of an attention where every query sees every key: so it is also for a part of the
# queries, whose positions then count from 0 again.
EVERYTHING = 1 << 30


@dataclass(frozen=True)
class RowGroup:
    """Steps ``begin`` to ``end - 1`` of a program, apart for each of ``symbol``'s rows."""

    begin: int
    end: int
    symbol: str


def tiled(step: Step) -> list[View]:
    """The views of a step whose bytes are in tiles."""
    fields = {"x_tiles": "x", "y_tiles": "y"}
    return [getattr(step, name) for field, name in fields.items() if step.fields.get(field)]


def row_symbol(step: Step, users: str | None) -> str | None:
    """The symbol whose rows a step keeps apart, as far as is known; None where it has none."""
    found = row_dimension(step.y.shape, users)
    if found is None:
        return None
    at, symbol = found
    last = len(step.y.shape) - 1
    rows_of = step.kind_info.rows
    apart = False
    if step.kind == "map":
        indexed = any(name == "index" and of[0] == at for name, *of in step.program)
        apart = at < last and not indexed
    elif rows_of == "elements":
        table = step.inputs[1:]
        apart = row_dimension(step.inputs[0].shape, users) == found and at < last
        apart = apart and not any(symbol in s.symbols for v in table for s in v.buffer.shape)
    elif rows_of == "last":
        weights = sum(v.buffer.data.nbytes for v in step.inputs if v.buffer.data is not None)
        rows = [v for v in (*step.inputs, *step.outputs) if v.buffer.data is None]
        apart = at < last and weights <= _MAX_WEIGHTS
        apart = apart and all(row_dimension(v.shape, users) == found for v in rows)
    elif rows_of == "queries" and _sees_everything(step):
        # The queries' rows; all see all keys.
        keys = step.inputs[1:]
        apart = row_dimension(step.q.shape, users) == (2, symbol) and at == 1
        apart = apart and not any(symbol in s.symbols for v in keys for s in v.buffer.shape)
    return symbol if apart and all(each_its_own(v, symbol) for v in step.inputs) else None


def _sees_everything(step: Step) -> bool:
    """Whether every query of an attention sees every key."""
    window, causal = step.fields.get("window", EVERYTHING), step.fields.get("causal", False)
    return bool(window == EVERYTHING and not causal)


def row_groups(program: Program, users: str | None) -> list[RowGroup]:
    """The groups of two steps and more."""
    groups: list[RowGroup] = []
    begin = 0
    symbols = [row_symbol(step, users) for step in program.steps]
    for end in range(1, len(symbols) + 1):
        if end < len(symbols) and symbols[end] == symbols[begin]:
            continue
        symbol = symbols[begin]
        if symbol is not None:
            begin, end_of = _with_whole_tiles(program, begin, end)
            if end_of - begin > 1:
                groups.append(RowGroup(begin, end_of, symbol))
        begin = end
    return groups


def _with_whole_tiles(program: Program, begin: int, end: int) -> tuple[int, int]:
    """The group without the steps at its ends that share tiles with steps outside."""

    def outside(step: Step) -> bool:
        buffers: set[Buffer] = {view.buffer for view in tiled(step)}
        others = (*program.steps[:begin], *program.steps[end:])
        return any(v.buffer in buffers for other in others for v in (*other.inputs, *other.outputs))

    while begin < end:
        at_fault = [p for p in range(begin, end) if outside(program.steps[p])]
        if not at_fault:
            break
        if at_fault[0] - begin < end - 1 - at_fault[-1]:
            begin = at_fault[-1] + 1
        else:
            end = at_fault[0]
    return begin, end


def each_its_own(view: View, symbol: str) -> bool:
    """Whether a row reads its own values: those of one for all would be another thread's."""
    if not any(symbol in size.symbols for size in view.buffer.shape):
        return True
    own = [st for s, st in zip(view.shape, view.strides, strict=True) if symbol in s.symbols]
    return len(own) == 1 and own[0].number != 0


def row_dimension(shape: Shape, users: str | None) -> tuple[int, str] | None:
    """The only dimension that depends on more than the users, if it is a symbol's size."""
    own = [Extent(s.coefficient, tuple(x for x in s.symbols if x != users)) for s in shape]
    free = [d for d, size in enumerate(own) if size.symbols]
    if len(free) != 1 or own[free[0]] != Extent(1, own[free[0]].symbols[:1]):
        return None
    return free[0], own[free[0]].symbols[0]

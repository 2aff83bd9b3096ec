"""Which buffers share memory: each lives from the step that writes it to the last that reads it."""

from __future__ import annotations

from collections.abc import Sequence

from fastrec.runtime.native.buffers import Buffer, Extent
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.rows import RowGroup


def lifetimes(program: Program, groups: Sequence[RowGroup] = ()) -> dict[Buffer, tuple[int, int]]:
    """First and last step of every arena buffer. Threads are at different steps of a group, so
    what one of its steps uses is in use throughout.
    """
    within = {p: (g.begin, g.end - 1) for g in groups for p in range(g.begin, g.end)}
    spans: dict[Buffer, tuple[int, int]] = {}
    for position, step in enumerate(program.steps):
        begin, end = within.get(position, (position, position))
        for view in (*step.inputs, *step.outputs):
            if view.buffer.space == "arena":
                first, _ = spans.get(view.buffer, (begin, end))
                spans[view.buffer] = (first, end)
    return spans


def assign_slots(
    program: Program, itemsize: dict[str, int], groups: Sequence[RowGroup] = ()
) -> list[list[Extent]]:
    """Give every arena buffer the slot whose last user is done and whose size fits best.

    Sizes may depend on free sizes, so a slot is as large as the largest of its buffers turns out to
    be in a call. Buffers that grow alike share a slot: a small one never claims a large one's.

    Returns:
        the sizes in bytes of each slot's buffers; ``Buffer.index`` is set.
    """
    slots: list[list[Extent]] = []
    busy_until: list[int] = []
    for buffer, (first, last) in sorted(
        lifetimes(program, groups).items(), key=lambda item: item[1]
    ):
        size = Extent(itemsize[buffer.dtype])
        for extent in buffer.shape:
            size = size * extent
        best, best_cost = None, float("inf")
        for index, users in enumerate(slots):
            alike = users[0].symbols == size.symbols
            cost = abs(max(u.coefficient for u in users) - size.coefficient)
            if busy_until[index] < first and alike and cost < best_cost:
                best, best_cost = index, cost
        if best is None:
            best = len(slots)
            slots.append([])
            busy_until.append(-1)
        slots[best].append(size)
        busy_until[best] = last
        buffer.index = best
    return slots

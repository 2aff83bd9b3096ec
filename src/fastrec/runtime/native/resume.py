"""A program that takes causal histories further: the rows of new events, and nothing before them.

In a causal model an event sees itself and what came before, so what was computed of a history
stands when events are appended. The program made here computes the new rows alone: its symbol of
events counts the new ones, and attention reads the keys and values of the past from the state,
whose rows the symbol ``PAST`` counts. It serves one user at a time: histories end at different
rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrec.errors import BackendError
from fastrec.runtime.native import steps as kinds_of_steps
from fastrec.runtime.native.buffers import Buffer, Extent, Shape, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.rows import each_its_own, row_dimension
from fastrec.runtime.native.steps import Instruction, Step

PAST = "past"
# Instructions that push a value of their own, without operands that number others.
_NO_OPERANDS = ("number", "integer", "index")


@dataclass(frozen=True)
class Resumption:
    """How the rows of new events come about.

    Attributes:
        program: inputs: those of the old program (events: the new ones), then ``caches``, then how
            many rows of the past count, int64 [B]; outputs: new rows of the given results,
            then of ``caches``.
        caches: the old program's buffers whose rows it needs of the past.
        origins: the old program's step behind each step, or -1.
    """

    program: Program
    caches: tuple[Buffer, ...]
    origins: tuple[int, ...]


def resume(program: Program, symbol: str, users: str, results: Sequence[View]) -> Resumption:
    """The resumption of a program whose events are counted by ``symbol``, for ``results`` of it.

    Raises:
        BackendError: a step lets events see later ones or cannot be computed row by row, and which.
    """
    maker = _Maker(program, symbol, users)
    steps = [maker.step(step) for step in program.steps]
    caches = tuple(maker.caches)
    first, *rest = [maker.copy(buffer).view() for buffer in (*(v.buffer for v in results), *caches)]
    inputs = [maker.copy(b) for b in program.inputs] + list(maker.caches.values()) + [maker.past]
    for index, buffer in enumerate(inputs):
        buffer.space, buffer.index = "input", index
    symbols = (*program.symbols, PAST)
    origins = tuple(-1 if s.kind == "resumed_attention" else p for p, s in enumerate(steps))
    return Resumption(Program(symbols, inputs, steps, first, rest), caches, origins)


class _Maker:
    def __init__(self, program: Program, symbol: str, users: str) -> None:
        self.symbol, self.users = symbol, users
        self.copies: dict[Buffer, Buffer] = {}
        self.caches: dict[Buffer, Buffer] = {}
        self.past = Buffer("int64", (Extent.of(users),))

    def step(self, step: Step) -> Step:
        shapes = (size for v in (*step.inputs, *step.outputs) for size in (*v.shape, *v.strides))
        if not any(self.symbol in size.symbols for size in shapes):
            return self.copied(step)
        pattern = _causal_pattern(step)
        if pattern is not None:
            q, k, v = step.q, step.k, step.v
            if all(view.shape[2] == Extent.of(self.symbol) for view in (q, k, v)):
                return kinds_of_steps.resumed_attention(
                    q=self.view(q),
                    k=self.view(k),
                    v=self.view(v),
                    past_k=self.of_past(k),
                    past_v=self.of_past(v),
                    past=self.past.view(),
                    y=self.view(step.y),
                    scale=step.scale,
                    module=step.module,
                    **pattern,
                )
        self.require_rows(step)
        made = self.copied(step)
        if step.kind == "map":
            row = row_dimension(step.y.shape, self.users)
            assert row is not None
            made = self.moved_on(made, row[0])
        return made

    def require_rows(self, step: Step) -> None:
        """Raise BackendError unless new rows follow from new rows."""
        rows = [row_dimension(v.shape, self.users) for v in step.outputs]
        apart = all(r is not None and r[1] == self.symbol for r in rows)
        if step.kind != "map":
            apart = apart and all(r and r[0] < len(step.y.shape) - 1 for r in rows)
        by_position = any(
            self.symbol in size.symbols and stride.number != 0
            for v in step.inputs
            if not any(self.symbol in s.symbols for s in v.buffer.shape)
            for size, stride in zip(v.shape, v.strides, strict=True)
        )
        own = all(each_its_own(v, self.symbol) for v in step.inputs)
        if step.kind_info.rows in ("elements", "last") and apart and own and not by_position:
            return
        where = step.module or "the model"
        why = f"{where}: a step {step.kind!r} mixes events"
        if "attention" in step.kind:
            why = f"{where}: its attention is not causal, so new events change all that came before"
        elif by_position:
            why = f"{where}: a table is read by position without an index; look positions up"
        raise BackendError(f"this plan cannot append events ({why}); encode the whole history anew")

    def moved_on(self, step: Step, dim: int) -> Step:
        """A map whose indices of events begin where the past ends."""
        if ("index", dim) not in step.program:
            return step
        zero = tuple(Extent(0) for _ in step.y.shape)
        past = View(self.past, step.y.shape, zero)
        before = len(step.x)
        number = {i: i for i in range(before)}  # old value -> new one; the past is number `before`
        program: list[Instruction] = []
        for position, (name, *operands) in enumerate(step.program):
            if name not in _NO_OPERANDS:
                operands = [number[o] for o in operands]
            program.append((name, *operands))
            number[before + position] = before + len(program)
            if (name, *operands) == ("index", dim):
                program.append(("add_i64", number[before + position], before))
                number[before + position] = before + len(program)
        return kinds_of_steps.map(x=[*step.x, past], y=step.y, program=program, module=step.module)

    def of_past(self, view: View) -> View:
        """The same part of the rows of the past."""
        if view.buffer not in self.caches:
            shape = self.renamed(view.buffer.shape)
            self.caches[view.buffer] = Buffer(view.dtype, shape)
        cache = self.caches[view.buffer]
        return View(cache, self.renamed(view.shape), self.renamed(view.strides), view.offset)

    def renamed(self, sizes: Shape) -> Shape:
        return tuple(
            Extent(s.coefficient, tuple(sorted(PAST if x == self.symbol else x for x in s.symbols)))
            for s in sizes
        )

    def copied(self, step: Step) -> Step:
        made = step.copy()
        made.map_operands(self.view)
        return made

    def view(self, view: View) -> View:
        return dataclasses.replace(view, buffer=self.copy(view.buffer))

    def copy(self, buffer: Buffer) -> Buffer:
        if buffer.data is not None:
            return buffer
        if buffer not in self.copies:
            self.copies[buffer] = dataclasses.replace(buffer, space="arena", index=0)
        return self.copies[buffer]


def _causal_pattern(step: Step) -> dict[str, Any] | None:
    """``resumed_attention``'s pattern for a causal attention step; None for any other step."""
    if step.kind == "causal_attention":
        return {"has_pattern": False, "window": 0, "distances": []}
    if step.kind == "window_sparse_attention" and step.causal:
        return {"has_pattern": True, "window": step.window, "distances": step.distances}
    return None

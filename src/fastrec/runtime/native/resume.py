"""A plan that takes causal histories further: the rows of new events, and nothing before them.

In a causal model an event sees itself and what came before, so what was computed of a history
stands when events are appended. The plan made here computes the new rows alone: its symbol of
events counts the new ones, and attention reads the keys and values of the past from the state,
whose rows the symbol ``PAST`` counts. It serves one user at a time: histories end at different
rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastrec.errors import BackendError
from fastrec.runtime.native.ir import Buffer, Extent, Instruction, Plan, Shape, Step, View
from fastrec.runtime.native.rows import each_its_own, row_dimension

PAST = "past"
# Kinds that compute each row of their output from the same row of what they read.
_ROW_BY_ROW = (
    "map",
    "gather",
    "layer_norm",
    "linear",
    "linear_bf16",
    "linear_int8",
    "grouped_linear",
)
# Instructions that push a value of their own, without operands that number others.
_NO_OPERANDS = ("number", "integer", "index")


@dataclass(frozen=True)
class Resumption:
    """How the rows of new events come about.

    Attributes:
        plan: inputs: those of the plan it was made of (events: the new ones), then ``caches``, then
            how many rows of the past count, int64 [B]; outputs: new rows of the given results,
            then of ``caches``.
        caches: the old plan's buffers whose rows it needs of the past.
        origins: the old plan's step behind each step, or -1.
    """

    plan: Plan
    caches: tuple[Buffer, ...]
    origins: tuple[int, ...]


def resume(plan: Plan, symbol: str, users: str, results: Sequence[View]) -> Resumption:
    """The resumption of a plan whose events are counted by ``symbol``, for ``results`` of it.

    Raises:
        BackendError: a step lets events see later ones or cannot be computed row by row, and which.
    """
    maker = _Maker(plan, symbol, users)
    steps = [maker.step(step) for step in plan.steps]
    caches = tuple(maker.caches)
    first, *rest = [maker.copy(buffer).view() for buffer in (*(v.buffer for v in results), *caches)]
    inputs = [maker.copy(b) for b in plan.inputs] + list(maker.caches.values()) + [maker.past]
    for index, buffer in enumerate(inputs):
        buffer.space, buffer.index = "input", index
    symbols = (*plan.symbols, PAST)
    origins = tuple(-1 if s.kind == "resumed_attention" else p for p, s in enumerate(steps))
    return Resumption(Plan(symbols, inputs, steps, first, rest), caches, origins)


class _Maker:
    def __init__(self, plan: Plan, symbol: str, users: str) -> None:
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
            q, k, v = step.inputs[:3]
            if all(view.shape[2] == Extent.of(self.symbol) for view in (q, k, v)):
                past = [self.of_past(k), self.of_past(v), self.past.view()]
                inputs = [self.view(q), self.view(k), self.view(v), *past]
                made = Step("resumed_attention", inputs, self.view(step.output), pattern)
                return dataclasses.replace(made, numbers=step.numbers, module=step.module)
        self.require_rows(step)
        made = self.copied(step)
        if step.kind == "map":
            row = row_dimension(step.output.shape, self.users)
            assert row is not None
            made = self.moved_on(made, row[0])
        return made

    def require_rows(self, step: Step) -> None:
        """Raise BackendError unless new rows follow from new rows."""
        rows = [row_dimension(v.shape, self.users) for v in step.outputs]
        apart = all(r is not None and r[1] == self.symbol for r in rows)
        if step.kind != "map":
            apart = apart and all(r and r[0] < len(step.output.shape) - 1 for r in rows)
        by_position = any(
            self.symbol in size.symbols and stride.number != 0
            for v in step.inputs
            if not any(self.symbol in s.symbols for s in v.buffer.shape)
            for size, stride in zip(v.shape, v.strides, strict=True)
        )
        own = all(each_its_own(v, self.symbol) for v in step.inputs)
        if step.kind in _ROW_BY_ROW and apart and own and not by_position:
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
        zero = tuple(Extent(0) for _ in step.output.shape)
        past = View(self.past, step.output.shape, zero)
        before = len(step.inputs)
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
        return dataclasses.replace(step, inputs=[*step.inputs, past], program=program)

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
        return dataclasses.replace(
            step,
            inputs=[self.view(v) for v in step.inputs],
            output=self.view(step.output),
            extra_output=None if step.extra_output is None else self.view(step.extra_output),
        )

    def view(self, view: View) -> View:
        return dataclasses.replace(view, buffer=self.copy(view.buffer))

    def copy(self, buffer: Buffer) -> Buffer:
        if buffer.data is not None:
            return buffer
        if buffer not in self.copies:
            self.copies[buffer] = dataclasses.replace(buffer, space="arena", index=0)
        return self.copies[buffer]


def _causal_pattern(step: Step) -> list[int] | None:
    """``resumed_attention``'s integers for a causal attention step; None for any other step."""
    if step.kind == "causal_attention":
        return [0]
    if step.kind == "window_sparse_attention" and step.integers[1]:
        return [1, *step.integers]
    return None

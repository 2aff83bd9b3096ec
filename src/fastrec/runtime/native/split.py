"""A program in two: what depends on the history alone, and what reads the candidates.

A step belongs to the second part if it reads a candidate input, something computed from one, or a
size that only the candidates bring. What the second part reads of the first is the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastrec.errors import ArgumentError, BackendError
from fastrec.runtime.native import steps as kinds_of_steps
from fastrec.runtime.native.buffers import Buffer, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step
from fastrec.spec import InputSpec

# The symbol of the candidates' number in the specs of fastrec's own models.
CANDIDATES = "m"
# Dtypes that a map copies.
_COPIED = ("float32", "int64", "bool")


@dataclass(frozen=True)
class Split:
    """The two parts, each a program on buffers of its own.

    Attributes:
        encode: inputs: the history's; outputs: the computed part of the state.
        score: inputs: the candidates', then the computed part of the state, then ``kept``; None
            where the state is all that there is.
        history, candidates: positions of the whole program's inputs.
        kept: those history inputs that ``score`` reads as they are, part of the state too.
        encode_origins, score_origins: the whole program's step behind each step, or -1.
    """

    encode: Program
    score: Program | None
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    kept: tuple[int, ...]
    encode_origins: tuple[int, ...]
    score_origins: tuple[int, ...]


def candidate_positions(
    spec: InputSpec, candidates: str | int | Sequence[str | int] | None = None
) -> tuple[int, ...]:
    """Which inputs are the candidates', in order.

    Args:
        spec: the model's inputs.
        candidates: names or positions; by default the inputs with a dimension ``m``.

    Raises:
        ArgumentError: an unknown name or position, no candidate input, or no other one.
    """
    names = spec.names
    wanted = f"names or positions of the inputs that hold candidates, of {list(names)}"
    if candidates is None:
        found = [i for i, f in enumerate(spec.fields) if CANDIDATES in f.dims]
        if not found:
            raise ArgumentError(
                "candidates", wanted, f"none, and no input has a dimension {CANDIDATES!r}"
            )
    else:
        given = [candidates] if isinstance(candidates, str | int) else list(candidates)
        found = []
        for one in given:
            known = one in names if isinstance(one, str) else one in range(len(names))
            if isinstance(one, bool) or not known:
                raise ArgumentError("candidates", wanted, repr(one))
            found.append(names.index(one) if isinstance(one, str) else one)
    if not found or len(set(found)) == len(names):
        raise ArgumentError("candidates", "some of the inputs, not all", f"{len(set(found))}")
    return tuple(sorted(set(found)))


def split(program: Program, candidates: Sequence[int]) -> Split:
    """The program in two parts, with ``candidates`` the positions of the second part's own inputs.

    Raises:
        BackendError: the program does not split, and why.
    """
    history = tuple(i for i in range(len(program.inputs)) if i not in candidates)
    symbols = _symbols([program.inputs[i] for i in history], program.symbols)
    late = _late_steps(program, {program.inputs[i] for i in candidates}, set(symbols))
    moved = _moved(program, late)
    parts = [_Part(program, history), _Part(program, (*candidates, *history))]
    steps: tuple[list[Step], list[Step]] = ([], [])
    origins: tuple[list[int], list[int]] = ([], [])
    for view, apart in moved.items():
        # What the first part computes of a buffer that the second fills up is copied into it.
        steps[1].append(
            kinds_of_steps.map(x=[parts[1].view(apart)], y=parts[1].view(view), program=[])
        )
        origins[1].append(-1)
    for position, step in enumerate(program.steps):
        where = int(position in late)
        replaced = {} if where else moved
        steps[where].append(parts[where].step(step, replaced))
        origins[where].append(position)
    early_writes = {
        moved.get(v, v).buffer: None
        for position, step in enumerate(program.steps)
        if position not in late
        for v in step.outputs
    }
    state = [buffer for buffer in early_writes if buffer in parts[1].copies]
    kept = tuple(i for i in history if program.inputs[i] in parts[1].read)
    _refuse(program, late, state, parts[0], history)
    for index, buffer in enumerate(state):
        copy = parts[1].copies[buffer]
        copy.space, copy.index = "input", len(candidates) + index
    for index, i in enumerate(kept):
        parts[1].copies[program.inputs[i]].index = len(candidates) + len(state) + index
    first, *rest = [parts[0].copies[buffer].view() for buffer in state]
    inputs = [*(program.inputs[i] for i in candidates), *state, *(program.inputs[i] for i in kept)]
    own = [parts[0].copies[program.inputs[i]] for i in history]
    return Split(
        Program(symbols, own, steps[0], first, rest),
        Program(
            program.symbols,
            [parts[1].copies[b] for b in inputs],
            steps[1],
            parts[1].view(program.output),
        ),
        history,
        tuple(candidates),
        kept,
        tuple(origins[0]),
        tuple(origins[1]),
    )


def whole(program: Program) -> Split:
    """A program without candidates: all of it is the first part, its output the state."""
    every = tuple(range(len(program.inputs)))
    part = _Part(program, every)
    steps = [part.step(step, {}) for step in program.steps]
    inputs = [part.copies[buffer] for buffer in program.inputs]
    encode = Program(program.symbols, inputs, steps, part.view(program.output))
    return Split(encode, None, every, (), (), tuple(range(len(steps))), ())


class _Part:
    """Copies of a program's buffers, views and steps, made as they are asked for."""

    def __init__(self, program: Program, inputs: Sequence[int]) -> None:
        self.copies: dict[Buffer, Buffer] = {}
        self.read: set[Buffer] = set()
        for index, i in enumerate(inputs):
            self.copies[program.inputs[i]] = dataclasses.replace(program.inputs[i], index=index)

    def view(self, view: View) -> View:
        buffer = view.buffer
        if buffer.data is not None:
            return view
        self.read.add(buffer)
        if buffer not in self.copies:
            self.copies[buffer] = dataclasses.replace(buffer, space="arena", index=0)
        return dataclasses.replace(view, buffer=self.copies[buffer])

    def step(self, step: Step, replaced: dict[View, View]) -> Step:
        made = step.copy()
        made.map_operands(lambda v: self.view(replaced.get(v, v)))
        return made


def _symbols(inputs: Sequence[Buffer], symbols: Sequence[str]) -> tuple[str, ...]:
    """Those symbols whose size some input has as a dimension."""
    found = {size.symbols for buffer in inputs for size in buffer.shape if size.coefficient == 1}
    return tuple(symbol for symbol in symbols if (symbol,) in found)


def _late_steps(program: Program, candidates: set[Buffer], symbols: set[str]) -> set[int]:
    """Positions of the steps of the second part."""
    stuck: set[int] = set()
    while True:
        late: set[int] = set()
        written: dict[Buffer, list[tuple[View, int]]] = {}

        for position, step in enumerate(program.steps):
            sizes = [
                size
                for view in (*step.inputs, *step.outputs)
                for size in (*view.shape, *view.strides, *view.buffer.shape)
            ]
            if (
                position in stuck
                or any(not symbols.issuperset(size.symbols) for size in sizes)
                or any(v.buffer in candidates for v in step.inputs)
                or any(p in late for v in step.inputs for p in _writers(written, v))
            ):
                late.add(position)
            for view in step.outputs:
                written.setdefault(view.buffer, []).append((view, position))
        # A part of a buffer that can't be copied into it is computed where the rest is.
        more = {
            position
            for buffer, parts in written.items()
            if buffer.dtype not in _COPIED and any(p in late for _, p in parts)
            for _, position in parts
        } - late
        if not more:
            return late
        stuck |= more


def _writers(written: dict[Buffer, list[tuple[View, int]]], view: View) -> list[int]:
    """Positions of the steps that a view's values come from."""
    parts = written.get(view.buffer, [])
    exact = [position for part, position in parts if part == view]
    return exact or [position for _, position in parts]


def _moved(program: Program, late: set[int]) -> dict[View, View]:
    """Parts that the first part writes of a buffer which the second writes too -> a buffer of
    their own."""
    shared = {v.buffer for p, step in enumerate(program.steps) if p in late for v in step.outputs}
    return {
        v: Buffer(v.dtype, v.shape).view()
        for position, step in enumerate(program.steps)
        if position not in late
        for v in step.outputs
        if v.buffer in shared
    }


def _refuse(
    program: Program, late: set[int], state: list[Buffer], early: _Part, history: Sequence[int]
) -> None:
    """Raise BackendError where one of the parts would be empty."""
    why = None
    output = program.output.buffer
    if not any(v.buffer is output for p in late for v in program.steps[p].outputs):
        why = "its scores do not depend on the candidates"
    elif not any(program.inputs[i] in early.read for i in history):
        why = "every step that reads the history reads the candidates too"
    elif not state:
        why = "its scores do not depend on the history"
    if why is not None:
        raise BackendError(f"this plan does not split into encode and score: {why}")

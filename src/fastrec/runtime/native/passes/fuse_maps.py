"""Fuse a map into the one map that reads it."""

from __future__ import annotations

from fastrec.runtime.native.buffers import Extent, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Instruction, Step

# csrc/cpu/engine: kMaxRegisters and kMaxOperands bound a fused map.
MAX_REGISTERS, MAX_INPUTS = 24, 8


def fuse_maps(program: Program) -> None:
    """Make a map that only one other map reads part of it."""
    for step in list(program.steps):
        if step.kind != "map" or step not in program.steps:
            continue
        consumers = program.readers().get(step.y.buffer, [])
        if (
            len(consumers) != 1
            or consumers[0].kind != "map"
            or step.y.buffer is program.output.buffer
        ):
            continue
        (consumer,) = consumers
        reads = [i for i, v in enumerate(consumer.x) if v.buffer is step.y.buffer]
        if len(reads) != 1 or not step.y.is_whole or _index_used(step):
            continue
        inlined = _views_through(consumer.x[reads[0]], step)
        if inlined is None:
            continue
        found = _inline(consumer, reads[0], step, inlined)
        if found is None:
            continue
        consumer.x, consumer.program = found
        program.steps.remove(step)


def _index_used(step: Step) -> bool:
    # A position means something else in the consumer's dimensions.
    return any(instruction[0] == "index" for instruction in step.program)


def _views_through(read: View, producer: Step) -> list[View] | None:
    """The producer's inputs with the dimensions under which the consumer reads its result.

    Works where the consumer reads the producer's result whole, dimension by dimension, perhaps
    with dimensions of size 1 added. A result that is broadcast is better computed once, by a step.
    """
    out = producer.y
    axis = len(out.shape) - 1
    chosen: list[int | None] = []
    for size, stride in zip(reversed(read.shape), reversed(read.strides), strict=True):
        if size.number == 1:
            chosen.append(None)
            continue
        if stride.number == 0:
            return None
        while axis >= 0 and out.shape[axis].number == 1:
            axis -= 1
        if axis < 0 or out.shape[axis] != size or out.strides[axis] != stride:
            return None
        chosen.append(axis)
        axis -= 1
    if any(out.shape[a].number != 1 for a in range(axis + 1)):
        return None
    chosen.reverse()
    return [
        View(
            v.buffer,
            read.shape,
            tuple(Extent(0) if a is None else v.strides[a] for a in chosen),
            v.offset,
        )
        for v in producer.x
    ]


def _inline(
    consumer: Step, position: int, producer: Step, views: list[View]
) -> tuple[list[View], list[Instruction]] | None:
    """Inputs and program of the consumer with the producer's program before its own."""
    kept = [v for i, v in enumerate(consumer.x) if i != position]
    inputs = list(views)
    for view in kept:
        if view not in inputs:
            inputs.append(view)
    count = len(inputs)
    if count > MAX_INPUTS or count + len(producer.program) + len(consumer.program) > MAX_REGISTERS:
        return None
    first = {i: i for i in range(len(views))}
    fused: list[Instruction] = []

    def emit(instruction: Instruction, registers: dict[int, int]) -> int:
        name, *operands = instruction
        if name not in ("number", "integer", "index"):
            operands = [registers[o] for o in operands]
        fused.append((name, *operands))
        return count + len(fused) - 1

    for offset, instruction in enumerate(producer.program):
        first[len(views) + offset] = emit(instruction, first)
    second = {}
    for i, view in enumerate(consumer.x):
        second[i] = (
            first[len(views) + len(producer.program) - 1] if i == position else inputs.index(view)
        )
    for offset, instruction in enumerate(consumer.program):
        second[len(consumer.x) + offset] = emit(instruction, second)
    return inputs, fused

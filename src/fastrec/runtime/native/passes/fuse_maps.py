"""Fuse a map into the one map that reads it."""

from __future__ import annotations

from fastrec.runtime.native.buffers import Extent, View, product
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Instruction, Step

# csrc/cpu/engine: kMaxRegisters, kMaxOperands and kMaxDims bound a fused map.
MAX_REGISTERS, MAX_INPUTS, MAX_DIMS = 24, 8, 6


def fuse_maps(program: Program) -> None:
    """Make a map that only one other map reads part of it."""
    for step in list(program.steps):
        if step.kind != "map" or step not in program.steps:
            continue
        consumers = program.readers().get(step.y.buffer, [])
        if len(consumers) != 1 or consumers[0].kind != "map" or program.gives(step.y.buffer):
            continue
        (consumer,) = consumers
        reads = [i for i, v in enumerate(consumer.x) if v.buffer is step.y.buffer]
        if len(reads) != 1 or not step.y.is_whole or _index_used(step):
            continue
        if consumer.is_copy and len(step.program) > 0:
            _apart(consumer, step.y)
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

    Works where the consumer reads the producer's result whole, dimension by dimension in any
    order, perhaps with dimensions of size 1 added. A result that is broadcast is better computed
    once, by a step.
    """
    out = producer.y
    left = [axis for axis, size in enumerate(out.shape) if size.number != 1]
    chosen: list[int | None] = []
    for size, stride in zip(read.shape, read.strides, strict=True):
        if size.number == 1:
            chosen.append(None)
            continue
        same = [a for a in left if out.shape[a] == size and out.strides[a] == stride]
        if stride.number == 0 or not same:
            return None
        chosen.append(same[0])
        left.remove(same[0])
    if left:
        return None
    return [
        View(
            v.buffer,
            read.shape,
            tuple(Extent(0) if a is None else v.strides[a] for a in chosen),
            v.offset,
        )
        for v in producer.x
    ]


def _apart(copy: Step, out: View) -> None:
    """Let a copy of ``out`` that reads several of its dimensions as one have them apart."""
    (read,) = copy.x
    shape: list[Extent] = []
    for size, stride in zip(read.shape, read.strides, strict=True):
        runs = [
            out.shape[first : last + 1]
            for last in range(len(out.shape))
            for first in range(last)
            if out.strides[last] == stride and product(out.shape[first : last + 1]) == size
        ]
        shape += runs[0] if runs else (size,)
    x, y = read.reshaped(tuple(shape)), copy.y.reshaped(tuple(shape))
    if x is not None and y is not None and len(shape) <= MAX_DIMS:
        copy.x, copy.y = [x], y


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

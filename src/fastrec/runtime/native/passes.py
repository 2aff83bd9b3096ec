"""What makes a plan fast: each pass is a function Plan -> None that changes it in place."""

from __future__ import annotations

from fastrec.runtime.native.batch import batch_symbol
from fastrec.runtime.native.copies import remove_copies
from fastrec.runtime.native.ir import Extent, Instruction, Plan, Step, View
from fastrec.runtime.native.merge import merge_linears
from fastrec.runtime.native.rows import TILES_IN, TILES_OUT, order_by_rows

# csrc/cpu/engine: kMaxRegisters and kMaxOperands bound a fused map.
MAX_REGISTERS, MAX_INPUTS = 24, 8
# Instruction -> csrc/cpu/activation_quantize/activation_quantize.h: Activation.
ACTIVATIONS = {"relu_f32": 1, "gelu_f32": 2}
# csrc/cpu/sparse_int8_linear/sparse_int8_linear.h: kTileChunk.
CHUNK = 32


def optimise(plan: Plan) -> None:
    """All passes, in the order that lets each see what the one before has freed."""
    simplify(plan)
    fuse_residuals(plan)
    merge_linears(plan)  # those whose results are read as they are
    quantise_norms(plan)
    write_in_place(plan)
    keep_tiles(plan)
    remove_unused(plan)
    order_by_rows(plan, batch_symbol(plan))


def simplify(plan: Plan) -> None:
    """The passes that serve any executor: one step a layer, without copies."""
    remove_unused(plan)
    remove_copies(plan)
    remove_unused(plan)
    fuse_maps(plan)
    fuse_activations(plan)


def remove_unused(plan: Plan) -> None:
    """Drop steps whose result nobody reads."""
    while True:
        readers = plan.readers()
        used = [
            step
            for step in plan.steps
            if any(v.buffer in readers or v.buffer is plan.output.buffer for v in step.outputs)
        ]
        if len(used) == len(plan.steps):
            return
        plan.steps = used


def fuse_maps(plan: Plan) -> None:
    """A map that one other map alone reads becomes part of it."""
    for step in list(plan.steps):
        if step.kind != "map" or step not in plan.steps:
            continue
        consumers = plan.readers().get(step.output.buffer, [])
        if (
            len(consumers) != 1
            or consumers[0].kind != "map"
            or step.output.buffer is plan.output.buffer
        ):
            continue
        (consumer,) = consumers
        reads = [i for i, v in enumerate(consumer.inputs) if v.buffer is step.output.buffer]
        if len(reads) != 1 or not _whole(step.output) or _index_used(step):
            continue
        inlined = _views_through(consumer.inputs[reads[0]], step)
        if inlined is None:
            continue
        fused = _inline(consumer, reads[0], step, inlined)
        if fused is None:
            continue
        consumer.inputs, consumer.program = fused
        plan.steps.remove(step)


def _whole(view: View) -> bool:
    return view.offset == 0 and view.shape == view.buffer.shape and view.is_contiguous


def _index_used(step: Step) -> bool:
    # A position means something else in the consumer's dimensions.
    return any(instruction[0] == "index" for instruction in step.program)


def _views_through(read: View, producer: Step) -> list[View] | None:
    """The producer's inputs as the consumer would read them: under its dimensions.

    Works where the consumer reads the producer's result whole, dimension by dimension, perhaps
    with dimensions of size 1 added. What it reads repeatedly (broadcast) is better computed once.
    """
    out = producer.output
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
        for v in producer.inputs
    ]


def _inline(
    consumer: Step, position: int, producer: Step, views: list[View]
) -> tuple[list[View], list[Instruction]] | None:
    """Inputs and program of the consumer with the producer's program before its own."""
    kept = [v for i, v in enumerate(consumer.inputs) if i != position]
    inputs = list(views)
    for view in kept:
        if view not in inputs:
            inputs.append(view)
    count = len(inputs)
    if count > MAX_INPUTS or count + len(producer.program) + len(consumer.program) > MAX_REGISTERS:
        return None
    first = {i: i for i in range(len(views))}
    program: list[Instruction] = []

    def emit(instruction: Instruction, registers: dict[int, int]) -> int:
        name, *operands = instruction
        if name not in ("number", "integer", "index"):
            operands = [registers[o] for o in operands]
        program.append((name, *operands))
        return count + len(program) - 1

    for offset, instruction in enumerate(producer.program):
        first[len(views) + offset] = emit(instruction, first)
    second = {}
    for i, view in enumerate(consumer.inputs):
        second[i] = (
            first[len(views) + len(producer.program) - 1] if i == position else inputs.index(view)
        )
    for offset, instruction in enumerate(consumer.program):
        second[len(consumer.inputs) + offset] = emit(instruction, second)
    return inputs, program


def fuse_activations(plan: Plan) -> None:
    """ReLU or GELU of a float linear layer's result is done before the result leaves the core."""
    readers, writers = plan.readers(), plan.writer()
    for step in list(plan.steps):
        activation = ACTIVATIONS.get(step.program[0][0]) if len(step.program) == 1 else None
        if step.kind != "map" or activation is None or not _whole(step.inputs[0]):
            continue
        buffer = step.inputs[0].buffer
        made = writers.get(buffer, [])
        if len(made) != 1 or made[0].kind != "linear" or len(readers[buffer]) != 1:
            continue
        if buffer is plan.output.buffer or not _whole(step.output):
            continue
        made[0].output = step.output
        made[0].integers[1] = activation
        plan.steps.remove(step)


def fuse_residuals(plan: Plan) -> None:
    """x + y that a LayerNorm reads is added there, and written from there if others read it."""
    for step in list(plan.steps):
        if step.kind != "map" or step.program != [("add_f32", 0, 1)]:
            continue
        if not (all(map(_whole, step.inputs)) and _whole(step.output)):
            continue
        readers = plan.readers().get(step.output.buffer, [])
        norm = readers[0] if readers else None
        if norm is None or norm.kind != "layer_norm" or norm.integers[0]:
            continue
        first = min(plan.steps.index(r) for r in readers)
        if plan.steps[first] is not norm:
            continue
        norm.inputs = [*step.inputs, *norm.inputs[1:]]
        norm.integers[0] = 1
        if len(readers) > 1 or step.output.buffer is plan.output.buffer:
            norm.extra_output = step.output
        plan.steps.remove(step)


def quantise_norms(plan: Plan) -> None:
    """A LayerNorm whose readers all quantise its result alike writes it as uint8 itself."""
    readers = plan.readers()
    for step in plan.steps:
        if step.kind != "layer_norm" or step.output.buffer is plan.output.buffer:
            continue
        users = readers.get(step.output.buffer, [])
        if not users or any(u.kind != "linear_int8" for u in users):
            continue
        # Of x: zero point and scale, as lowerings/layers.py writes them.
        if len({(u.integers[2], u.numbers[0]) for u in users}) != 1:
            continue
        step.output.buffer.dtype = "uint8"
        step.integers[1] = users[0].integers[2]
        step.numbers[1] = users[0].numbers[0]


def write_in_place(plan: Plan) -> None:
    """A map whose result is copied into a part of a larger buffer writes there itself."""
    for copy in list(plan.steps):
        if copy.kind != "map" or copy.program:
            continue
        source = copy.inputs[0]
        writers = plan.writer().get(source.buffer, [])
        if len(writers) != 1 or writers[0].kind != "map" or not _whole(source):
            continue
        if source.shape != copy.output.shape or source.buffer.space != "arena":
            continue
        into = copy.output
        readers = plan.readers().get(source.buffer, [])
        if any(not _whole(v) for r in readers for v in r.inputs if v.buffer is source.buffer):
            continue
        if any(r is not copy and r.kind != "map" for r in readers):
            continue
        for reader in readers:
            reader.inputs = [into if v.buffer is source.buffer else v for v in reader.inputs]
        writers[0].output = into
        plan.steps.remove(copy)


def keep_tiles(plan: Plan) -> None:
    """uint8 activations that int8 layers alone read are written as those layers lay them out."""
    readers = plan.readers()
    for step in plan.steps:
        buffer = step.output.buffer
        if step.kind not in ("linear_int8", "layer_norm") or buffer.dtype != "uint8":
            continue
        users = readers.get(buffer, [])
        if buffer is plan.output.buffer or any(u.kind != "linear_int8" for u in users):
            continue
        if not _whole(step.output) or any(not _whole(u.inputs[0]) for u in users):
            continue
        step.integers[TILES_OUT[step.kind]] = 1
        for user in users:
            user.integers[TILES_IN] = 1
        *rows, width = buffer.shape
        # Whole chunks, of two bytes an element where the instruction set has no dot product of
        # bytes.
        padded = -(-width.coefficient // CHUNK) * CHUNK
        buffer.shape = (*rows, Extent(2 * padded))

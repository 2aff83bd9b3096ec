"""Merge linear layers of one input into one layer.

A query, key and value projection written as three layers becomes one product, whose input is laid
out for the kernel once and whose result is read in slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Buffer, Extent, View
from fastrec.runtime.native.passes.remove_copies import through
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step

# csrc/cpu/sparse_int8_linear/sparse_int8_linear.h: kPanelOutputs.
PANEL = 32
# csrc/cpu/engine/linear.cpp: kFewOutputs; such layers run as dot products, without panels.
FEW_OUTPUTS = 4
# Operands that are joined, by kind.
_JOINED = {
    "linear": ("weight", "bias"),
    "linear_int8": ("values", "group_index", "panel_start", "w_scale", "w_sum", "bias"),
}


def merge_linears(program: Program) -> None:
    """Merge layers of one input where the readers of their results can read slices."""
    for group in _groups(program):
        if len(group) > 1:
            _merge(program, group)


def _groups(program: Program) -> list[list[Step]]:
    """Layers that differ only in their weights and in the steps that read them."""
    readers = program.readers()
    found: dict[object, list[Step]] = {}
    for step in program.steps:
        if step.kind not in _JOINED or step.y.dtype != "float32":
            continue
        if program.gives(step.y.buffer) or not step.y.is_whole:
            continue
        outputs = _outputs(step)
        if outputs % PANEL if step.kind == "linear_int8" else outputs <= FEW_OUTPUTS:
            continue
        # Each reader has to be able to read a slice of something wider.
        wider = Buffer("float32", (*step.y.shape[:-1], Extent(2 * outputs))).view()
        if _reads(readers.get(step.y.buffer, []), step.y.buffer, wider, 0) is None:
            continue
        constants = [getattr(step, name) for name in _JOINED[step.kind]]
        if any(v is not None and (v.constant is None or not v.is_contiguous) for v in constants):
            continue
        fields = {name: value for name, value in step.fields.items() if name != "outputs"}
        has_bias = step.bias is not None
        key = (step.kind, step.x, step.y.shape[:-1], has_bias, tuple(fields.values()))
        found.setdefault(key, []).append(step)
    return list(found.values())


def _outputs(step: Step) -> int:
    outputs: int = step.y.shape[-1].coefficient
    return outputs


def _reads(
    readers: Sequence[Step], buffer: Buffer, wider: View, start: int
) -> list[tuple[Step, View, View]] | None:
    """(reader, old view, new view) where columns of ``wider`` take the place of ``buffer``; None
    where a reader needs its rows next to each other."""
    columns = wider.sliced(len(wider.shape) - 1, start, buffer.shape[-1])
    assert columns is not None
    found = []
    for reader in dict.fromkeys(readers):
        for view in reader.reads(buffer):
            moved = through(view, columns)
            if moved is None or not reader.accepts(view, moved):
                return None
            found.append((reader, view, moved))
    return found


def _merge(program: Program, layers: list[Step]) -> None:
    readers = program.readers()
    first = layers[0]
    widths = [_outputs(step) for step in layers]
    y = Buffer("float32", (*first.y.shape[:-1], Extent(sum(widths)))).view()
    start = 0
    for step, width in zip(layers, widths, strict=True):
        reads = _reads(readers.get(step.y.buffer, []), step.y.buffer, y, start)
        assert reads is not None
        for reader, old, new in reads:
            reader.replace_operand(old, new)
        start += width
    module = ", ".join(dict.fromkeys(step.module for step in layers if step.module))
    joined = {name: _joined(layers, name) for name in _JOINED[first.kind]}
    if first.kind == "linear":
        merged = steps.linear(x=first.x, y=y, **joined, **first.fields, module=module)
    else:
        joined["panel_start"] = _joined_starts(layers)
        fields = {**first.fields, "outputs": sum(widths)}
        merged = steps.linear_int8(x=first.x, y=y, **joined, **fields, module=module)
    program.steps[program.steps.index(first)] = merged
    program.steps = [step for step in program.steps if step not in layers]


def _constant(parts: Sequence[np.ndarray]) -> View:
    data = np.ascontiguousarray(np.concatenate(parts))
    shape = tuple(Extent(s) for s in data.shape)
    return Buffer(str(data.dtype), shape, "constant", data=data).view()


def _joined(layers: list[Step], name: str) -> View | None:
    """An operand of the layers, one layer's outputs after the other's."""
    parts = [getattr(step, name) for step in layers]
    return None if parts[0] is None else _constant([part.constant for part in parts])


def _joined_starts(layers: list[Step]) -> View:
    """The layers' panel starts; their panels are whole, so they follow each other."""
    before, starts = 0, [np.zeros(1, np.int32)]
    for step in layers:
        start = step.panel_start.constant
        starts.append((start[1:] + before).astype(np.int32))
        before += int(start[-1])
    return _constant(starts)

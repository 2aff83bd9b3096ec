"""Linear layers of one input become one: a query, key and value projection written as three layers
is one product, whose input is laid out for the kernel once and whose result is read in slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastrec.runtime.native.copies import accepts, through
from fastrec.runtime.native.ir import Buffer, Extent, Plan, Step, View

# csrc/cpu/sparse_int8_linear/sparse_int8_linear.h: kPanelOutputs.
PANEL = 32
# csrc/cpu/engine/linear.cpp: kFewOutputs; such layers run as dot products, without panels.
FEW_OUTPUTS = 4
# linear_int8's integers (lowerings/layers.py): how many outputs, and whether there is a bias.
_OUTPUTS, _BIAS = 0, 4


def merge_linears(plan: Plan) -> None:
    """Merge layers that read the same rows and whose readers can read rows further apart."""
    for group in _groups(plan):
        if len(group) > 1:
            _merge(plan, group)


def _groups(plan: Plan) -> list[list[Step]]:
    """Layers that differ in nothing but their weights and who reads them."""
    readers = plan.readers()
    found: dict[object, list[Step]] = {}
    for step in plan.steps:
        if step.kind not in ("linear", "linear_int8") or step.output.dtype != "float32":
            continue
        if step.output.buffer is plan.output.buffer or not _whole(step.output):
            continue
        outputs = _outputs(step)
        if outputs % PANEL if step.kind == "linear_int8" else outputs <= FEW_OUTPUTS:
            continue
        # Each reader has to be able to read a slice of something wider.
        wider = Buffer("float32", (*step.output.shape[:-1], Extent(2 * outputs))).view()
        if _reads(readers.get(step.output.buffer, []), step.output.buffer, wider, 0) is None:
            continue
        same = list(step.integers)
        if step.kind == "linear_int8":
            del same[_OUTPUTS]
        constants = step.inputs[1:]
        if any(v.constant is None or not v.is_contiguous for v in constants):
            continue
        key = (step.kind, step.inputs[0], step.output.shape[:-1], tuple(same), tuple(step.numbers))
        found.setdefault(key, []).append(step)
    return list(found.values())


def _outputs(step: Step) -> int:
    return step.output.shape[-1].coefficient


def _whole(view: View) -> bool:
    return view.offset == 0 and view.shape == view.buffer.shape and view.is_contiguous


def _reads(
    readers: Sequence[Step], buffer: Buffer, wider: View, start: int
) -> list[tuple[Step, int, View]] | None:
    """(reader, position, new view) where columns of ``wider`` take the place of ``buffer``; None
    where a reader needs its rows next to each other."""
    columns = wider.sliced(len(wider.shape) - 1, start, buffer.shape[-1])
    assert columns is not None
    found = []
    for reader in dict.fromkeys(readers):
        for position, view in enumerate(reader.inputs):
            if view.buffer is not buffer:
                continue
            moved = through(view, columns)
            if moved is None or not accepts(reader, position, moved):
                return None
            found.append((reader, position, moved))
    return found


def _merge(plan: Plan, layers: list[Step]) -> None:
    readers = plan.readers()
    first = layers[0]
    widths = [_outputs(step) for step in layers]
    shape = (*first.output.shape[:-1], Extent(sum(widths)))
    result = Buffer("float32", shape).view()
    start = 0
    for step, width in zip(layers, widths, strict=True):
        reads = _reads(readers.get(step.output.buffer, []), step.output.buffer, result, start)
        assert reads is not None
        for reader, position, view in reads:
            reader.inputs[position] = view
        start += width
    inputs = _joined_int8(layers) if first.kind == "linear_int8" else _joined(layers)
    merged = Step(
        first.kind, [first.inputs[0], *inputs], result, list(first.integers), list(first.numbers)
    )
    if first.kind == "linear_int8":
        merged.integers[_OUTPUTS] = sum(widths)
    merged.module = ", ".join(dict.fromkeys(step.module for step in layers if step.module))
    plan.steps[plan.steps.index(first)] = merged
    plan.steps = [step for step in plan.steps if step not in layers]


def _constant(parts: Sequence[np.ndarray]) -> View:
    data = np.ascontiguousarray(np.concatenate(parts))
    shape = tuple(Extent(s) for s in data.shape)
    return Buffer(str(data.dtype), shape, "constant", data=data).view()


def _values(step: Step, position: int) -> np.ndarray:
    values = step.inputs[position].constant
    assert values is not None
    return values


def _joined(layers: list[Step]) -> list[View]:
    """Weight [N, K] and bias, one layer's outputs after the other's."""
    positions = range(1, len(layers[0].inputs))
    return [_constant([_values(step, p) for step in layers]) for p in positions]


def _joined_int8(layers: list[Step]) -> list[View]:
    """Packed weight, scales, sums and bias; panels are whole, so that they follow each other."""
    before, starts = 0, [np.zeros(1, np.int32)]
    for step in layers:
        start = _values(step, 3)
        starts.append((start[1:] + before).astype(np.int32))
        before += int(start[-1])
    joined = []
    for position in range(1, len(layers[0].inputs)):
        parts = starts if position == 3 else [_values(step, position) for step in layers]
        joined.append(_constant(parts))
    return joined

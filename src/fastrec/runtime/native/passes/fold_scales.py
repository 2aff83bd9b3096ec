"""Fold batch norms into the linear layers before them."""

from __future__ import annotations

import numpy as np

from fastrec.runtime.native.buffers import Buffer, Extent, View
from fastrec.runtime.native.program import Program


def fold_scales(program: Program) -> None:
    """Let a float linear layer have the scale and shift of each of its outputs in its weights."""
    readers, writers = program.readers(), program.writers()
    for step in list(program.steps):
        if not step.computes(("mul_f32", 0, 1), ("add_f32", 3, 2)) or not step.y.is_whole:
            continue
        source, *channels = step.x
        made = writers.get(source.buffer, [])
        if len(made) != 1 or made[0].kind != "linear" or made[0].activation != "none":
            continue
        if len(readers[source.buffer]) != 1 or source.buffer is program.output.buffer:
            continue
        scale, shift = (_channels(view) for view in channels)
        if scale is None or shift is None or not source.is_whole:
            continue
        linear = made[0]
        weight = linear.weight.constant.astype(np.float64)
        bias = 0.0 if linear.bias is None else linear.bias.constant.astype(np.float64)
        linear.weight = _constant(weight * scale[:, None])
        linear.bias = _constant(bias * scale + shift)
        linear.y = step.y
        program.steps.remove(step)


def _channels(view: View) -> np.ndarray | None:
    """The numbers of the last dimension, of a constant that is the same along the others."""
    if any(stride.number != 0 for stride in view.strides[:-1]) or view.buffer.data is None:
        return None
    row = View(view.buffer, view.shape[-1:], view.strides[-1:], view.offset).constant
    return np.asarray(row, np.float64)


def _constant(values: np.ndarray) -> View:
    data = np.ascontiguousarray(values, np.float32)
    shape = tuple(Extent(size) for size in data.shape)
    return Buffer("float32", shape, "constant", data=data).view()

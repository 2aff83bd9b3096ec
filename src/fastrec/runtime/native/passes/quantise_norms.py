"""Quantise the results of LayerNorms where they are computed."""

from __future__ import annotations

from fastrec.runtime.native.program import Program


def quantise_norms(program: Program) -> None:
    """Let a LayerNorm whose readers all quantise its result alike write uint8."""
    readers = program.readers()
    for step in program.steps:
        if step.kind != "layer_norm" or program.gives(step.y.buffer):
            continue
        users = readers.get(step.y.buffer, [])
        if not users or any(user.kind != "linear_int8" for user in users):
            continue
        if len({(user.x_zero_point, user.x_scale) for user in users}) != 1:
            continue
        step.y.buffer.dtype = "uint8"
        step.y_zero_point, step.y_scale = users[0].x_zero_point, users[0].x_scale

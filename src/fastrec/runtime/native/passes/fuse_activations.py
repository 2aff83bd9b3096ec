"""Fuse activations into the linear layers before them."""

from __future__ import annotations

from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step

_LINEAR = ("linear", "window_linear")
# A map's instruction -> a linear layer's activation.
_ACTIVATIONS = {"relu_f32": "relu", "gelu_f32": "gelu"}


def fuse_activations(program: Program) -> None:
    """Let a float linear layer apply the ReLU or GELU that is its result's only reader."""
    readers, writers = program.readers(), program.writers()
    for step in list(program.steps):
        activation = activation_of(step)
        if activation is None or not step.x[0].is_whole or not step.y.is_whole:
            continue
        buffer = step.x[0].buffer
        made = writers.get(buffer, [])
        if len(made) != 1 or made[0].kind not in _LINEAR or len(readers[buffer]) != 1:
            continue
        if program.gives(buffer):
            continue
        made[0].y, made[0].activation = step.y, activation
        program.steps.remove(step)


def activation_of(step: Step) -> str | None:
    """The activation of a map that computes only that, else None."""
    if step.kind != "map" or len(step.program) != 1:
        return None
    return _ACTIVATIONS.get(step.program[0][0])

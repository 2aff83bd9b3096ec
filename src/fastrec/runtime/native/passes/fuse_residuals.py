"""Fuse residual sums into the LayerNorms after them."""

from __future__ import annotations

from fastrec.runtime.native.program import Program


def fuse_residuals(program: Program) -> None:
    """Let a LayerNorm compute the x + y that it reads, and write it too where others read it."""
    for step in list(program.steps):
        if not step.computes(("add_f32", 0, 1)):
            continue
        if not (all(view.is_whole for view in step.x) and step.y.is_whole):
            continue
        readers = program.readers().get(step.y.buffer, [])
        norm = readers[0] if readers else None
        if norm is None or norm.kind != "layer_norm" or norm.residual is not None:
            continue
        first = min(program.steps.index(r) for r in readers)
        if program.steps[first] is not norm:
            continue
        norm.x, norm.residual = step.x
        if len(readers) > 1 or program.gives(step.y.buffer):
            norm.sum = step.y
        program.steps.remove(step)

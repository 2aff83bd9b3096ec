"""Drop steps whose results are not read."""

from __future__ import annotations

from fastrec.runtime.native.program import Program


def remove_unused(program: Program) -> None:
    """Drop such steps, and then those that only they read."""
    while True:
        readers = program.readers()
        used = [
            step
            for step in program.steps
            if any(v.buffer in readers or program.gives(v.buffer) for v in step.outputs)
        ]
        if len(used) == len(program.steps):
            return
        program.steps = used

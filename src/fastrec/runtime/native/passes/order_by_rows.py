"""Bring steps on the same rows together, so that they can run as one group."""

from __future__ import annotations

from fastrec.runtime.native.batch import batch_symbol
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.rows import row_symbol


def order_by_rows(program: Program) -> None:
    """Reorder steps so that those on the same rows follow each other where dependencies allow."""
    users = batch_symbol(program)
    writers = program.writers()
    position = {step: p for p, step in enumerate(program.steps)}
    symbol = {step: row_symbol(step, users) for step in program.steps}
    # Of a buffer that several steps fill, what a step reads was written before it.
    needed = {
        step: {
            w
            for v in step.inputs
            for w in writers.get(v.buffer, ())
            if position[w] < position[step]
        }
        for step in program.steps
    }
    pending, done = list(program.steps), []
    current: str | None = None
    while pending:
        ready = [step for step in pending if needed[step].isdisjoint(pending)]
        step = next((s for s in ready if symbol[s] == current), ready[0])
        pending.remove(step)
        done.append(step)
        current = symbol[step]
    program.steps = done

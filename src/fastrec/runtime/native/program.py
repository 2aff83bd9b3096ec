"""A model's forward as steps in order, before a plan is made of it. No torch.

A program is in SSA form: each step writes a buffer (or a part of one) that no other step
overwrites, and a view of a buffer costs nothing. The compiled executor makes its plan from a
program: which buffers share memory, which steps run together.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastrec.runtime.native.buffers import Buffer, View
from fastrec.runtime.native.steps import Step


@dataclass
class Program:
    """Steps in order.

    Attributes:
        symbols: names of the free sizes, e.g. ``B``.
        inputs: a buffer for each input of the model.
        steps: what is computed.
        outputs: the results, each a whole buffer of its own; of a model, one.
        fixed: why sizes that the spec leaves free are no symbols ("" where all are).
    """

    symbols: tuple[str, ...]
    inputs: list[Buffer]
    steps: list[Step]
    outputs: list[View]
    fixed: str = ""

    @property
    def output(self) -> View:
        """The first result."""
        return self.outputs[0]

    def gives(self, buffer: Buffer) -> bool:
        """Whether a buffer is a result."""
        return any(view.buffer is buffer for view in self.outputs)

    def readers(self) -> dict[Buffer, list[Step]]:
        """Which steps read a buffer; a step that reads it twice stands twice."""
        found: dict[Buffer, list[Step]] = {}
        for step in self.steps:
            for view in step.inputs:
                found.setdefault(view.buffer, []).append(step)
        return found

    def writers(self) -> dict[Buffer, list[Step]]:
        """Which steps write a buffer (several where each fills a part)."""
        found: dict[Buffer, list[Step]] = {}
        for step in self.steps:
            for view in step.outputs:
                found.setdefault(view.buffer, []).append(step)
        return found

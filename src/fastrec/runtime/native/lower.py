"""A torch model as a program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastrec.exporters.trace import evaluated, traced
from fastrec.runtime.native import lowerings  # noqa: F401  (registers every lowering)
from fastrec.runtime.native.lowerer import Lowerer
from fastrec.runtime.native.program import Program
from fastrec.spec import InputSpec


def lower(model: nn.Module, example_inputs: Sequence[torch.Tensor], spec: InputSpec) -> Program:
    """The model's forward as a program, one step an op; passes fuse them afterwards.

    Sizes that the spec leaves free are symbols where the model's export allows it; what it fixes
    (say, a history length that the code specialises on) is fixed to the examples' size.

    Args:
        model: any module that torch.export takes.
        example_inputs: as the spec says.
        spec: the model's inputs.

    Raises:
        BackendError: the model can't be exported, or holds an op that has no lowering; the message
            names the op and the module it comes from.
    """
    exported, symbols = traced(evaluated(model), example_inputs, spec)
    return Lowerer(exported, symbols, spec).run()


def program_spec(
    spec: InputSpec, program: Program, example_inputs: Sequence[torch.Tensor]
) -> InputSpec:
    """The spec of the inputs that the program accepts: sizes that the export could not leave free
    are fixed to the examples'."""
    return spec.fixed_to([tuple(t.shape) for t in example_inputs], keep=program.symbols)

"""A torch model as a program."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch._decomp import decomposition_table

from fastrec.errors import BackendError
from fastrec.exporters.trace import evaluated, exports, quiet, typed
from fastrec.runtime.native import lowerings  # noqa: F401  (registers every lowering)
from fastrec.runtime.native.lowerer import Lowerer, is_lowered
from fastrec.runtime.native.piece import piece_of
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.refusals import FreeSize, written
from fastrec.runtime.native.registry import LOWERINGS
from fastrec.spec import InputSpec

# Decompositions of decompositions.
_ROUNDS = 3


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
            names all such ops, with the modules and lines that they come from.
    """
    problem: BackendError | None = None
    for exported, symbols, reason in exports(evaluated(model), example_inputs, spec):
        try:
            graph = decomposed(exported)
            program = Lowerer(piece_of(graph, spec), symbols, spec).run()
        except FreeSize as error:
            problem = error  # with that size fixed it may be a plan
        else:
            program.fixed = str(problem or "") or (reason and f"torch.export: {reason}")
            return program
    assert problem is not None
    raise problem


def decomposed(
    exported: torch.export.ExportedProgram, whole: Collection[str] = ()
) -> torch.export.ExportedProgram:
    """The graph without in-place ops, and what has no lowering in terms of torch's core ops.

    A graph of ops that all have lowerings stays as it is, and so do the ops named in ``whole``.
    """
    if all(map(is_lowered, exported.graph.nodes)):
        return exported
    table = torch.export.default_decompositions()
    kept = {target for target in decomposition_table if str(target) in whole}
    for target in (*LOWERINGS, *kept):
        table.pop(target, None)
    for _ in range(_ROUNDS):
        with quiet(), typed("torch can't decompose this model"):
            exported = exported.run_decompositions(table)
        left = {n.target for n in exported.graph.nodes if not is_lowered(n)}
        # torch can take more ops apart than those beyond its core.
        found = {t: f for t, f in decomposition_table.items() if t in left - {*table, *kept}}
        if not found:
            break
        table.update(found)
    return exported


def decomposed_in_parts(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same for a graph that is cut: what torch is left with keeps the ops as written."""
    made = decomposed(exported)
    left = {written(n) for n in made.graph.nodes if not is_lowered(n)}
    return decomposed(exported, left) if left else made


def program_spec(
    spec: InputSpec, program: Program, example_inputs: Sequence[torch.Tensor]
) -> InputSpec:
    """The spec of the inputs that the program accepts: sizes that the export could not leave free
    are fixed to the examples'."""
    return spec.fixed_to([tuple(t.shape) for t in example_inputs], keep=program.symbols)

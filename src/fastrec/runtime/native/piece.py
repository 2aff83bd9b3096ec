"""The part of torch's graph that becomes one program: all of a model, or a region of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import OutputKind

from fastrec.spec import InputSpec


def is_free(size: Any) -> bool:
    """Whether a size of a traced tensor is no number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


@dataclass(frozen=True)
class Piece:
    """The part of a graph that becomes a program.

    Attributes:
        nodes: its ops, in order.
        held: placeholders of the model's own tensors -> their values.
        inputs: nodes whose values the program is given, in the order of the specification.
        outputs: nodes whose values it gives.
        names: torch's expression of a size -> the program's symbol.
        packed: whether the outputs are float32, whatever the nodes' dtypes, as a model's is.
    """

    nodes: Sequence[torch.fx.Node]
    held: Mapping[torch.fx.Node, torch.Tensor]
    inputs: Sequence[torch.fx.Node]
    outputs: Sequence[torch.fx.Node]
    names: Mapping[Any, str]
    packed: bool = True


def piece_of(exported: torch.export.ExportedProgram, spec: InputSpec) -> Piece:
    """The whole graph of an export."""
    signature = exported.graph_signature
    state = {**exported.state_dict, **exported.constants}
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    inputs = [n for n in placeholders if n.name not in held]
    results: Any = next(n for n in exported.graph.nodes if n.op == "output").args[0]
    kinds = [spec.kind for spec in signature.output_specs]
    names = {
        size.node.expr: str(dim)
        for node, f in zip(inputs, spec.fields, strict=True)
        for size, dim in zip(node.meta["val"].shape, f.dims, strict=True)
        if isinstance(size, torch.SymInt)
    }
    return Piece(
        [n for n in exported.graph.nodes if n.op == "call_function"],
        {n: state[held[n.name]] for n in placeholders if n.name in held},
        inputs,
        [r for r, kind in zip(results, kinds, strict=True) if kind is OutputKind.USER_OUTPUT],
        names,
    )

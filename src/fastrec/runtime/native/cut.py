"""Cuts a graph that is no one plan: native plans where ops have lowerings, torch in between."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.fx.passes.tools_common import legalize_graph

from fastrec.errors import BackendError
from fastrec.runtime.native.lowerer import Lowerer, is_lowered, is_size
from fastrec.runtime.native.passes import optimise
from fastrec.runtime.native.piece import Piece
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.refusals import Unlowered, no_lowering, refusal
from fastrec.runtime.native.region import Region, region_inputs

# A region of at most this many steps, all of these kinds, costs less in torch than a call.
_FEW = 2
_CHEAP = ("map", "reduce", "gather", "take", "cumsum", "argsort", "scatter")
# Computed in these dtypes as torch does; others would be computed in float32.
_EXACT = (
    torch.float32,
    torch.complex64,
    torch.bool,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
)


@dataclass(frozen=True)
class Cut:
    """A graph, cut.

    Attributes:
        module: takes the graph's placeholders; its regions are native plans, the rest torch ops.
        regions: the plans, in order.
        ops: how many ops the graph has, and how many of them the plans hold.
        reasons: why ops are in no plan, each with its module and line.
    """

    module: GraphModule
    regions: list[Region]
    ops: tuple[int, int]
    reasons: list[str]


def cut(graph: GraphModule, held: Mapping[Node, torch.Tensor], threads: int) -> Cut:
    """Cut an exported graph without in-place ops.

    Args:
        graph: whose placeholders are the model's own tensors and its inputs.
        held: placeholders of the model's own tensors -> their values, which the plans copy.
        threads: threads that a plan is made for.

    Raises:
        BackendError: torch cannot put the parts in order.
    """
    # Those without users are checks.
    ops = [n for n in graph.graph.nodes if n.op == "call_function" and n.users and not is_size(n)]
    refused = {
        node: no_lowering(node)
        if not is_lowered(node)
        else refusal(node, "its dtype stays torch's")
        for node in ops
        if not (is_lowered(node) and _is_exact(node))
    }
    views = _aliases(graph.graph)
    lowered: dict[tuple[Node, ...], tuple[Program, Region]] = {}
    while True:
        allowed: set[Node] = set()
        for node in ops:
            whole = node.target is not operator.getitem or node.args[0] in allowed
            if whole and node not in refused and node not in views:
                allowed.add(node)
        problems: dict[Node, str] = {}
        regions = _partitions(graph, allowed)
        for nodes in regions:
            if nodes in lowered:
                continue
            try:
                lowered[nodes] = _lowered(nodes, held, threads)
            except Unlowered as error:
                problems.update(error.reasons)
            except BackendError as error:
                why = refusal(nodes[0], f"{error} in the plan from here on")
                problems.update(dict.fromkeys(nodes, why))
        if not problems:
            break
        refused.update(problems)
    worth = {nodes: lowered[nodes][1] for nodes in regions if _is_worth(lowered[nodes][0])}
    reasons = [why for node, why in refused.items() if node.target is not operator.getitem]
    kept = sum(map(len, worth))
    return Cut(
        _assembled(graph, worth),
        list(worth.values()),
        (len(ops), kept),
        list(dict.fromkeys(reasons)),
    )


def _is_exact(node: Node) -> bool:
    """Whether a plan computes a node's result in the dtype that torch does."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(v, torch.Tensor) and v.dtype in _EXACT for v in values)


def _aliases(graph: Graph) -> set[Node]:
    """Views that the graph returns of one of its inputs, or of the same tensor as another result:
    their memory has to be shared, which torch does."""
    output = next(n for n in graph.nodes if n.op == "output")
    chains = []
    for result in output.all_input_nodes:
        chain = [result]
        while _is_view(chain[-1]):
            chain.append(chain[-1].all_input_nodes[0])
        chains.append(chain)
    bases = [chain[-1] for chain in chains]
    found: set[Node] = set()
    for *views, base in chains:
        if base.op == "placeholder" or bases.count(base) > 1:
            found.update(views)
    return found


def _is_view(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


class _Allowed(OperatorSupportBase):
    def __init__(self, nodes: Collection[Node]) -> None:
        self.nodes = nodes

    def is_node_supported(self, submodules: Mapping[str, Any], node: Node) -> bool:
        """Whether a region may hold the node."""
        return node in self.nodes


def _partitions(graph: GraphModule, allowed: Collection[Node]) -> list[tuple[Node, ...]]:
    """The largest regions of allowed nodes that no path leaves and enters again, in order."""
    partitioner = CapabilityBasedPartitioner(
        graph, _Allowed(allowed), allows_single_node_partition=True
    )
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    found = [
        tuple(sorted(partition.nodes, key=order.__getitem__))
        for partition in partitioner.propose_partitions()
    ]
    return sorted(found, key=lambda nodes: order[nodes[0]])


def _lowered(
    nodes: Sequence[Node], held: Mapping[Node, torch.Tensor], threads: int
) -> tuple[Program, Region]:
    """The program of a region, and the region that runs it."""
    inside = set(nodes)
    outside = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
    inputs = [n for n in outside if n not in held and not is_size(n)]
    no_tensor = [n for n in inputs if not isinstance(n.meta.get("val"), torch.Tensor)]
    if no_tensor:
        users = [n for n in nodes if set(no_tensor) & set(n.all_input_nodes)]
        raise Unlowered({n: refusal(n, "an input of it is no tensor") for n in users})
    outputs = [n for n in nodes if not set(n.users) <= inside]
    given = region_inputs(inputs)
    own = {n: held[n] for n in outside if n in held}
    piece = Piece(nodes, own, inputs, outputs, given.names, packed=False)
    program = Lowerer(piece, given.symbols, given.spec).run()
    optimise(program)
    return program, Region(program, inputs, outputs, given, threads)


def _is_worth(program: Program) -> bool:
    """Whether a region saves more than a call of it costs."""
    return len(program.steps) > _FEW or any(step.kind not in _CHEAP for step in program.steps)


def _assembled(graph: GraphModule, regions: Mapping[tuple[Node, ...], Region]) -> GraphModule:
    """The graph with a call of each region in place of its nodes."""
    new = Graph()
    of: dict[Node, Node] = {}
    result = new.graph_copy(graph.graph, of)
    end = new.output(result)
    module = GraphModule(graph, new)
    for i, (nodes, region) in enumerate(regions.items()):
        module.add_submodule(f"plan_{i}", region)
        replaced: dict[Node, Node] = {}
        with new.inserting_before(end):
            call = new.call_module(f"plan_{i}", tuple(of[n] for n in region.inputs))
            for number, output in enumerate(region.outputs):
                value = call
                if len(region.outputs) > 1:
                    value = new.call_function(operator.getitem, (call, number))
                of[output].replace_all_uses_with(value)
                replaced[output] = value
        for node in reversed(nodes):
            new.erase_node(of[node])
        of |= replaced
    try:
        legalize_graph(module)
    except RuntimeError as error:
        raise BackendError(
            f"native: the parts of this graph depend on each other: {error}"
        ) from error
    module.graph.eliminate_dead_code()
    module.recompile()
    return module

"""``torch.compile(model, backend="fastrec")``: the graphs that dynamo captures, as native plans.

Dynamo traces a model until something that no graph can hold (``if mask.any()``, ``.item()``), runs
that in Python, and traces on; its guards make sure that a graph only runs where it holds. Each
graph is exported as a whole model would be, and cut where it holds ops without a lowering
(:mod:`fastrec.runtime.native.cut`).

Plans hold copies of the weights that they were made with. A graph serves every module that dynamo
calls it with (all layers of a stack, say), with plans for each module's weights; plans whose
weights have changed since are made anew.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import nn
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Interpreter, Node

from fastrec.errors import BackendError, FallbackWarning, FastrecError
from fastrec.exporters.trace import guards_of, quiet, typed
from fastrec.kernels._compiled import reason_missing
from fastrec.runtime.native.cut import Cut, cut
from fastrec.runtime.native.lower import decomposed_in_parts
from fastrec.runtime.native.piece import is_free
from fastrec.runtime.native.refusals import broken

# Plans made, by graph, while an engine is built: see `collecting`.
_made: ContextVar[list[tuple[DynamoGraph, Plans]] | None] = ContextVar("made", default=None)
_serving: ContextVar[bool] = ContextVar("serving", default=False)
_learning: ContextVar[bool] = ContextVar("learning", default=False)
_told: set[str] = set()
# Sizes that a graph remembers its guards' verdict of.
_MOST_SIZES = 1024


def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend ``fastrec`` of torch.compile, for inference on the CPU.

    Args:
        module: a graph of dynamo's.
        inputs: examples of what it is called with.

    Returns:
        what runs the graph: native plans, and torch in between. Where a gradient is needed, or
        nothing can be a plan, torch runs the graph, and a FallbackWarning says so once.
    """
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        _tell("gradients are needed: run it under torch.no_grad()")
        return module.forward
    if any(t.device.type != "cpu" for t in tensors):
        _tell("tensors are not on the CPU")
        return module.forward
    if (reason := reason_missing()) is not None:
        _tell(reason)
        return module.forward
    return DynamoGraph(module)


def _tell(reason: str) -> None:
    """Warn once for each reason; an engine that is being built tells its reasons itself."""
    if reason not in _told and _made.get() is None:
        _told.add(reason)
        text = f'torch.compile(backend="fastrec") leaves work to torch: {reason}'
        warnings.warn(text, FallbackWarning, stacklevel=2)


@contextlib.contextmanager
def collecting() -> Iterator[list[tuple[DynamoGraph, Plans]]]:
    """Collect the plans that calls within make or meet."""
    found: list[tuple[DynamoGraph, Plans]] = []
    token = _made.set(found)
    try:
        yield found
    finally:
        _made.reset(token)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Make no plan within: a graph that lacks one runs in torch."""
    token = _serving.set(True)
    try:
        yield
    finally:
        _serving.reset(token)


@contextlib.contextmanager
def learning() -> Iterator[None]:
    """Make no plan within, and tell dynamo which sizes of the graphs' results are free: the graphs
    behind them are then captured once, not once for each size."""
    token = _learning.set(True)
    try:
        with serving():
            yield
    finally:
        _learning.reset(token)


class Plans:
    """A graph's plans for one set of weights.

    Args:
        cut: the graph, cut; None where it could not be.
        order: what its placeholders are given: positions of the call's arguments, or constants.
        state: of the weights when it was made.
    """

    def __init__(
        self, cut: Cut | None, order: Sequence[int | torch.Tensor], state: list[tuple[int, int]]
    ) -> None:
        self.cut, self.order, self.state = cut, order, state

    def __call__(self, *args: Any) -> Any:
        assert self.cut is not None
        return self.cut.module.forward(*[args[i] if isinstance(i, int) else i for i in self.order])


class DynamoGraph:
    """A graph of dynamo's, called with its weights and inputs.

    Args:
        module: the graph.

    Attributes:
        reason: why no plan can be made of it ("" where that is not known to be so).
        ended: why dynamo ended the graph here, with file and line ("" at the end of a function).
    """

    def __init__(self, module: GraphModule) -> None:
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.module = module
        self.reason = ""
        self.ended = _ended(module)
        self._weights = [i for i, n in enumerate(placeholders) if _is_weight(n)]
        self._sizes = _sizes_of_tensors(placeholders)
        known = {*self._weights, *self._sizes}
        self._inputs = [i for i in range(len(placeholders)) if i not in known]
        self._free = tuple(_free_sizes(placeholders[i].meta["example_value"]) for i in self._inputs)
        results: Any = next(n for n in module.graph.nodes if n.op == "output").args[0]
        traced = [n.meta.get("example_value") if isinstance(n, Node) else n for n in results]
        self._free_results = [_free_sizes(v) if isinstance(v, torch.Tensor) else () for v in traced]
        self._plans: dict[tuple[int, ...], Plans] = {}
        self._exported: torch.export.ExportedProgram | None = None
        self._holds: dict[tuple[Any, ...], bool] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """The graph's results, of plans or of torch: where a plan refuses a value (a NaN, say, or
        an id beyond its table), torch decides."""
        plans = self._plans_for(args)
        if plans is not None and plans.cut is not None and plans.cut.regions and self._fits(args):
            try:
                return plans(*args)
            except FastrecError:
                pass
        results = self.module.forward(*args)
        if _learning.get():
            for result, free in zip(results, self._free_results, strict=True):
                for dim in free:
                    torch._dynamo.maybe_mark_dynamic(result, dim)
        return results

    def drop(self, plans: Plans) -> None:
        """Forget plans; a call with their weights runs in torch or makes them anew. (Plans of a
        graph without weights hold nothing, and may serve other engines.)"""
        with self._lock:
            for key in [k for k, p in self._plans.items() if k and p is plans]:
                del self._plans[key]

    def _plans_for(self, args: Sequence[Any]) -> Plans | None:
        weights = [args[i] for i in self._weights]
        key = tuple(map(id, weights))
        plans = self._plans.get(key)
        made = _made.get()
        if plans is None or plans.state != _state(weights):
            if _serving.get():
                return None
            with self._lock:
                plans = self._plans.get(key)
                if plans is None or plans.state != _state(weights):
                    if plans is None:
                        for weight in weights:  # whose number another tensor may get
                            weakref.finalize(weight, self._plans.pop, key, None).atexit = False
                    plans = self._plans[key] = self._make(weights, args)
        if made is not None and (self, plans) not in made:
            made.append((self, plans))
        return plans

    def _make(self, weights: Sequence[torch.Tensor], args: Sequence[Any]) -> Plans:
        state = _state(weights)
        if self.reason:
            return Plans(None, (), state)
        try:
            if any(w.is_inference() for w in weights):
                raise BackendError("native: a weight that was made in inference mode")
            found, order = self._cut(weights, args)
        except BackendError as error:
            self.reason = str(error)
            _tell(self.reason)
            return Plans(None, (), state)
        for reason in found.reasons:
            _tell(reason)
        return Plans(found, order, state)

    def _cut(
        self, weights: Sequence[torch.Tensor], args: Sequence[Any]
    ) -> tuple[Cut, list[int | torch.Tensor]]:
        """The graph cut for these weights, and what its placeholders are given."""
        if self._exported is None:
            with torch.inference_mode(False), torch.no_grad():
                self._exported = self._export(weights, args)
        exported = self._exported
        signature = exported.graph_signature
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        own = {f"weight_{i}": i for i in self._weights}
        constants = {**exported.state_dict, **exported.constants}
        order: list[int | torch.Tensor] = []
        held: dict[Node, torch.Tensor] = {}
        rest = iter(self._inputs)
        for node in exported.graph.nodes:
            if node.op != "placeholder":
                continue
            name = names.get(node.name)
            if name is None:
                order.append(next(rest))
                continue
            order.append(own[name] if name in own else constants[name])
            held[node] = args[own[name]] if name in own else constants[name]
        with torch.inference_mode(False), torch.no_grad():
            return cut(exported.graph_module, held, torch.get_num_threads()), order

    def _export(
        self, weights: Sequence[torch.Tensor], args: Sequence[Any]
    ) -> torch.export.ExportedProgram:
        own = dict(zip(self._weights, weights, strict=True))
        bound = _Bound(self.module, own, self._inputs, self._sizes)
        given = [args[i] for i in self._inputs]
        given = [_normal(t) if isinstance(t, torch.Tensor) else t for t in given]
        with typed("torch.export can't trace a graph of this model"), quiet():
            exported = torch.export.export(
                bound, tuple(given), dynamic_shapes=(self._free,) if given else None, strict=False
            )
        exported = decomposed_in_parts(exported)
        kinds = {spec.kind for spec in exported.graph_signature.output_specs}
        if kinds - {OutputKind.USER_OUTPUT}:
            raise BackendError("native: a graph that writes into a tensor that it is given")
        return exported

    def _fits(self, args: Sequence[Any]) -> bool:
        """Whether the export holds for sizes and numbers like these."""
        given = [args[i] for i in self._inputs]
        key = tuple([a.shape if isinstance(a, torch.Tensor) else a for a in given])
        known = self._holds.get(key)
        if known is None:
            assert self._exported is not None
            known = _holds(self._exported, given)
            if len(self._holds) < _MOST_SIZES:
                self._holds[key] = known
        return known


class _Bound(nn.Module):
    """A graph with its weights, which takes its inputs alone: not sizes that its tensors have."""

    def __init__(
        self,
        graph: GraphModule,
        weights: dict[int, torch.Tensor],
        inputs: Sequence[int],
        sizes: Mapping[int, tuple[int, int]],
    ) -> None:
        super().__init__()
        self.graph, self.positions, self.inputs, self.sizes = graph, list(weights), inputs, sizes
        for i, weight in weights.items():
            self.register_buffer(f"weight_{i}", weight.detach())

    def forward(self, *inputs: Any) -> Any:
        """The graph's results; its ops keep the modules and lines that they come from."""
        given: dict[int, Any] = {i: getattr(self, f"weight_{i}") for i in self.positions}
        given.update(zip(self.inputs, inputs, strict=True))
        for i, (tensor, dim) in self.sizes.items():
            given[i] = given[tensor].shape[dim]
        with torch.fx.traceback.preserve_node_meta():
            return Interpreter(self.graph).run(*[given[i] for i in range(len(given))])


def _is_weight(node: Node) -> bool:
    """Whether a placeholder is a module's parameter or buffer."""
    facts = node.meta.get("tensor_dict") or {}
    return facts.get("_dynamo_static_input_type") is not None


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that was not made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _sizes_of_tensors(placeholders: Sequence[Node]) -> dict[int, tuple[int, int]]:
    """Numbers that are given though they are sizes of tensors: position -> tensor and dimension."""
    values = [n.meta["example_value"] for n in placeholders]
    found = {
        size.node.expr: (i, d)
        for i, value in enumerate(values)
        if isinstance(value, torch.Tensor)
        for d, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt)
    }
    return {
        i: found[value.node.expr]
        for i, value in enumerate(values)
        if isinstance(value, torch.SymInt) and value.node.expr in found
    }


def _state(weights: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Numbers that change when weights are written to, or replaced."""
    return [(-1 if w.is_inference() else w._version, w.data_ptr()) for w in weights]


def _free_sizes(value: Any) -> Any:
    """torch.export's description of the sizes that dynamo left free."""
    if isinstance(value, torch.Tensor):
        auto = torch.export.Dim.AUTO
        return {d: auto for d, size in enumerate(value.shape) if is_free(size)}
    return torch.export.Dim.AUTO if isinstance(value, torch.SymInt) else None


def _ended(module: GraphModule) -> str:
    """Why dynamo ended a graph, and where."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = "" if frame is None else f" ({Path(frame.filename).name}:{frame.lineno})"
    return f"torch: {broken(reason.reason.splitlines()[0], where)}"


def _holds(exported: torch.export.ExportedProgram, given: Sequence[Any]) -> bool:
    """Whether inputs have the sizes that an export is for, or that its guards allow."""
    held = set(exported.graph_signature.user_inputs)
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in held]
    sizes: list[tuple[Any, int]] = []
    for node, value in zip(placeholders, given, strict=True):
        traced = node.meta["val"]
        if isinstance(traced, torch.Tensor):
            sizes += zip(traced.shape, value.shape, strict=True)
        else:
            sizes.append((traced, value))
    values = {
        size.node.expr: number
        for size, number in sizes
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    }
    conditions = []
    for size, number in sizes:
        if isinstance(size, torch.SymInt):
            conditions.append(sympy.Eq(size.node.expr, number))
            conditions += guards_of(size)
        elif size is not None and size != number:
            return False
    for symbol, limits in exported.range_constraints.items():
        if symbol in values and not limits.lower <= values[symbol] <= limits.upper:
            return False
    return all(c.subs(values) == sympy.true for c in dict.fromkeys(conditions))

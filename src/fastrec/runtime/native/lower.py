"""torch.export's graph -> a plan, one step an op; passes fuse them afterwards."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrec.errors import BackendError
from fastrec.exporters.trace import evaluated, traced
from fastrec.runtime.native.ir import (
    DTYPES,
    ONE,
    Buffer,
    Extent,
    Instruction,
    Plan,
    Shape,
    Step,
    View,
)
from fastrec.spec import InputSpec

Lowering = Callable[["Lowerer", torch.fx.Node, list[Any], dict[str, Any]], Any]
LOWERINGS: dict[Any, Lowering] = {}


def lowers(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Registers the lowering of one or more ops."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return register


def lower(model: nn.Module, example_inputs: Sequence[torch.Tensor], spec: InputSpec) -> Plan:
    """The model's forward as a plan.

    Sizes that the spec leaves free are symbols where the model's export allows it; what it fixes
    (say, a history length that the code specialises on) is fixed to the examples' size.

    Raises:
        BackendError: the model can't be exported, or holds an op that has no lowering; the message
            names the op and the module it comes from.
    """
    import fastrec.runtime.native.lowerings  # noqa: F401  (fills LOWERINGS)

    program, symbols = traced(evaluated(model), example_inputs, spec)
    return Lowerer(program, symbols, spec).run()


def plan_spec(spec: InputSpec, plan: Plan, example_inputs: Sequence[torch.Tensor]) -> InputSpec:
    """The spec of what the plan accepts: sizes that the export could not leave free are fixed."""
    return spec.fixed_to([tuple(t.shape) for t in example_inputs], keep=plan.symbols)


# Ops whose result is memory of its own.
_FRESH = ("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "clone")


def _is_in_place(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _nearest(op: str) -> str:
    """What a person could use instead of an op that is lacking."""
    known = [str(target) for target in LOWERINGS]
    close = difflib.get_close_matches(op, known, n=3, cutoff=0.6)
    return f"the nearest supported: {', '.join(close) or 'see docs/runtime.md'}"


class Lowerer:
    """Walks the graph once; ``env`` holds what each node became: a View, a list of them, or a
    Python value."""

    def __init__(
        self, program: torch.export.ExportedProgram, symbols: tuple[str, ...], spec: InputSpec
    ) -> None:
        self.program, self.symbols, self.spec = program, symbols, spec
        self.steps: list[Step] = []
        self.inputs: list[Buffer] = []
        self.env: dict[torch.fx.Node, Any] = {}
        self.names: dict[Any, str] = {}  # torch.export's symbol -> ours

    def run(self) -> Plan:
        """The plan of the whole graph."""
        signature = self.program.graph_signature
        state = {**self.program.state_dict, **self.program.constants}
        held = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        output: View | None = None
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in held:
                    self.env[node] = constant(state[held[node.name]])
                else:
                    self.env[node] = self._input(node)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                (result,) = node.args[0]
                output = self.contiguous(self.env[result])
        assert output is not None
        if output.buffer.space != "arena":
            output = self.copied(output)
        return Plan(self.symbols, self.inputs, self.steps, output)

    def _input(self, node: torch.fx.Node) -> View:
        f = self.spec.fields[len(self.inputs)]
        value = node.meta["val"]
        for size, name in zip(value.shape, f.dims, strict=True):
            if isinstance(size, torch.SymInt):
                self.names[size.node.expr] = str(name)
        buffer = Buffer(dtype_of(node), self.shape(value.shape), "input", len(self.inputs))
        self.inputs.append(buffer)
        return buffer.view()

    def _call(self, node: torch.fx.Node) -> Any:
        args = [self._value(a) for a in node.args]
        kwargs = {name: self._value(a) for name, a in node.kwargs.items()}
        if node.target is operator.getitem:
            return args[0][args[1]]
        if isinstance(size := node.meta.get("val"), torch.SymInt):
            return size  # of tensors; becomes an Extent where one is asked for
        changes = _is_in_place(node)
        if changes:
            self._require_fresh(node)
        result = self._folded(node, args, kwargs)
        if result is None:
            lowering = LOWERINGS.get(node.target)
            if lowering is None:
                raise self.unsupported(node, f"it has no lowering; {_nearest(str(node.target))}")
            result = lowering(self, node, args, kwargs)
        if changes:
            self.env[node.args[0]] = result
        return result

    def _require_fresh(self, node: torch.fx.Node) -> None:
        """An in-place op is one that returns where nobody else has seen what it changes."""
        changed = node.args[0]
        others = [u for u in changed.users if u is not node and u in self.env]
        made = str(changed.target).split(".")[1:2]
        if changed.op != "call_function" or others or made[0] not in _FRESH:
            raise self.unsupported(node, "in place on a tensor in use; the form without _ is fine")

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return self.env[argument]
        if isinstance(argument, list | tuple):
            return [self._value(a) for a in argument]
        return argument

    def _folded(self, node: torch.fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result where all operands are constants and no size is free."""
        result = node.meta.get("val")
        if not isinstance(result, torch.Tensor) or not is_static(result.shape):
            return None
        flat = [*args, *kwargs.values()]
        flat += [inner for a in flat if isinstance(a, list) for inner in a]
        views = [a for a in flat if isinstance(a, View)]
        if any(v.constant is None for v in views) or any(isinstance(a, torch.SymInt) for a in flat):
            return None

        copies = _is_in_place(node) or None

        def tensors(value: Any) -> Any:
            if isinstance(value, View):
                return torch.from_numpy(np.array(value.constant, order="C", copy=copies))
            return [tensors(v) for v in value] if isinstance(value, list) else value

        target: Any = node.target
        return constant(target(*map(tensors, args), **{k: tensors(v) for k, v in kwargs.items()}))

    # What lowerings use.

    def extent(self, size: Any) -> Extent:
        """A size of the graph: an int or a SymInt."""
        if isinstance(size, int):
            return Extent(size)
        expression = size.node.expr
        coefficient, rest = expression.as_coeff_Mul()
        symbols: list[str] = []
        for base, power in rest.as_powers_dict().items():
            if base == 1:
                continue
            if base not in self.names or not power.is_Integer or power < 1:
                raise BackendError(
                    f"native: a size of {expression} is not a product of input sizes"
                )
            symbols += [self.names[base]] * int(power)
        return Extent(int(coefficient), tuple(sorted(symbols)))

    def shape(self, sizes: Sequence[Any]) -> Shape:
        """A shape of the graph."""
        return tuple(self.extent(s) for s in sizes)

    def shape_of(self, node: torch.fx.Node) -> Shape:
        """The shape of a node's result."""
        return self.shape(node.meta["val"].shape)

    def emit(
        self,
        node: torch.fx.Node | None,
        kind: str,
        inputs: list[View],
        shape: Shape,
        dtype: str = "float32",
        *,
        integers: Sequence[int] = (),
        numbers: Sequence[float] = (),
        program: Sequence[Instruction] = (),
    ) -> View:
        """Append a step; its result, a new contiguous buffer."""
        output = Buffer(dtype, shape).view()
        module = "" if node is None else module_of(node)
        self.steps.append(
            Step(kind, inputs, output, list(integers), list(numbers), list(program), module)
        )
        return output

    def map(
        self,
        node: torch.fx.Node | None,
        inputs: list[View],
        program: Sequence[Instruction],
        shape: Shape,
        dtype: str = "float32",
    ) -> View:
        """An elementwise step over ``inputs``, which are broadcast to ``shape``."""
        views = [v.expanded(shape) for v in inputs]
        return self.emit(node, "map", views, shape, dtype, program=program)

    def copied(self, view: View) -> View:
        """The elements in a new contiguous buffer."""
        if view.dtype not in ("float32", "int64", "bool"):
            raise BackendError(f"native: a copy of {view.dtype} elements has no kernel")
        return self.map(None, [view], [], view.shape, view.dtype)

    def contiguous(self, view: View) -> View:
        """The view, copied if its elements do not follow each other."""
        return view if view.is_contiguous else self.copied(view)

    def rows_contiguous(self, x: View) -> View:
        """[.., D] whose last dimension has a stride of 1, copied if need be."""
        return x if x.strides[-1] == ONE or x.shape[-1] == ONE else self.copied(x)

    def at_most(self, node: torch.fx.Node, size: Extent) -> int:
        """The largest value of a size; BackendError where a symbol of it has no upper limit."""
        sizes: dict[str, int] = {}
        for symbol in size.symbols:
            high = self.spec.limits.get(symbol, (1, None))[1]
            if high is None:
                raise self.unsupported(node, f"a size {symbol} without an upper limit")
            sizes[symbol] = high
        return size.at(sizes)

    def reshaped(self, view: View, shape: Shape) -> View:
        """The view under another shape, copied if need be."""
        result = view.reshaped(shape) or self.copied(view).reshaped(shape)
        assert result is not None
        return result

    def unsupported(self, node: torch.fx.Node, why: str) -> BackendError:
        """An error that names the op and where it comes from."""
        where = module_of(node) or "the model's forward"
        return BackendError(f"native: {node.target} in {where}: {why}")


def constant(tensor: torch.Tensor) -> View:
    """A tensor of the model, in the plan's dtypes."""
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensor = tensor.float()
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise BackendError(f"native: constants of {tensor.dtype} are not supported")
    data = np.ascontiguousarray(tensor.detach().cpu().numpy())
    shape = tuple(Extent(s) for s in tensor.shape)
    return Buffer(str(data.dtype), shape, "constant", data=data).view()


def dtype_of(node: torch.fx.Node) -> str:
    """The dtype of a node's result; BackendError where the plan has none such."""
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BackendError(f"native: {node.name} is {dtype}; expected one of {', '.join(DTYPES)}")
    return dtype


def is_static(sizes: Sequence[Any]) -> bool:
    """Whether no size is a symbol."""
    return all(isinstance(s, int) for s in sizes)


def module_of(node: torch.fx.Node) -> str:
    """Dotted name of the innermost module that a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""

"""torch.export's graph -> a program: walks the graph and calls each op's lowering."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastrec.errors import BackendError
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import DTYPES, ONE, Buffer, Extent, Shape, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.registry import LOWERINGS
from fastrec.runtime.native.steps import Instruction, Step
from fastrec.spec import InputSpec

# Ops whose result is memory of its own.
_FRESH = ("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "clone")


def _is_in_place(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _nearest(op: str) -> str:
    """Supported ops with names similar to an unsupported one's."""
    known = [str(target) for target in LOWERINGS]
    close = difflib.get_close_matches(op, known, n=3, cutoff=0.6)
    return f"the nearest supported: {', '.join(close) or 'see docs/runtime.md'}"


class Lowerer:
    """Walks the graph once.

    Attributes:
        steps: the program's steps so far.
        inputs: the model's inputs.
        env: node -> its lowered value: a View, a list of them, or a Python value.
    """

    def __init__(
        self, exported: torch.export.ExportedProgram, symbols: tuple[str, ...], spec: InputSpec
    ) -> None:
        self.exported, self.symbols, self.spec = exported, symbols, spec
        self.steps: list[Step] = []
        self.inputs: list[Buffer] = []
        self.env: dict[torch.fx.Node, Any] = {}
        self.names: dict[Any, str] = {}  # torch.export's symbol -> ours

    def run(self) -> Program:
        """The program of the whole graph."""
        signature = self.exported.graph_signature
        state = {**self.exported.state_dict, **self.exported.constants}
        held = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        output: View | None = None
        for node in self.exported.graph.nodes:
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
        return Program(self.symbols, self.inputs, self.steps, output)

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
        """Refuse an in-place op on a tensor that another node has read already."""
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
        """The result as a constant where all operands are constants and no size is free."""
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

    # Lowerings use the following.

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
        constructor: Callable[..., Step],
        shape: Shape,
        dtype: str = "float32",
        **named: Any,
    ) -> View:
        """Append a step that writes a new contiguous buffer.

        Args:
            node: the op, whose module the step is shown under.
            constructor: of the kind, e.g. ``steps.linear``.
            shape, dtype: of the result.
            named: the step's operands but ``y``, and its fields.

        Returns:
            the result.
        """
        y = Buffer(dtype, shape).view()
        module = "" if node is None else module_of(node)
        self.steps.append(constructor(y=y, module=module, **named))
        return y

    def map(
        self,
        node: torch.fx.Node | None,
        inputs: Sequence[View],
        program: Sequence[Instruction],
        shape: Shape,
        dtype: str = "float32",
    ) -> View:
        """An elementwise step over ``inputs``, which are broadcast to ``shape``."""
        views = [v.expanded(shape) for v in inputs]
        return self.emit(node, steps.map, shape, dtype, x=views, program=program)

    def copy_into(self, view: View, y: View) -> None:
        """Append a step that copies a view's elements."""
        if view.dtype not in ("float32", "int64", "bool"):
            raise BackendError(f"native: a copy of {view.dtype} elements has no kernel")
        self.steps.append(steps.map(x=[view], y=y, program=[]))

    def copied(self, view: View) -> View:
        """The elements in a new contiguous buffer."""
        y = Buffer(view.dtype, view.shape).view()
        self.copy_into(view, y)
        return y

    def writers(self) -> dict[Buffer, Step]:
        """The step that wrote a buffer last."""
        return {step.y.buffer: step for step in self.steps}

    def contiguous(self, view: View) -> View:
        """The view, copied if its elements do not follow each other."""
        return view if view.is_contiguous else self.copied(view)

    def rows_contiguous(self, x: View) -> View:
        """[.., D] whose last dimension has a stride of 1, copied if need be."""
        return x if x.strides[-1] == ONE or x.shape[-1] == ONE else self.copied(x)

    def at_most(self, node: torch.fx.Node, size: Extent) -> int:
        """The largest value of a size.

        Raises:
            BackendError: a symbol of it has no upper limit.
        """
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
    """A tensor of the model as a constant; halves and doubles become float32."""
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensor = tensor.float()
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise BackendError(f"native: constants of {tensor.dtype} are not supported")
    data = np.ascontiguousarray(tensor.detach().cpu().numpy())
    shape = tuple(Extent(s) for s in tensor.shape)
    return Buffer(str(data.dtype), shape, "constant", data=data).view()


def dtype_of(node: torch.fx.Node) -> str:
    """The dtype of a node's result; BackendError where programs have no such dtype."""
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

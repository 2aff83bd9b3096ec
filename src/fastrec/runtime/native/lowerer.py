"""torch.export's graph -> a program: walks the graph and calls each op's lowering."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sympy
import torch
from torch.export.graph_signature import OutputKind

from fastrec.errors import BackendError
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import DTYPES, ONE, Buffer, Extent, Shape, View
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.registry import LOWERINGS, OVERFLOWING
from fastrec.runtime.native.steps import Instruction, Step
from fastrec.spec import InputSpec

# Computed in the program's dtypes: halves and doubles as float32, narrower integers as int64.
_COMPUTED = {
    "float64": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "int32": "int64",
    "int16": "int64",
}
_BITS = {torch.int32: 32, torch.int16: 16}
# What to write instead of ops that no plan can hold.
_INSTEAD = {
    "nonzero": "a mask: torch.where(condition, x, 0)",
    "masked_select": "a mask: torch.where(condition, x, 0)",
    "masked_scatter": "a mask: torch.where(condition, values, x)",
    "unique": "the ids as they are: a size that depends on values is no plan",
    "unique2": "the ids as they are: a size that depends on values is no plan",
    "bincount": "one_hot(x, n).sum(0)",
    "item": "the tensor itself: a number read from a tensor is no plan",
    "_local_scalar_dense": "the tensor itself: a number read from a tensor is no plan",
    "pack_padded_sequence": "the padded sequence and a mask over the result",
    "_pack_padded_sequence": "the padded sequence and a mask over the result",
}


# The largest number in a size that is looked through.
_MOST = 64


class FreeSize(BackendError):
    """A size that the program cannot leave free, and may hold if it is fixed."""


class _Missing:
    """The value of an op that was refused."""


class Complex(NamedTuple):
    """A complex tensor as two float ones."""

    real: View
    imag: View


def is_lowered(node: torch.fx.Node) -> bool:
    """Whether a node of the graph has a lowering, or needs none."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    if _is_size(node):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.target in LOWERINGS and not (schema is not None and schema.is_mutable)


def _is_size(node: torch.fx.Node) -> bool:
    """Whether a node is a number made of sizes."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _written(node: torch.fx.Node) -> str:
    """The op as the model has it, which torch may have taken apart."""
    return str(node.meta.get("original_aten") or node.target)


def _instead(op: str) -> str:
    """The nearest form of an unsupported op."""
    name = op.split(".")[-2] if "." in op else op
    if name in _INSTEAD:
        return f"write {_INSTEAD[name]}"
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
        problems: list[str] = []
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in held:
                    self.env[node] = constant(state[held[node.name]])
                else:
                    self.env[node] = self._input(node)
            elif node.op == "call_function":
                try:
                    self.env[node] = self._call(node)
                except FreeSize:
                    raise
                except BackendError as error:
                    self.env[node] = _Missing()
                    problems.append(str(error))
            elif node.op == "output" and not problems:
                output = self._output(node)
        if problems:
            raise BackendError("; ".join(dict.fromkeys(problems)))
        assert output is not None
        return Program(self.symbols, self.inputs, self.steps, output)

    def _output(self, node: torch.fx.Node) -> View:
        """The model's result, float32 and contiguous, in memory of its own."""
        kinds = [spec.kind for spec in self.exported.graph_signature.output_specs]
        results: Any = node.args[0]
        (result,) = [
            r for r, kind in zip(results, kinds, strict=True) if kind is OutputKind.USER_OUTPUT
        ]
        output = self.env[result]
        if output.dtype != "float32":
            output = self.map(None, [output], [("to_f32", 0)], output.shape)
        output = self.contiguous(output)
        return output if output.buffer.space == "arena" else self.copied(output)

    def _input(self, node: torch.fx.Node) -> View:
        f = self.spec.fields[len(self.inputs)]
        value = node.meta["val"]
        for size, name in zip(value.shape, f.dims, strict=True):
            if isinstance(size, torch.SymInt):
                self.names[size.node.expr] = str(name)
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise BackendError(f"native: {f.name} is {dtype}; expected one of {', '.join(DTYPES)}")
        buffer = Buffer(dtype, self.shape(value.shape), "input", len(self.inputs))
        self.inputs.append(buffer)
        view = buffer.view()
        return self.map(node, [view], [], view.shape, "int64") if dtype == "int32" else view

    def _call(self, node: torch.fx.Node) -> Any:
        if _is_size(node):
            return node.meta["val"]  # of tensors; becomes an Extent where one is asked for
        lowering = LOWERINGS.get(node.target)
        if lowering is None and node.target is not operator.getitem:
            if not node.users:
                return None  # a check of sizes
            raise self.unsupported(node, f"it has no lowering; {_instead(_written(node))}")
        if any(isinstance(self.env[n], _Missing) for n in node.all_input_nodes):
            return _Missing()
        args = [self._value(a) for a in node.args]
        kwargs = {name: self._value(a) for name, a in node.kwargs.items()}
        if node.target is operator.getitem:
            return args[0][args[1]]
        result = self._folded(node, args, kwargs)
        if result is not None:
            return result
        assert lowering is not None
        result = lowering(self, node, args, kwargs)
        return self._wrapped(node, result) if node.target in OVERFLOWING else result

    def _wrapped(self, node: torch.fx.Node, result: Any) -> Any:
        """Integers of 32 and 16 bits, reduced to what those hold, as in torch."""
        dtype = node.meta["val"].dtype
        bits = _BITS.get(dtype)
        read = {n.meta["val"].dtype for n in node.all_input_nodes if not _is_size(n)}
        if bits is None or read <= {torch.bool, torch.uint8}:
            return result
        program = [("integer", 2 ** (bits - 1)), ("add_i64", 0, 1), ("integer", 2**bits)]
        program += [("rem_i64", 2, 3), ("sub_i64", 4, 1)]
        return self.map(node, [result], program, result.shape, "int64")

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
        if result.dtype.is_complex:
            return None
        flat = [*args, *kwargs.values()]
        flat += [inner for a in flat if isinstance(a, list) for inner in a]
        views = [a for a in flat if isinstance(a, View)]
        if any(v.constant is None for v in views):
            return None
        if any(isinstance(a, torch.SymInt | Complex) for a in flat):
            return None

        def tensors(value: Any) -> Any:
            if isinstance(value, View):
                return torch.from_numpy(np.array(value.constant, order="C", copy=None))
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
                return self._simplified(expression)
            symbols += [self.names[base]] * int(power)
        return Extent(int(coefficient), tuple(sorted(symbols)))

    def _simplified(self, expression: Any) -> Extent:
        """A size that is a number of times one symbol, though it is not written so, such as the
        quotient that ``chunk`` makes.

        Quotients by c repeat after c values of the symbol: equal there, they are equal.
        """
        refused = FreeSize(f"native: a size of {expression} is not a product of input sizes")
        symbols = list(expression.free_symbols)
        numbers = [abs(int(n)) for n in expression.atoms(sympy.Integer)]
        if len(symbols) != 1 or symbols[0] not in self.names or max(numbers, default=0) > _MOST:
            raise refused
        found = [expression.subs(symbols[0], value) for value in range(1, 2 * _MOST + 1)]
        if not all(getattr(size, "is_Integer", False) for size in found):
            raise refused
        if len(set(found)) == 1:
            return Extent(int(found[0]))
        if any(size != value * found[0] for value, size in enumerate(found, 1)):
            raise refused
        return Extent(int(found[0]), (self.names[symbols[0]],))

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
        return BackendError(self._refusal(node, why))

    def free_size(self, node: torch.fx.Node, why: str) -> FreeSize:
        """The same, where a size would have to be fixed."""
        return FreeSize(self._refusal(node, why))

    def _refusal(self, node: torch.fx.Node, why: str) -> str:
        where = module_of(node) or "the model's forward"
        return f"native: {_written(node)} in {where}{line_of(node)}: {why}"

    def cast(self, node: torch.fx.Node | None, view: View, dtype: str) -> View:
        """The view's elements as another of the program's dtypes."""
        if view.dtype == dtype:
            return view
        if dtype in ("int8", "uint8"):
            raise BackendError(f"native: a cast to {dtype}; the nearest supported is int16")
        if dtype == "float32":
            return self.map(node, [view], [("to_f32", 0)], view.shape)
        if view.dtype != "float32":
            program: list[Instruction] = []
            if dtype == "bool":
                program = [("integer", 0), ("eq_i64", 0, 1), ("not_i64", 2)]
            return self.map(node, [view], program, view.shape, dtype)
        if dtype == "int64":
            return self.map(node, [view], [("to_i64", 0)], view.shape, dtype)
        program = [("number", 0.0), ("eq_f32", 0, 1), ("not_i64", 2)]
        return self.map(node, [view], program, view.shape, "bool")


def constant(tensor: torch.Tensor) -> Any:
    """A tensor of the model as a constant; halves and doubles become float32."""
    if tensor.dtype.is_complex:
        return Complex(constant(tensor.real), constant(tensor.imag))
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensor = tensor.float()
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise BackendError(f"native: constants of {tensor.dtype} are not supported")
    data = np.ascontiguousarray(tensor.detach().cpu().numpy())
    shape = tuple(Extent(s) for s in tensor.shape)
    return Buffer(str(data.dtype), shape, "constant", data=data).view()


def dtype_of(node: torch.fx.Node) -> str:
    """The dtype that a node's result has in the program; BackendError where there is none."""
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    dtype = _COMPUTED.get(dtype, dtype)
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


def line_of(node: torch.fx.Node) -> str:
    """The line of the model's source that a node comes from: " (file.py:12)", or ""."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" ({Path(found[-1][0]).name}:{found[-1][1]})" if found else ""

"""torch.export's graph -> a program: walks the graph and calls each op's lowering."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sympy
import torch

from fastrec.errors import BackendError
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import DTYPES, ONE, Buffer, Extent, Shape, View, product
from fastrec.runtime.native.piece import Piece
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.refusals import (
    FreeSize,
    Unlowered,
    module_of,
    no_lowering,
    refusal,
)
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

# The largest number in a size that is looked through.
_MOST = 64


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
    if is_size(node):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.target in LOWERINGS and not (schema is not None and schema.is_mutable)


def _holds_size(value: Any) -> bool:
    """Whether a number in a step's fields is a size that torch left free."""
    if isinstance(value, list | tuple) and not isinstance(value, View):
        return any(map(_holds_size, value))
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def is_size(node: torch.fx.Node) -> bool:
    """Whether a node is a number made of sizes."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


class Lowerer:
    """Walks the graph once.

    Args:
        piece: of the graph.
        symbols: the sizes that are free.
        spec: of the piece's inputs.

    Attributes:
        steps: the program's steps so far.
        inputs: the model's inputs.
        env: node -> its lowered value: a View, a list of them, or a Python value.
    """

    def __init__(self, piece: Piece, symbols: tuple[str, ...], spec: InputSpec) -> None:
        self.piece, self.symbols, self.spec = piece, symbols, spec
        self.steps: list[Step] = []
        self.inputs: list[Buffer] = []
        self.env: dict[torch.fx.Node, Any] = {}

    def run(self) -> Program:
        """The program of the whole piece.

        Raises:
            Unlowered: it holds ops without a lowering.
            FreeSize: a size has to be fixed.
            BackendError: an input that no program takes.
        """
        self.env.update({node: constant(value) for node, value in self.piece.held.items()})
        for node in self.piece.inputs:
            self.env[node] = self._input(node)
        problems: dict[torch.fx.Node, str] = {}
        for node in self.piece.nodes:
            try:
                self.env[node] = self._call(node)
            except FreeSize as error:
                if self.piece.packed:
                    raise
                problems[node] = str(error)
            except BackendError as error:
                problems[node] = str(error)
            if node in problems:
                self.env[node] = _Missing()
        if problems:
            raise Unlowered(problems)
        outputs: list[View] = []
        for node in self.piece.outputs:
            outputs.append(self._output(node, {view.buffer for view in outputs}))
        return Program(self.symbols, self.inputs, self.steps, outputs)

    def _output(self, node: torch.fx.Node, taken: set[Buffer]) -> View:
        """A result, contiguous and in memory of its own."""
        output = self.env[node]
        if not isinstance(output, View):
            raise Unlowered({node: refusal(node, "its result is no tensor of a plan")})
        if output.dtype != "float32" and self.piece.packed:
            output = self.cast(None, output, "float32")
        buffer = output.buffer
        whole = output.is_contiguous and product(output.shape) == product(buffer.shape)
        own = buffer.space == "arena" and buffer not in taken
        return output if whole and own else self.copied(output)

    def _input(self, node: torch.fx.Node) -> View:
        f = self.spec.fields[len(self.inputs)]
        value = node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise BackendError(f"native: {f.name} is {dtype}; expected one of {', '.join(DTYPES)}")
        shape = self.shape(value.shape)
        # A model's size may have been fixed; a region's may be taken apart.
        dims = shape if self.piece.packed else tuple(map(Extent.of, f.dims))
        buffer = Buffer(dtype, dims, "input", len(self.inputs))
        self.inputs.append(buffer)
        view = self.reshaped(buffer.view(), shape)
        return self.map(node, [view], [], view.shape, "int64") if dtype == "int32" else view

    def _call(self, node: torch.fx.Node) -> Any:
        if is_size(node):
            return node.meta["val"]  # of tensors; becomes an Extent where one is asked for
        lowering = LOWERINGS.get(node.target)
        if lowering is None and node.target is not operator.getitem:
            if not node.users:
                return None  # a check of sizes
            raise BackendError(no_lowering(node))
        if any(isinstance(self.env.get(n), _Missing) for n in node.all_input_nodes):
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
        read = {n.meta["val"].dtype for n in node.all_input_nodes if not is_size(n)}
        if bits is None or read <= {torch.bool, torch.uint8}:
            return result
        program = [("integer", 2 ** (bits - 1)), ("add_i64", 0, 1), ("integer", 2**bits)]
        program += [("rem_i64", 2, 3), ("sub_i64", 4, 1)]
        return self.map(node, [result], program, result.shape, "int64")

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            # A number made of sizes may stand outside the piece.
            return self.env[argument] if argument in self.env else argument.meta["val"]
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
        expression, names = size.node.expr, self.piece.names
        coefficient, rest = expression.as_content_primitive()
        if rest in names:
            return Extent(int(coefficient), (names[rest],))
        coefficient, rest = expression.as_coeff_Mul()
        symbols: list[str] = []
        for base, power in rest.as_powers_dict().items():
            if base == 1:
                continue
            if base not in names or not power.is_Integer or power < 1:
                return self._simplified(expression)
            symbols += [names[base]] * int(power)
        return Extent(int(coefficient), tuple(sorted(symbols)))

    def _simplified(self, expression: Any) -> Extent:
        """A size that is a number of times one symbol, though it is not written so, such as the
        quotient that ``chunk`` makes.

        Quotients by c repeat after c values of the symbol: equal there, they are equal.
        """
        refused = FreeSize(f"native: a size of {expression} is not a product of input sizes")
        symbols = list(expression.free_symbols)
        numbers = [abs(int(n)) for n in expression.atoms(sympy.Integer)]
        if (
            len(symbols) != 1
            or symbols[0] not in self.piece.names
            or max(numbers, default=0) > _MOST
        ):
            raise refused
        found = [expression.subs(symbols[0], value) for value in range(1, 2 * _MOST + 1)]
        if not all(getattr(size, "is_Integer", False) for size in found):
            raise refused
        if len(set(found)) == 1:
            return Extent(int(found[0]))
        if any(size != value * found[0] for value, size in enumerate(found, 1)):
            raise refused
        return Extent(int(found[0]), (self.piece.names[symbols[0]],))

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
        if _holds_size(list(named.values())):
            why = "a number that depends on a free size"
            raise BackendError(f"native: {why}") if node is None else self.unsupported(node, why)
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
        if result is None:
            old, new = (f"[{', '.join(map(str, sizes))}]" for sizes in (view.shape, shape))
            raise FreeSize(f"native: a view of {old} as {new}")
        return result

    def unsupported(self, node: torch.fx.Node, why: str) -> BackendError:
        """An error that names the op and where it comes from."""
        return BackendError(refusal(node, why))

    def free_size(self, node: torch.fx.Node, why: str) -> FreeSize:
        """The same, where a size would have to be fixed."""
        return FreeSize(refusal(node, why))

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

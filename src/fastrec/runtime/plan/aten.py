"""Lowerings of ATen's and fastrec's ops; importing this fills ``LOWERINGS``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fastrec.kernels.sparse_int8_linear.packed import PackedWeight
from fastrec.runtime.plan.ir import ONE, Buffer, Extent, Instruction, View
from fastrec.runtime.plan.lower import Lowerer, constant, dtype_of, lowers

aten = torch.ops.aten
# csrc/cpu/sparse_int8_linear/sparse_int8_linear.h: Activation.
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2}


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# Views: no step, unless the elements have to move.


@lowers(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
def _reshape(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return to.reshaped(args[0], to.shape_of(node))


@lowers(aten.permute.default)
def _permute(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, order = args
    return view.permuted([_dim(d, len(order)) for d in order])


@lowers(aten.transpose.int)
def _transpose(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, *pair = args
    first, second = (_dim(d, len(view.shape)) for d in pair)
    order = list(range(len(view.shape)))
    order[first], order[second] = second, first
    return view.permuted(order)


@lowers(aten.t.default)
def _t(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return args[0].permuted(list(range(len(args[0].shape)))[::-1])


@lowers(aten.expand.default)
def _expand(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return args[0].expanded(to.shape_of(node))


@lowers(aten.contiguous.default, aten.clone.default)
def _contiguous(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return to.contiguous(args[0])


@lowers(aten.alias.default, aten.detach.default, aten.dropout.default, aten.lift_fresh_copy.default)
def _same(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return args[0]


@lowers(aten._assert_tensor_metadata.default)
def _nothing(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> None:
    return None


def _selected(to: Lowerer, view: View, dim: int, index: int) -> View:
    found = view.selected(dim, index)
    if found is None:
        # With the dimension last, its stride is 1 once copied.
        found = to.copied(view.permuted(_last(view, dim))).selected(len(view.shape) - 1, index)
    assert found is not None
    return found


def _last(view: View, dim: int) -> list[int]:
    return [d for d in range(len(view.shape)) if d != dim] + [dim]


@lowers(aten.select.int)
def _select(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dim, index = args
    dim = _dim(dim, len(view.shape))
    size = view.shape[dim].number
    if index < 0 and size is None:
        raise to.unsupported(node, "an index from the end of a free size")
    return _selected(to, view, dim, index if index >= 0 else index + (size or 0))


@lowers(aten.unbind.int)
def _unbind(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view = args[0]
    dim = _dim(args[1] if len(args) > 1 else 0, len(view.shape))
    size = view.shape[dim].number
    if size is None:
        raise to.unsupported(node, "unbinding a free size")
    return [_selected(to, view, dim, i) for i in range(size)]


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view = args[0]
    dim = _dim(args[2] if len(args) > 2 else kwargs.get("dim", 0), len(view.shape))
    pieces, start = [], 0
    for value in node.meta["val"]:
        size = to.extent(value.shape[dim])
        piece = view.sliced(dim, start, size)
        if piece is None or size.number is None:
            raise to.unsupported(node, "splitting a free size")
        pieces.append(piece)
        start += size.number
    return pieces


@lowers(aten.slice.Tensor)
def _slice(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view = args[0]
    given = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, step = given[0], given[1], given[3]
    size = to.extent(node.meta["val"].shape[dim])
    start = 0 if start is None else start
    if step != 1 or not isinstance(start, int):
        raise to.unsupported(node, "a slice with a step or a start that is not a number")
    if start < 0:
        whole = view.shape[dim].number
        if whole is None:
            raise to.unsupported(node, "a slice from the end of a free size")
        start += whole
    piece = view.sliced(_dim(dim, len(view.shape)), start, size)
    if piece is None:
        raise to.unsupported(node, "a slice across a free stride")
    return piece


# Elementwise.

_BINARY = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.maximum.default: "max",
    aten.minimum.default: "min",
    aten.clamp_min.default: "max",
    aten.clamp_max.default: "min",
    aten.lt.Scalar: "lt",
    aten.lt.Tensor: "lt",
    aten.le.Scalar: "le",
    aten.le.Tensor: "le",
    aten.eq.Scalar: "eq",
    aten.eq.Tensor: "eq",
    aten.gt.Scalar: "gt",
    aten.gt.Tensor: "gt",
    aten.ge.Scalar: "ge",
    aten.ge.Tensor: "ge",
    aten.ne.Scalar: "ne",
    aten.ne.Tensor: "ne",
}
_UNARY = {
    aten.neg.default: "neg_f32",
    aten.abs.default: "abs_f32",
    aten.exp.default: "exp_f32",
    aten.log.default: "log_f32",
    aten.sqrt.default: "sqrt_f32",
    aten.rsqrt.default: "rsqrt_f32",
    aten.tanh.default: "tanh_f32",
    aten.sigmoid.default: "sigmoid_f32",
    aten.relu.default: "relu_f32",
    aten.silu.default: "silu_f32",
}
_LOGICAL = {
    aten.logical_and.default: "and_i64",
    aten.bitwise_and.Tensor: "and_i64",
    aten.logical_or.default: "or_i64",
    aten.bitwise_or.Tensor: "or_i64",
    aten.__and__.Tensor: "and_i64",
    aten.__or__.Tensor: "or_i64",
    aten.logical_not.default: "not_i64",
    aten.bitwise_not.default: "not_i64",
}


class _Program:
    """A map in the making: operands become registers of the type computed in."""

    def __init__(self) -> None:
        self.inputs: list[View] = []
        self._pending: list[tuple[Any, bool]] = []
        self.code: list[Instruction] = []

    def operands(self, values: list[Any], *, floating: bool) -> list[int]:
        """Registers of views and numbers, all float or all integer."""
        self.inputs = [v for v in values if isinstance(v, View)]
        registers, seen = [], 0
        for value in values:
            if isinstance(value, View):
                register, seen = seen, seen + 1
                if floating and value.dtype != "float32":
                    register = self.append("to_f32", register)
            elif floating:
                register = self.append("number", float(value))
            else:
                register = self.append("integer", int(value))
            registers.append(register)
        return registers

    def append(self, *instruction: Any) -> int:
        """The register of a new instruction's result."""
        self.code.append(instruction)
        return len(self.inputs) + len(self.code) - 1


def _is_float(value: Any) -> bool:
    return value.dtype == "float32" if isinstance(value, View) else isinstance(value, float)


@lowers(*_BINARY)
def _binary(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    name = _BINARY[node.target]
    left, right = args[:2]
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if kwargs.get("rounding_mode") is not None or isinstance(right, torch.SymInt):
        raise to.unsupported(node, "a rounding mode or a free size as an operand")
    floating = name == "div" or _is_float(left) or _is_float(right)
    kind = "f32" if floating else "i64"
    program = _Program()
    a, b = program.operands([left, right], floating=floating)
    if alpha != 1:
        factor = program.append("number" if floating else "integer", alpha)
        b = program.append(f"mul_{kind}", b, factor)
    if name == "gt":
        name, a, b = "lt", b, a
    elif name == "ge":
        name, a, b = "le", b, a
    if name == "ne":
        program.append("not_i64", program.append(f"eq_{kind}", a, b))
    else:
        program.append(f"{name}_{kind}", a, b)
    return to.map(node, program.inputs, program.code, to.shape_of(node), dtype_of(node))


@lowers(aten.rsub.Scalar)
def _rsub(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    program = _Program()
    floating = _is_float(args[0]) or _is_float(args[1])
    a, b = program.operands(args[:2], floating=floating)
    program.append("sub_f32" if floating else "sub_i64", b, a)
    return to.map(node, program.inputs, program.code, to.shape_of(node), dtype_of(node))


@lowers(*_UNARY)
def _unary(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    program = _Program()
    (a,) = program.operands([args[0]], floating=True)
    program.append(_UNARY[node.target], a)
    return to.map(node, program.inputs, program.code, to.shape_of(node))


@lowers(aten.gelu.default)
def _gelu(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    if kwargs.get("approximate", "none") != "none":
        raise to.unsupported(node, "the tanh form of GELU; the nearest supported is the erf form")
    return to.map(node, [args[0]], [("gelu_f32", 0)], to.shape_of(node))


@lowers(*_LOGICAL)
def _logical(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    if dtype_of(node) != "bool" or any(v.dtype != "bool" for v in args):
        raise to.unsupported(node, "logic on other dtypes than bool")
    program = [(_LOGICAL[node.target], *range(len(args)))]
    return to.map(node, list(args), program, to.shape_of(node), "bool")


@lowers(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return _choose(to, node, args[0], args[1], args[2])


@lowers(aten.masked_fill.Scalar)
def _masked_fill(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return _choose(to, node, args[1], args[2], args[0])


def _choose(to: Lowerer, node: Node, condition: View, yes: Any, no: Any) -> View:
    floating = dtype_of(node) == "float32"
    views = [v for v in (yes, no) if isinstance(v, View)]
    program = _Program()
    program.inputs = [condition, *views]
    registers = []
    for value in (yes, no):
        if isinstance(value, View):
            register = program.inputs.index(value, 1)
            if floating and value.dtype != "float32":
                register = program.append("to_f32", register)
        else:
            number = float(value) if floating else int(value)
            register = program.append("number" if floating else "integer", number)
        registers.append(register)
    program.append("where_f32" if floating else "where_i64", 0, *registers)
    return to.map(node, program.inputs, program.code, to.shape_of(node), dtype_of(node))


@lowers(aten.to.dtype, aten._to_copy.default)
def _to(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dtype = args[0], dtype_of(node)
    if view.dtype == dtype:
        return view
    if dtype == "float32":
        return to.map(node, [view], [("to_f32", 0)], view.shape)
    if dtype == "int64" and view.dtype in ("bool", "int32"):
        return to.map(node, [view], [], view.shape, dtype)
    raise to.unsupported(node, f"{view.dtype} to {dtype}; float32 is the supported target")


@lowers(aten.arange.start, aten.arange.default, aten.arange.start_step)
def _arange(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """Reached where the end is a free size: the positions, plus the start."""
    start = 0 if node.target is aten.arange.default else args[0]
    if not isinstance(start, int) or (len(args) > 2 and args[2] != 1):
        raise to.unsupported(node, "a start that is not a number, or a step")
    program = [("index", 0), ("integer", start), ("add_i64", 0, 1)]
    return to.map(node, [], program, to.shape_of(node), dtype_of(node))


@lowers(aten.full.default, aten.zeros.default, aten.ones.default)
def _full(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    value = {aten.zeros.default: 0, aten.ones.default: 1}.get(node.target)
    value = args[1] if value is None else value
    tensor = torch.tensor(value, dtype=node.meta["val"].dtype)
    return constant(tensor).expanded(to.shape_of(node))


@lowers(aten.cat.default)
def _cat(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """A buffer whose parts are written by copies, until a pass lets their producers write them."""
    shape = to.shape_of(node)
    dim = _dim(args[1] if len(args) > 1 else 0, len(shape))
    whole = Buffer(dtype_of(node), shape).view()
    start = 0
    for part in args[0]:
        size = part.shape[dim].number
        into = whole.sliced(dim, start, part.shape[dim])
        if into is None or size is None:
            raise to.unsupported(node, "concatenation along a free size")
        to.copied(part)
        to.steps[-1].output = into
        start += size
    return whole


# Layers.


@lowers(aten.embedding.default)
def _embedding(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    table, ids = args[0], to.contiguous(args[1])
    return to.emit(node, "gather", [ids, table], to.shape_of(node))


@lowers(torch.ops.fastrec.int8_embedding.default)
def _int8_embedding(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    ids, table, scale = args
    return to.emit(node, "gather", [to.contiguous(ids), table, scale], to.shape_of(node))


@lowers(aten.layer_norm.default)
def _layer_norm(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, shape, weight, bias, eps = [*args[:5], *(None, None, 1e-5)[len(args) - 2 :]][:5]
    if len(shape) != 1:
        raise to.unsupported(node, "more than one normalised dimension")
    if weight is None:
        weight = constant(torch.ones(shape))
    if bias is None:
        bias = constant(torch.zeros(shape))
    inputs = [to.contiguous(x), weight, bias]
    return to.emit(
        node, "layer_norm", inputs, to.shape_of(node), integers=[0, 0, 0], numbers=[eps, 1.0]
    )


@lowers(aten.linear.default)
def _linear(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, weight, bias = [*args, None][:3]
    if weight.constant is None:
        raise to.unsupported(
            node, "a weight that is computed; the nearest supported is a parameter"
        )
    inputs = [to.contiguous(x), weight, *([] if bias is None else [bias])]
    return to.emit(node, "linear", inputs, to.shape_of(node), integers=[int(bias is not None), 0])


@lowers(torch.ops.fastrec.sparse_int8_linear.default)
def _linear_int8(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, values, group_index, panel_start, w_scale, bias, x_scale, x_zero, activation, *y = args
    y_scale, y_zero = y
    outputs, inputs = len(w_scale.constant), x.shape[-1].coefficient
    parts = [torch.from_numpy(v.constant) for v in (values, group_index, panel_start, w_scale)]
    packed = PackedWeight.from_parts(*parts, outputs, inputs)  # type: ignore[call-arg]
    sums = packed.unpack().to(torch.int32).sum(1, dtype=torch.int32)
    operands = [to.contiguous(x), values, group_index, panel_start, w_scale, constant(sums)]
    return to.emit(
        node,
        "linear_int8",
        operands if bias is None else [*operands, bias],
        to.shape_of(node),
        dtype_of(node),
        integers=[
            outputs,
            inputs,
            int(x_zero.constant),
            ACTIVATIONS[activation],
            int(bias is not None),
            0 if y_zero is None else int(y_zero.constant),
            0,
            0,
        ],
        numbers=[float(x_scale.constant), 1.0 if y_scale is None else float(y_scale.constant)],
    )


@lowers(aten.scaled_dot_product_attention.default)
def _attention(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    q, k, v, mask, dropout, causal = [*args, *(None, 0.0, False)[len(args) - 3 :]][:6]
    if causal or dropout:
        raise to.unsupported(node, "causal attention or dropout")
    lengths = None
    if mask is not None:
        lengths = padding_lengths(to, mask, k.shape[2])
        if lengths is None:
            raise to.unsupported(
                node,
                "an attention mask other than padding: keys at or beyond a length per sequence",
            )
    q, k, v = (_rows_contiguous(to, x) for x in (q, k, v))
    batch, heads, queries, dims = q.shape
    scale = kwargs.get("scale") or float(dims.coefficient) ** -0.5
    inputs = [q, k, v, *([] if lengths is None else [lengths])]
    out = to.emit(
        node,
        "attention",
        inputs,
        (batch, queries, heads, dims),
        integers=[int(lengths is not None)],
        numbers=[scale],
    )
    return out.permuted((0, 2, 1, 3))


def _rows_contiguous(to: Lowerer, x: View) -> View:
    """[.., D] whose last dimension has a stride of 1, copied if need be."""
    return x if x.strides[-1] == ONE or x.shape[-1] == ONE else to.copied(x)


def padding_lengths(to: Lowerer, mask: View, keys: Extent) -> View | None:
    """Lengths i64 [B] where ``mask`` adds a large negative number beyond them and 0 before.

    Recognised: (length - (1, 2, .. L) < 0) * -C, C >= 10,000, broadcast over heads and queries.
    """
    made = {step.output.buffer: step for step in to.steps}
    if any(s != ONE for s in mask.shape[1:3]):
        return None
    product_ = made.get(mask.buffer)
    if product_ is None or [i[0] for i in product_.program] != ["number", "mul_f32"]:
        return None
    if product_.program[0][1] > -1e4:
        return None
    cast = made.get(product_.inputs[0].buffer)
    if cast is None or cast.program != [("to_f32", 0)]:
        return None
    less = made.get(cast.inputs[0].buffer)
    if less is None or less.program != [("integer", 0), ("lt_i64", 0, 1)]:
        return None
    age = made.get(less.inputs[0].buffer)
    if age is None or age.program != [("sub_i64", 0, 1)]:
        return None
    length, positions = age.inputs
    if length.strides[1] != Extent(0) or not _counts_from_one(made, positions, keys):
        return None
    return length.selected(1, 0)


def _counts_from_one(made: dict[Buffer, Any], positions: View, keys: Extent) -> bool:
    if positions.constant is not None:
        row = positions.constant[0]
        return keys.number == len(row) and bool(np.array_equal(row, np.arange(1, len(row) + 1)))
    step = made.get(positions.buffer)
    wanted = [("index", 0), ("integer", 1), ("add_i64", 0, 1)]
    return step is not None and step.program == wanted and positions.shape[-1] == keys

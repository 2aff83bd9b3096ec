"""Arithmetic, comparisons, logic and choices, element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native.buffers import View
from fastrec.runtime.native.lowerer import Lowerer, dtype_of
from fastrec.runtime.native.lowerings.map_program import MapProgram, is_float
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten


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


@lowers(*_BINARY)
def _binary(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    name = _BINARY[node.target]
    left, right = args[:2]
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if kwargs.get("rounding_mode") is not None or isinstance(right, torch.SymInt):
        raise to.unsupported(node, "a rounding mode or a free size as an operand")
    floating = name == "div" or is_float(left) or is_float(right)
    kind = "f32" if floating else "i64"
    program = MapProgram()
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


@lowers(aten.clamp.default)
def _clamp(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    low, high = [*args[1:], None, None][:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    dtype = dtype_of(node)
    kind = "f32" if dtype == "float32" else "i64"
    program = MapProgram()
    (a,) = program.operands([args[0]], floating=dtype == "float32")
    for name, bound in (("max", low), ("min", high)):
        if bound is not None:
            limit = program.append("number" if kind == "f32" else "integer", bound)
            a = program.append(f"{name}_{kind}", a, limit)
    return to.map(node, program.inputs, program.code, to.shape_of(node), dtype)


@lowers(aten.rsub.Scalar)
def _rsub(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    program = MapProgram()
    floating = is_float(args[0]) or is_float(args[1])
    a, b = program.operands(args[:2], floating=floating)
    program.append("sub_f32" if floating else "sub_i64", b, a)
    return to.map(node, program.inputs, program.code, to.shape_of(node), dtype_of(node))


@lowers(*_UNARY)
def _unary(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    program = MapProgram()
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
    return choose(to, node, args[0], args[1], args[2])


@lowers(aten.masked_fill.Scalar, aten.masked_fill_.Scalar)
def _masked_fill(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return choose(to, node, args[1], args[2], args[0])


def choose(to: Lowerer, node: Node, condition: View, yes: Any, no: Any) -> View:
    """``yes`` where the condition holds, else ``no``; views or numbers."""
    floating = dtype_of(node) == "float32"
    views = [v for v in (yes, no) if isinstance(v, View)]
    program = MapProgram()
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

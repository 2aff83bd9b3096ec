"""Arithmetic, comparisons, logic and choices, element by element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native.buffers import View
from fastrec.runtime.native.lowerer import Complex, Lowerer, dtype_of
from fastrec.runtime.native.lowerings.map_program import MapProgram, is_float
from fastrec.runtime.native.registry import OVERFLOWING, lowers

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
    aten.clamp_min.Tensor: "max",
    aten.clamp_max.Tensor: "min",
    aten.remainder.Tensor: "rem",
    aten.remainder.Scalar: "rem",
    aten.floor_divide.default: "floor_div",
    aten.div.Tensor_mode: "div",
    aten.div.Scalar_mode: "div",
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
OVERFLOWING |= {op for op, name in _BINARY.items() if name in ("add", "sub", "mul", "floor_div")}
OVERFLOWING |= {aten.rsub.Scalar, aten.neg.default, aten.abs.default, aten.pow.Tensor_Scalar}
_UNARY = {
    aten.exp.default: "exp_f32",
    aten.log.default: "log_f32",
    aten.sqrt.default: "sqrt_f32",
    aten.rsqrt.default: "rsqrt_f32",
    aten.tanh.default: "tanh_f32",
    aten.sigmoid.default: "sigmoid_f32",
    aten.silu.default: "silu_f32",
    aten.erf.default: "erf_f32",
    aten.sin.default: "sin_f32",
    aten.cos.default: "cos_f32",
    aten.floor.default: "floor_f32",
    aten.ceil.default: "ceil_f32",
    aten.trunc.default: "trunc_f32",
    aten.round.default: "round_f32",
    aten.expm1.default: "expm1_f32",
    aten.log1p.default: "log1p_f32",
}
_LOGICAL = {
    aten.logical_and.default: "and_i64",
    aten.bitwise_and.Tensor: "and_i64",
    aten.logical_or.default: "or_i64",
    aten.bitwise_or.Tensor: "or_i64",
    aten.__and__.Tensor: "and_i64",
    aten.__or__.Tensor: "or_i64",
    aten.logical_xor.default: "xor_i64",
    aten.bitwise_xor.Tensor: "xor_i64",
    aten.logical_not.default: "not_i64",
    aten.bitwise_not.default: "not_i64",
}


@lowers(*_BINARY)
def _binary(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View | Complex:
    name = _BINARY[node.target]
    left, right = args[:2]
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if isinstance(right, torch.SymInt | torch.SymFloat):
        raise to.free_size(node, "a free size as an operand")
    if any(isinstance(v, Complex) for v in (left, right)):
        return complex_binary(to, node, name, left, right)
    mode = "floor" if name == "floor_div" else kwargs.get("rounding_mode")
    result = dtype_of(node)
    compared = name in ("lt", "le", "eq", "gt", "ge", "ne")
    floating = is_float(left) or is_float(right) if compared else result == "float32"
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
    elif mode is None:
        found = program.append(f"{name}_{kind}", a, b)
        if result == "bool" and name == "add":  # of two bools: 1, not 2
            program.append("not_i64", program.append("not_i64", found))
    elif floating and mode == "floor":
        program.append("floor_div_f32", a, b)
    elif floating:
        program.append(f"{mode}_f32", program.append("div_f32", a, b))
    elif mode == "floor":
        program.append("div_i64", a, b)
    else:
        raise to.unsupported(node, "a quotient of integers rounded to 0; write rounding_mode=floor")
    return to.map(node, program.inputs, program.code, to.shape_of(node), result)


def complex_binary(to: Lowerer, node: Node, name: str, left: Any, right: Any) -> Complex:
    """Sum, difference or product of complex tensors, or of one and a float one or a number."""
    shape = to.shape_of(node)

    def combine(a: Any, b: Any, name: str) -> View:
        program = MapProgram()
        program.append(name, *program.operands([a, b], floating=True))
        return to.map(node, program.inputs, program.code, shape)

    if not isinstance(left, Complex):
        left, right = right, left
        if name == "sub":
            raise to.unsupported(node, "a real number less a complex one")
    if name in ("mul", "div") and not isinstance(right, Complex):
        return Complex(*(combine(part, right, f"{name}_f32") for part in left))
    if not isinstance(right, Complex):
        imag = combine(left.imag, 0.0, "add_f32")
        return Complex(combine(left.real, right, f"{name}_f32"), imag)
    if name in ("add", "sub"):
        pairs = zip(left, right, strict=True)
        return Complex(*(combine(a, b, f"{name}_f32") for a, b in pairs))
    if name != "mul":
        raise to.unsupported(node, "complex numbers; sums, differences and products are supported")
    program = [("mul_f32", 0, 2), ("mul_f32", 1, 3), ("sub_f32", 4, 5)]
    real = to.map(node, [*left, *right], program, shape)
    program = [("mul_f32", 0, 3), ("mul_f32", 1, 2), ("add_f32", 4, 5)]
    return Complex(real, to.map(node, [*left, *right], program, shape))


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _power(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    base, exponent = args
    dtype = dtype_of(node)
    whole = isinstance(exponent, int) or (isinstance(exponent, float) and exponent.is_integer())
    program = MapProgram()
    if isinstance(base, View) and whole and 1 <= exponent <= 4:
        kind = "f32" if dtype == "float32" else "i64"
        (x,) = program.operands([base], floating=kind == "f32")
        result = x
        for _ in range(int(exponent) - 1):
            result = program.append(f"mul_{kind}", result, x)
        return to.map(node, program.inputs, program.code, to.shape_of(node), dtype)
    if dtype != "float32":
        raise to.unsupported(node, "a power of integers; cast them to float first")
    if exponent == 0.5:
        program.append("sqrt_f32", *program.operands([base], floating=True))
    else:
        program.append("pow_f32", *program.operands([base, exponent], floating=True))
    return to.map(node, program.inputs, program.code, to.shape_of(node))


# Unary ops as (float program, integer program) over register 0; None where integers have none.
_STEPS: dict[Any, tuple[list[Any], list[Any] | None]] = {
    aten.neg.default: ([("neg_f32", 0)], [("integer", 0), ("sub_i64", 1, 0)]),
    aten.abs.default: (
        [("abs_f32", 0)],
        [("integer", 0), ("sub_i64", 1, 0), ("max_i64", 0, 2)],
    ),
    aten.relu.default: ([("relu_f32", 0)], [("integer", 0), ("max_i64", 0, 1)]),
    aten.sign.default: (
        [("number", 0.0), ("lt_f32", 1, 0), ("lt_f32", 0, 1), ("sub_i64", 2, 3), ("to_f32", 4)],
        [("integer", 0), ("lt_i64", 1, 0), ("lt_i64", 0, 1), ("sub_i64", 2, 3)],
    ),
    aten.reciprocal.default: ([("number", 1.0), ("div_f32", 1, 0)], None),
    aten.isnan.default: ([("eq_f32", 0, 0), ("not_i64", 1)], [("integer", 0)]),
    aten.isinf.default: (
        [("abs_f32", 0), ("number", float("inf")), ("eq_f32", 1, 2)],
        [("integer", 0)],
    ),
    aten.exp2.default: ([("number", 2.0), ("pow_f32", 1, 0)], None),
    aten.log2.default: ([("log_f32", 0), ("number", 1 / math.log(2)), ("mul_f32", 1, 2)], None),
    aten.log10.default: ([("log_f32", 0), ("number", 1 / math.log(10)), ("mul_f32", 1, 2)], None),
}


@lowers(*_STEPS)
def _steps(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    floats, integers = _STEPS[node.target]
    (view,) = args
    program = floats
    if view.dtype != "float32":
        if integers is None:
            view = to.cast(node, view, "float32")
        else:
            program = integers
    return to.map(node, [view], program, to.shape_of(node), dtype_of(node))


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
    if kwargs.get("approximate", "none") == "none":
        return to.map(node, [args[0]], [("gelu_f32", 0)], to.shape_of(node))
    # x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
    program = [("mul_f32", 0, 0), ("number", 0.044715), ("mul_f32", 1, 2), ("number", 1.0)]
    program += [("add_f32", 3, 4), ("mul_f32", 0, 5), ("number", math.sqrt(2 / math.pi))]
    program += [("mul_f32", 6, 7), ("tanh_f32", 8), ("add_f32", 9, 4), ("number", 0.5)]
    program += [("mul_f32", 0, 11), ("mul_f32", 12, 10)]
    return to.map(node, [args[0]], program, to.shape_of(node))


@lowers(*_LOGICAL)
def _logical(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    logical = str(node.target).startswith("aten.logical")
    if dtype_of(node) != "bool" or not all(isinstance(v, View) for v in args):
        raise to.unsupported(node, "logic on other dtypes than bool")
    views = [to.cast(node, v, "bool") if logical else v for v in args]
    program = [(_LOGICAL[node.target], *range(len(args)))]
    return to.map(node, views, program, to.shape_of(node), "bool")


@lowers(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return choose(to, node, args[0], args[1], args[2])


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return choose(to, node, args[1], args[2], args[0])


def choose(to: Lowerer, node: Node, condition: View, yes: Any, no: Any) -> View:
    """``yes`` where the condition holds, else ``no``; views or numbers."""
    dtype = dtype_of(node)
    floating = dtype == "float32"
    condition = to.cast(node, condition, "bool")
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
            number = float(value) if floating else int(bool(value) if dtype == "bool" else value)
            register = program.append("number" if floating else "integer", number)
        registers.append(register)
    program.append("where_f32" if floating else "where_i64", 0, *registers)
    return to.map(node, program.inputs, program.code, to.shape_of(node), dtype)

"""Casts, and tensors made from sizes: arange, zeros, ones, full."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native.buffers import View
from fastrec.runtime.native.lowerer import Lowerer, constant, dtype_of
from fastrec.runtime.native.registry import OVERFLOWING, lowers

aten = torch.ops.aten
OVERFLOWING |= {aten.to.dtype, aten._to_copy.default}


@lowers(aten.to.dtype, aten._to_copy.default)
def _to(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return to.cast(node, args[0], dtype_of(node))


@lowers(aten.arange.start, aten.arange.default, aten.arange.start_step)
def _arange(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """Positions plus the start. (With a fixed end it is a constant, and folded before.)"""
    start = 0 if node.target is aten.arange.default else args[0]
    step = args[2] if len(args) > 2 else 1
    if not isinstance(start, int) or not isinstance(step, int):
        raise to.free_size(node, "a start or a step that is not a number")
    program = [("index", 0), ("integer", start), ("add_i64", 0, 1)]
    if step != 1:
        program = [("index", 0), ("integer", step), ("mul_i64", 0, 1), ("integer", start)]
        program.append(("add_i64", 2, 3))
    return to.cast(node, to.map(node, [], program, to.shape_of(node), "int64"), dtype_of(node))


@lowers(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
@lowers(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
@lowers(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
@lowers(aten.scalar_tensor.default, aten.fill.Scalar)
def _full(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    name = str(node.target).split(".")[1]
    value = args[0] if name == "scalar_tensor" else args[-1] if "f" in name else "ones" in name
    if isinstance(value, torch.SymInt | torch.SymFloat):
        raise to.free_size(node, "a value that follows from a free size")
    tensor = torch.tensor(value).to(node.meta["val"].dtype)
    return constant(tensor).expanded(to.shape_of(node))


@lowers(aten.copy.default)
def _copy(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return to.cast(node, args[1], dtype_of(node)).expanded(to.shape_of(node))


@lowers(aten.tril.default, aten.triu.default)
def _triangle(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """Elements where row + diagonal >= column, or <= for triu; the others are 0."""
    view, diagonal = args[0], args[1] if len(args) > 1 else kwargs.get("diagonal", 0)
    rank, dtype = len(view.shape), dtype_of(node)
    row, column = ("index", rank - 2), ("index", rank - 1)
    first, second = (column, row) if node.target is aten.tril.default else (row, column)
    offset = diagonal if node.target is aten.tril.default else -diagonal
    # Registers: x, first, second, offset, second + offset, whether it is kept, 0, result.
    program = [first, second, ("integer", offset), ("add_i64", 2, 3), ("le_i64", 1, 4)]
    zero = ("number", 0.0) if dtype == "float32" else ("integer", 0)
    program += [zero, ("where_f32" if dtype == "float32" else "where_i64", 5, 0, 6)]
    return to.map(node, [view], program, view.shape, dtype)

"""Casts, and tensors made from sizes: arange, zeros, ones, full."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native.buffers import View
from fastrec.runtime.native.lowerer import Lowerer, constant, dtype_of
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten


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
    """Positions plus the start. (With a fixed end it is a constant, and folded before.)"""
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


@lowers(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
def _full_like(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    value = {aten.zeros_like.default: 0, aten.ones_like.default: 1}.get(node.target)
    value = args[1] if value is None else value
    tensor = torch.tensor(value, dtype=node.meta["val"].dtype)
    return constant(tensor).expanded(to.shape_of(node))

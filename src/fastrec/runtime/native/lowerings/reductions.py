"""Sums, means and maxima along dimensions; cumulative sums; softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import View, product
from fastrec.runtime.native.lowerer import Lowerer, dtype_of
from fastrec.runtime.native.lowerings.views import dim_of
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten

_OPERATIONS = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "mean",
    aten.mean.dim: "mean",
    aten.amax.default: "max",
}


@lowers(*_OPERATIONS)
def _reduce(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view = args[0]
    rank = len(view.shape)
    whole = node.target in (aten.sum.default, aten.mean.default)
    given = args[1] if len(args) > 1 and not whole else None
    dims = sorted(dim_of(d, rank) for d in given) if given else list(range(rank))
    dtype = dtype_of(node)
    if view.dtype == "bool" and dtype == "int64":
        view = to.map(node, [view], [], view.shape, "int64")
    if view.dtype != dtype or dtype not in ("float32", "int64"):
        raise to.unsupported(node, f"a reduction of {view.dtype} to {dtype}; cast it first")
    if dims != list(range(dims[0], dims[0] + len(dims))):
        kept = [d for d in range(rank) if d not in dims]
        view = view.permuted([*kept, *dims])
        dims = list(range(len(kept), rank))
    shape = view.shape
    parts = (shape[: dims[0]], shape[dims[0] : dims[-1] + 1], shape[dims[-1] + 1 :])
    source = to.reshaped(to.contiguous(view), tuple(product(p) for p in parts))
    operation = _OPERATIONS[node.target]
    return to.emit(node, steps.reduce, to.shape_of(node), dtype, x=source, operation=operation)


@lowers(aten.cumsum.default)
def _cumsum(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dtype = args[0], dtype_of(node)
    if view.dtype == "bool" and dtype == "int64":
        view = to.map(node, [view], [], view.shape, "int64")
    if view.dtype != dtype or dtype not in ("float32", "int64"):
        raise to.unsupported(node, f"sums of {view.dtype} as {dtype}; cast it first")
    shape = view.shape
    dim = dim_of(args[1], len(shape))
    parts = (shape[:dim], shape[dim : dim + 1], shape[dim + 1 :])
    source = to.reshaped(to.contiguous(view), tuple(product(p) for p in parts))
    out = to.emit(node, steps.cumsum, source.shape, dtype, x=source)
    return to.reshaped(out, shape)


@lowers(aten.softmax.int, aten._softmax.default)
def _softmax(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view = args[0]
    rank = len(view.shape)
    dim = dim_of(args[1], rank)
    if view.dtype != "float32" or dtype_of(node) != "float32":
        raise to.unsupported(node, "a softmax of other dtypes than float32; cast it first")
    order = [d for d in range(rank) if d != dim] + [dim]
    moved = to.contiguous(view.permuted(order))
    out = to.emit(node, steps.softmax, moved.shape, x=moved)
    return out.permuted([order.index(d) for d in range(rank)])

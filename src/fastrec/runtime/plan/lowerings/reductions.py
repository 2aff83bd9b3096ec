"""Sums, means and maxima along dimensions; softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.plan.ir import View, product
from fastrec.runtime.plan.lower import Lowerer, dtype_of, lowers
from fastrec.runtime.plan.lowerings.views import dim_of

aten = torch.ops.aten

# csrc/cpu/engine/reduce.cpp
_KINDS = {aten.sum.dim_IntList: 0, aten.mean.dim: 1, aten.amax.default: 2}


@lowers(*_KINDS)
def _reduce(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view = args[0]
    rank = len(view.shape)
    given = args[1] if len(args) > 1 else None
    dims = sorted(dim_of(d, rank) for d in given) if given else list(range(rank))
    if view.dtype != "float32" or dtype_of(node) != "float32":
        raise to.unsupported(node, "a reduction of other dtypes than float32; cast it first")
    if dims != list(range(dims[0], dims[0] + len(dims))):
        kept = [d for d in range(rank) if d not in dims]
        view = view.permuted([*kept, *dims])
        dims = list(range(len(kept), rank))
    shape = view.shape
    parts = (shape[: dims[0]], shape[dims[0] : dims[-1] + 1], shape[dims[-1] + 1 :])
    source = to.reshaped(to.contiguous(view), tuple(product(p) for p in parts))
    return to.emit(node, "reduce", [source], to.shape_of(node), integers=[_KINDS[node.target]])


@lowers(aten.softmax.int, aten._softmax.default)
def _softmax(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view = args[0]
    rank = len(view.shape)
    dim = dim_of(args[1], rank)
    if view.dtype != "float32" or dtype_of(node) != "float32":
        raise to.unsupported(node, "a softmax of other dtypes than float32; cast it first")
    order = [d for d in range(rank) if d != dim] + [dim]
    moved = to.contiguous(view.permuted(order))
    out = to.emit(node, "softmax", [moved], moved.shape)
    return out.permuted([order.index(d) for d in range(rank)])

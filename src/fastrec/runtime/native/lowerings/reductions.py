"""Sums, means and maxima along dimensions; cumulative sums; softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import ONE, Extent, View, product
from fastrec.runtime.native.lowerer import Lowerer, dtype_of
from fastrec.runtime.native.lowerings.views import dim_of
from fastrec.runtime.native.registry import OVERFLOWING, lowers
from fastrec.runtime.native.steps import Instruction

aten = torch.ops.aten

_OPERATIONS = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "mean",
    aten.mean.dim: "mean",
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.max.default: "max",
    aten.min.default: "min",
}
OVERFLOWING |= {aten.sum.default, aten.sum.dim_IntList, aten.cumsum.default}


@lowers(*_OPERATIONS)
def _reduce(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    has_dims = node.target not in (
        aten.sum.default,
        aten.mean.default,
        aten.max.default,
        aten.min.default,
    )
    dims = args[1] if len(args) > 1 and has_dims else None
    view = to.cast(node, args[0], dtype_of(node))
    return to.reshaped(reduced(to, node, view, dims, _OPERATIONS[node.target]), to.shape_of(node))


def reduced(
    to: Lowerer, node: Node, view: View, given: Sequence[int] | int | None, operation: str
) -> View:
    """The view without the given dimensions (all where there are none)."""
    rank = len(view.shape)
    if isinstance(given, int):
        given = [given]
    dims = sorted(dim_of(d, rank) for d in given) if given else list(range(rank))
    if rank == 0:
        return view
    if view.dtype not in ("float32", "int64"):
        raise to.unsupported(node, f"a reduction of {view.dtype}; cast it first")
    kept = tuple(view.shape[d] for d in range(rank) if d not in dims)
    if dims != list(range(dims[0], dims[0] + len(dims))):
        view = view.permuted([*(d for d in range(rank) if d not in dims), *dims])
        dims = list(range(len(kept), rank))
    shape = view.shape
    parts = (shape[: dims[0]], shape[dims[0] : dims[-1] + 1], shape[dims[-1] + 1 :])
    source = to.reshaped(to.contiguous(view), tuple(product(p) for p in parts))
    return to.emit(node, steps.reduce, kept, view.dtype, x=source, operation=operation)


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
@lowers(aten.all.default, aten.all.dim, aten.all.dims)
def _any_or_all(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    operation = "max" if str(node.target).startswith("aten.any") else "min"
    view = to.cast(node, to.cast(node, args[0], "bool"), "int64")
    found = reduced(to, node, view, args[1] if len(args) > 1 else None, operation)
    return to.reshaped(to.cast(node, found, "bool"), to.shape_of(node))


@lowers(aten.max.dim, aten.min.dim)
def _extremum(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view, dim = args[:2]
    values, _ = node.meta["val"]
    shape = to.shape(values.shape)
    largest = node.target is aten.max.dim
    numbers = to.cast(node, view, "int64" if view.dtype != "float32" else "float32")
    found = reduced(to, node, numbers, dim, "max" if largest else "min")
    where = _position(to, node, numbers, dim, descending=largest)
    return [to.cast(node, to.reshaped(found, shape), view.dtype), to.reshaped(where, shape)]


@lowers(aten.argmax.default, aten.argmin.default)
def _arg_extremum(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dim = args[0], args[1] if len(args) > 1 else None
    if dim is None:
        view, dim = to.reshaped(view, (product(view.shape),)), 0
    descending = node.target is aten.argmax.default
    found = _position(to, node, view, dim, descending=descending)
    return to.reshaped(found, to.shape_of(node))


def _position(to: Lowerer, node: Node, view: View, dim: int, *, descending: bool) -> View:
    """Where the first of the largest or smallest elements is; a NaN counts as either."""
    if view.dtype == "float32" and not descending:
        # In ascending order a NaN is last.
        view, descending = to.map(node, [view], [("neg_f32", 0)], view.shape), True
    return first_positions(to, node, view, dim, ONE, descending=descending)


@lowers(aten.topk.default)
def _topk(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view, given = args[0], args[2:]
    dim, largest = [*given, *(-1, True)[len(given) :]][:2]
    size = to.extent(node.meta["val"][0].shape[dim])
    return _ordered(to, node, view, dim, size, descending=largest)


@lowers(aten.sort.default, aten.sort.stable)
def _sort(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    given = args[1:] if node.target is aten.sort.default else args[2:]
    dim = given[0] if given else kwargs.get("dim", -1)
    descending = given[1] if len(given) > 1 else kwargs.get("descending", False)
    return _ordered(to, node, args[0], dim, args[0].shape[dim], descending=descending)


def _ordered(
    to: Lowerer, node: Node, view: View, dim: int, size: Extent, *, descending: bool
) -> list[View]:
    where = first_positions(to, node, view, dim, size, descending=descending)
    last = view.permuted(_dim_last(view, dim))
    rows = product(last.shape[:-1])
    source = to.reshaped(to.contiguous(last), (rows, last.shape[-1], ONE))
    index = to.reshaped(to.contiguous(where.permuted(_dim_last(view, dim))), (rows, size, ONE))
    values = to.emit(node, steps.take, index.shape, view.dtype, x=source, index=index)
    shaped = to.reshaped(values, (*last.shape[:-1], size))
    return [shaped.permuted(_undone(_dim_last(view, dim))), where]


def _dim_last(view: View, dim: int) -> list[int]:
    dim = dim_of(dim, len(view.shape))
    return [d for d in range(len(view.shape)) if d != dim] + [dim]


def _undone(order: list[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def first_positions(
    to: Lowerer, node: Node, view: View, dim: int, size: Extent, *, descending: bool
) -> View:
    """The positions along ``dim`` of its ``size`` first elements in order, int64."""
    if view.dtype != "float32":
        view = to.cast(node, view, "int64")
    order = _dim_last(view, dim)
    last = view.permuted(order)
    rows = product(last.shape[:-1])
    source = to.reshaped(to.contiguous(last), (rows, last.shape[-1]))
    found = to.emit(node, steps.argsort, (rows, size), "int64", x=source, descending=descending)
    return to.reshaped(found, (*last.shape[:-1], size)).permuted(_undone(order))


@lowers(aten.var.correction, aten.std.correction, aten.var_mean.correction)
def _variance(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    view, dims = args[0], args[1] if len(args) > 1 else None
    correction = kwargs.get("correction")
    correction = 1 if correction is None else correction
    rank = len(view.shape)
    wanted = [dim_of(d, rank) for d in dims] if dims else list(range(rank))
    count = product([view.shape[d] for d in wanted]).number
    if count is None:
        raise to.free_size(node, "a variance along a free size")
    kept = tuple(ONE if d in wanted else size for d, size in enumerate(view.shape))
    mean = to.reshaped(reduced(to, node, view, wanted, "mean"), kept)
    squares = to.map(node, [view, mean], [("sub_f32", 0, 1), ("mul_f32", 2, 2)], view.shape)
    total = reduced(to, node, squares, wanted, "sum")
    # As torch: infinite or NaN where nothing is left.
    factor = float("inf") if count <= correction else 1.0 / (count - correction)
    program: list[Instruction] = [("number", factor), ("mul_f32", 0, 1)]
    if node.target is aten.std.correction:
        program.append(("sqrt_f32", 2))
    found = to.map(node, [total], program, total.shape)
    if node.target is not aten.var_mean.correction:
        return to.reshaped(found, to.shape_of(node))
    shape = to.shape(node.meta["val"][0].shape)
    return [to.reshaped(found, shape), to.reshaped(mean, shape)]


@lowers(aten.cumsum.default)
def _cumsum(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    dtype = dtype_of(node)
    view = to.cast(node, args[0], dtype)
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

"""Elements chosen by an index: gather, index, index_select, scatter; embeddings of any table."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import ONE, Extent, Shape, View, product
from fastrec.runtime.native.lowerer import Lowerer, constant, dtype_of
from fastrec.runtime.native.lowerings.elementwise import choose
from fastrec.runtime.native.lowerings.reductions import reduced
from fastrec.runtime.native.lowerings.views import dim_of, joined
from fastrec.runtime.native.registry import lowers
from fastrec.runtime.native.steps import Instruction

aten = torch.ops.aten


def taken(to: Lowerer, node: Node, source: View, dim: int, index: View) -> View:
    """Slices of a dimension: the index's dimensions stand in its place."""
    shape = source.shape
    before, after = shape[:dim], shape[dim + 1 :]
    x = to.reshaped(to.contiguous(source), (product(before), shape[dim], product(after)))
    ids = to.contiguous(to.cast(node, index, "int64"))
    at = to.reshaped(ids, (ONE, product(index.shape), ONE))
    flat = (x.shape[0], at.shape[1], x.shape[2])
    found = to.emit(node, steps.take, flat, source.dtype, x=x, index=at)
    return to.reshaped(found, (*before, *index.shape, *after))


@lowers(aten.embedding.default)
def _embedding(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    table, ids = args[0], to.contiguous(to.cast(node, args[1], "int64"))
    if table.constant is None or not table.is_contiguous:
        return taken(to, node, table, 0, ids)
    return to.emit(node, steps.gather, to.shape_of(node), ids=ids, table=table)


@lowers(aten.index_select.default)
def _index_select(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dim, index = args
    return taken(to, node, view, dim_of(dim, len(view.shape)), index)


def _columns(to: Lowerer, source: View, dim: int, index: View) -> tuple[View, View]:
    """A source and an index of its rank as ``take`` reads them: [A, N, C] and [A or 1, M, C or
    1]; dimensions that the index repeats are left out of it."""
    shape, at = source.shape, index.shape
    for d, size in enumerate(at):
        if d != dim and size != shape[d]:
            part = source.sliced(d, 0, size)
            assert part is not None
            source = part
    shape = source.shape
    x = (product(shape[:dim]), shape[dim], product(shape[dim + 1 :]))
    same = [size == ONE or index.strides[d] == Extent(0) for d, size in enumerate(at)]
    kept = index
    sizes = [product(at[:dim]), at[dim], product(at[dim + 1 :])]
    for place, dims in ((0, range(dim)), (2, range(dim + 1, len(at)))):
        if all(same[d] for d in dims):
            sizes[place] = ONE
            for d in dims:
                part = kept.sliced(d, 0, ONE)
                assert part is not None
                kept = part
    ids = to.reshaped(to.contiguous(to.cast(None, kept, "int64")), tuple(sizes))
    return to.reshaped(to.contiguous(source), x), ids


@lowers(aten.gather.default)
def _gather(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dim, index = args[:3]
    if not view.shape:
        return view
    x, at = _columns(to, view, dim_of(dim, len(view.shape)), index)
    shape = (x.shape[0], at.shape[1], x.shape[2])
    found = to.emit(node, steps.take, shape, view.dtype, x=x, index=at)
    return to.reshaped(found, to.shape_of(node))


def _linear_index(to: Lowerer, node: Node, sizes: Shape, indices: list[View], shape: Shape) -> View:
    """Positions in dimensions merged to one; those outside any of them are outside of it."""
    total = product(sizes).number
    if total is None and len(sizes) > 1:
        rest = product(sizes[1:]).number
        if rest is None:
            raise to.free_size(node, "indices into several free sizes")
    found: View | None = None
    for position, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        at = to.cast(node, index, "int64")
        if len(sizes) == 1:
            return at if at.shape == shape else to.copied(at.expanded(shape))
        step = product(sizes[position + 1 :]).coefficient
        number = size.number
        if number is None or total is None:
            raise to.free_size(node, "indices into a free size and others")
        # Counted from the front, and far outside where it is outside its own dimension.
        program: list[Instruction] = [("integer", 0), ("lt_i64", 0, 1), ("integer", number)]
        program += [("add_i64", 0, 3), ("where_i64", 2, 4, 0)]  # register 5
        program += [("lt_i64", 5, 1), ("le_i64", 3, 5), ("or_i64", 6, 7), ("integer", step)]
        program += [("mul_i64", 5, 9), ("integer", 2 * total), ("where_i64", 8, 11, 10)]
        part = to.map(node, [at], program, at.shape, "int64")
        found = (
            part
            if found is None
            else to.map(node, [found, part], [("add_i64", 0, 1)], shape, "int64")
        )
    assert found is not None
    return found if found.shape == shape else to.copied(found.expanded(shape))


def _broadcast(views: list[View]) -> Shape:
    rank = max(len(v.shape) for v in views)
    sizes = [ONE] * rank
    for view in views:
        for d, size in enumerate(view.shape):
            if size != ONE:
                sizes[rank - len(view.shape) + d] = size
    return tuple(sizes)


def _counts(to: Lowerer, index: View, size: Extent) -> bool:
    """Whether an index is 0, 1, .. of a dimension, along its own first dimension."""
    if not index.shape or index.shape[0] != size or product(index.shape) != size:
        return False
    if (values := index.constant) is not None:
        return bool((values.reshape(-1) == range(values.size)).all())
    made = to.writers().get(index.buffer)
    return made is not None and made.computes(("index", 0), ("integer", 0), ("add_i64", 0, 1))


def _each_own(to: Lowerer, node: Node, view: View, indices: list[View]) -> View:
    """x[arange(B), i, ..]: of each user, what its own index says."""
    shape = _broadcast(indices)
    if len(shape) != len(indices[0].shape):
        raise to.free_size(node, "an index for each user that does not have the users first")
    behind = len(indices)
    sizes, rest = view.shape[1:behind], view.shape[behind:]
    at = _linear_index(to, node, sizes, indices[1:], shape)
    x = to.reshaped(to.contiguous(view), (shape[0], product(sizes), product(rest)))
    index = to.reshaped(to.contiguous(at), (shape[0], product(shape[1:]), ONE))
    flat = (shape[0], index.shape[1], x.shape[2])
    found = to.emit(node, steps.take, flat, view.dtype, x=x, index=index)
    return to.reshaped(found, (*shape, *rest))


@lowers(aten.index.Tensor)
def _index(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, given = args
    if any(v is not None and v.dtype == "bool" for v in given):
        raise to.unsupported(
            node, "a mask as an index, whose size depends on values; write torch.where(mask, x, 0)"
        )
    dims = [d for d, v in enumerate(given) if v is not None]
    indices = [given[d] for d in dims]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        view = view.permuted([*dims, *(d for d in range(len(view.shape)) if d not in dims)])
        dims = list(range(len(dims)))
    first, behind = dims[0], dims[-1] + 1
    if first == 0 and len(indices) > 1 and _counts(to, indices[0], view.shape[0]):
        return _each_own(to, node, view, indices)
    sizes = view.shape[first:behind]
    index = _linear_index(to, node, sizes, indices, _broadcast(indices))
    shape = (*view.shape[:first], product(sizes), *view.shape[behind:])
    return taken(to, node, to.reshaped(view, shape), first, index)


@lowers(aten.index_put.default)
def _index_put(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, given, values = args[:3]
    adds = bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
    dims = [d for d, v in enumerate(given) if v is not None]
    if len(dims) == 1 and given[dims[0]].dtype == "bool":
        mask = given[dims[0]]
        inner = len(view.shape) - dims[0] - len(mask.shape)
        if product(values.shape) != ONE or adds:
            raise to.unsupported(
                node, "values put where a mask says; write torch.where(mask, values, x)"
            )
        return choose(to, node, to.reshaped(mask, (*mask.shape, *[ONE] * inner)), values, view)
    indices = [given[d] for d in dims]
    if dims != list(range(len(dims))):
        raise to.unsupported(node, "values put in other than the first dimensions")
    index = _linear_index(to, node, view.shape[: len(dims)], indices, _broadcast(indices))
    sizes, rest = view.shape[: len(dims)], view.shape[len(dims) :]
    flat = to.reshaped(to.contiguous(view), (ONE, product(sizes), product(rest)))
    count = product(index.shape)
    put = to.contiguous(to.cast(node, values, view.dtype).expanded((*index.shape, *rest)))
    result = to.emit(
        node,
        steps.scatter,
        flat.shape,
        view.dtype,
        x=flat,
        index=to.reshaped(to.contiguous(index), (ONE, count, ONE)),
        values=to.reshaped(put, (ONE, count, product(rest))),
        adds=adds,
    )
    return to.reshaped(result, view.shape)


@lowers(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def _scatter(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dim, index, source = args[:4]
    dim = dim_of(dim, len(view.shape))
    others = [d for d in range(len(view.shape)) if d != dim]
    if any(index.shape[d] != view.shape[d] for d in others):
        raise to.unsupported(node, "an index smaller than the tensor beside its dimension")
    x, at = _columns(to, view, dim, index)
    if isinstance(source, View):
        for d, size in enumerate(index.shape):
            part = source.sliced(d, 0, size)
            assert part is not None
            source = part
    else:
        fill = constant(torch.tensor(source, dtype=node.meta["val"].dtype))
        source = fill.expanded(index.shape)
    sizes = (x.shape[0], at.shape[1], x.shape[2])
    result = to.emit(
        node,
        steps.scatter,
        x.shape,
        view.dtype,
        x=x,
        index=at,
        values=to.reshaped(to.contiguous(source), sizes),
        adds=node.target is aten.scatter_add.default,
    )
    return to.reshaped(result, view.shape)


@lowers(aten.slice_scatter.default, aten.select_scatter.default)
def _slice_scatter(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """The view with a slice replaced: what lies before it, the new one, and what follows."""
    view, source, *given = args
    rank = len(view.shape)
    if node.target is aten.select_scatter.default:
        dim, start = dim_of(given[0], rank), given[1]
        source = to.reshaped(source, (*view.shape[:dim], ONE, *view.shape[dim + 1 :]))
        step = 1
    else:
        dim = dim_of(given[0] if given else 0, rank)
        start = given[1] if len(given) > 1 else None
        step = given[3] if len(given) > 3 else 1
    size, put = view.shape[dim].number, source.shape[dim].number
    if source.shape[dim] == view.shape[dim]:
        return to.cast(node, source, view.dtype)
    start = 0 if start is None else start
    if size is None or put is None or step != 1:
        raise to.free_size(node, "a slice of a free size, or with a step")
    start += size if start < 0 else 0
    parts = []
    for first, count in ((0, start), (None, put), (start + put, size - start - put)):
        part = source if first is None else view.sliced(dim, first, Extent(count))
        if part is None:
            raise to.free_size(node, "a slice across a free stride")
        if count:
            parts.append(to.cast(node, part, view.dtype))
    return joined(to, node, parts, dim, view.shape, dtype_of(node))


@lowers(aten._embedding_bag_forward_only.default, aten._embedding_bag.default)
def _embedding_bag(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Rows of a table, summed from each offset to the next."""
    table, ids, offsets = args[:3]
    mode, weights = args[4] if len(args) > 4 else 0, args[6] if len(args) > 6 else None
    last, padding = len(args) > 7 and args[7], args[8] if len(args) > 8 else -1
    if mode not in (0, 1) or padding not in (-1, None) or last:
        raise to.unsupported(
            node, "bags of maxima, padding or a last offset; the nearest supported: sum and mean"
        )
    rows = taken(to, node, table, 0, ids)
    if weights is not None:
        scale = to.reshaped(weights, (*weights.shape, ONE))
        rows = to.map(node, [rows, scale], [("mul_f32", 0, 1)], rows.shape)
    offsets = to.cast(node, offsets, "int64")
    count, bags, width = rows.shape[0], offsets.shape[0], rows.shape[1]
    # Which bag a row is in: the last that begins at or before it.
    program = [("index", 0), ("le_i64", 0, 1)]
    begun = to.map(node, [offsets], program, (count, bags), "int64")
    bag = reduced(to, node, begun, [1], "sum")
    bag = to.map(node, [bag], [("integer", 1), ("sub_i64", 0, 1)], bag.shape, "int64")
    index = to.reshaped(bag, (ONE, count, ONE))

    def summed(values: View, width: Extent) -> View:
        zeros = constant(torch.zeros(1)).expanded((ONE, bags, width))
        return to.emit(
            node,
            steps.scatter,
            (ONE, bags, width),
            x=to.copied(zeros),
            index=index,
            values=to.reshaped(to.contiguous(values), (ONE, count, width)),
            adds=True,
        )

    total = to.reshaped(summed(rows, width), (bags, width))
    if mode == 1:
        ones = constant(torch.ones(1)).expanded((ONE, count, ONE))
        counts = to.reshaped(summed(to.copied(ones), ONE), (bags, ONE))
        mean: list[Instruction] = [("number", 1.0), ("max_f32", 1, 2), ("div_f32", 0, 3)]
        total = to.map(node, [total, counts], mean, total.shape)
    return [total, None, None, None]

"""Reshapes, transposes, slices, concatenation: views, and copies where elements have to move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native.buffers import ONE, Buffer, Extent, Shape, View, product
from fastrec.runtime.native.lowerer import Lowerer, constant, dtype_of
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten


def dim_of(dim: int, rank: int) -> int:
    """A dimension that may be negative, counted from the front."""
    return dim + rank if dim < 0 else dim


@lowers(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
def _reshape(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return to.reshaped(args[0], to.shape_of(node))


@lowers(aten.permute.default)
def _permute(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, order = args
    return view.permuted([dim_of(d, len(order)) for d in order])


@lowers(aten.transpose.int)
def _transpose(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, *pair = args
    first, second = (dim_of(d, len(view.shape)) for d in pair)
    order = list(range(len(view.shape)))
    order[first], order[second] = second, first
    return view.permuted(order)


@lowers(aten.mT.default)
def _mt(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    rank = len(args[0].shape)
    return args[0].permuted([*range(rank - 2), rank - 1, rank - 2])


@lowers(aten.t.default)
def _t(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return args[0].permuted(list(range(len(args[0].shape)))[::-1])


@lowers(aten.expand.default, aten.expand_as.default)
def _expand(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    return args[0].expanded(to.shape_of(node))


# Memory layout does not matter here: lowerings that need contiguous rows copy.
@lowers(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
)
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
    dim = dim_of(dim, len(view.shape))
    size = view.shape[dim].number
    if index < 0 and size is None:
        raise to.free_size(node, "an index from the end of a free size")
    return _selected(to, view, dim, index if index >= 0 else index + (size or 0))


@lowers(aten.unbind.int)
def _unbind(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view = args[0]
    dim = dim_of(args[1] if len(args) > 1 else 0, len(view.shape))
    size = view.shape[dim].number
    if size is None:
        raise to.free_size(node, "unbinding a free size")
    return [_selected(to, view, dim, i) for i in range(size)]


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view = args[0]
    dim = dim_of(args[2] if len(args) > 2 else kwargs.get("dim", 0), len(view.shape))
    pieces, start = [], 0
    sizes = [to.extent(value.shape[dim]) for value in node.meta["val"]]
    if sizes[0].number is None and len(set(sizes)) == 1 and len(sizes) > 1:
        # Parts of one free size: their number is a dimension, which a copy puts last.
        shape = (*view.shape[:dim], Extent(len(sizes)), *sizes[:1], *view.shape[dim + 1 :])
        apart = to.reshaped(view, shape)
        whole = to.copied(apart.permuted(_last(apart, dim)))
        return [_selected(to, whole, len(shape) - 1, i) for i in range(len(sizes))]
    for size in sizes:
        piece = view.sliced(dim, start, size)
        if piece is None or size.number is None:
            raise to.free_size(node, "splitting a free size")
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
    if not isinstance(start, int) or not isinstance(step, int):
        raise to.free_size(node, "a slice whose step or start is not a number")
    if start < 0:
        whole = view.shape[dim].number
        if whole is None:
            raise to.free_size(node, "a slice from the end of a free size")
        start += whole
    dim = dim_of(dim, len(view.shape))
    if size.number is not None and view.shape[dim].number is not None:
        start = min(start, view.shape[dim].coefficient - size.coefficient * (step == 1))
    piece = view.sliced(dim, start, size)
    if piece is not None and step != 1:
        strides = list(piece.strides)
        strides[dim] = strides[dim] * Extent(step)
        piece = View(piece.buffer, piece.shape, tuple(strides), piece.offset)
    if piece is None:
        raise to.free_size(node, "a slice across a free stride")
    return piece


@lowers(aten.cat.default)
def _cat(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    shape, dtype = to.shape_of(node), dtype_of(node)
    dim = dim_of(args[1] if len(args) > 1 else kwargs.get("dim", 0), len(shape))
    # As torch: an empty tensor of one dimension is left out.
    parts = [p for p in args[0] if len(p.shape) == len(shape)]
    return joined(to, node, [to.cast(node, p, dtype) for p in parts], dim, shape, dtype)


def joined(
    to: Lowerer,
    node: Node,
    parts: Sequence[View],
    dim: int,
    shape: Shape,
    dtype: str = "float32",
) -> View:
    """A buffer whose parts are written by copies; the pass ``write_in_place`` removes them."""
    whole = Buffer(dtype, shape).view()
    if len(parts) > 1 and any(part.shape[dim].number is None for part in parts):
        return _joined_blocks(to, node, parts, dim, shape, dtype)
    if len(parts) > 1 and whole.strides[dim].number is None:
        # Put last, the dimension has a stride of 1.
        order = _last(whole, dim)
        moved = [part.permuted(order) for part in parts]
        sizes = tuple(shape[d] for d in order)
        last = joined(to, node, moved, len(shape) - 1, sizes, dtype)
        return last.permuted([order.index(d) for d in range(len(order))])
    start = 0
    for part in parts:
        size = part.shape[dim]
        into = whole.sliced(dim, start, size)
        assert into is not None
        if size != Extent(0):
            to.copy_into(part, into)
        start += size.number or 0
    return whole


def _joined_blocks(
    to: Lowerer, node: Node, parts: Sequence[View], dim: int, shape: Shape, dtype: str
) -> View:
    """Parts of one free size, joined along it: [.., n * size, ..] as [.., n, size, ..]."""
    if any(part.shape != parts[0].shape for part in parts) or product(shape[:dim]) != ONE:
        raise to.free_size(node, "concatenation along a free size")
    # The number of the part goes last and is then moved in front: its stride is a number.
    moved = (*parts[0].shape, Extent(len(parts)))
    whole = Buffer(dtype, moved).view()
    for i, part in enumerate(parts):
        into = whole.selected(len(moved) - 1, i)
        assert into is not None
        to.copy_into(part, into)
    order = [*range(dim), len(moved) - 1, *range(dim, len(moved) - 1)]
    return to.reshaped(whole.permuted(order), shape)


@lowers(aten.pad.default, aten.constant_pad_nd.default)
def _pad(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, pads, *rest = args
    mode, value = "constant", rest[0] if rest else 0
    if node.target is aten.pad.default:
        mode, value = [*rest, *("constant", None)[len(rest) :]][:2]
    if mode != "constant":
        raise to.unsupported(node, "padding by copies; the nearest supported: constants")
    return padded(to, node, view, pads, value or 0)


def padded(to: Lowerer, node: Node, view: View, pads: Sequence[int], value: float) -> View:
    """A concatenation with constants (``pads`` as torch has them); less where they are negative."""
    # In the order of memory, so that rows are copied as they lie.
    rank = len(view.shape)
    order = sorted(range(rank), key=lambda d: view.strides[d].number or 1 << 60, reverse=True)
    if order != list(range(rank)) and view.permuted(order).is_contiguous:
        every = [*pads, *[0] * (2 * rank - len(pads))]
        moved = [p for d in reversed(order) for p in every[2 * (rank - 1 - d) :][:2]]
        found = padded(to, node, view.permuted(order), moved, value)
        return found.permuted([order.index(d) for d in range(rank)])
    dtype = torch.float32 if view.dtype == "float32" else torch.int64
    fill = constant(torch.tensor(value, dtype=dtype if view.dtype != "bool" else torch.bool))
    for place in range(0, len(pads), 2):
        dim = len(view.shape) - 1 - place // 2
        before, after = pads[place : place + 2]
        size = view.shape[dim].number
        if before == after == 0:
            continue
        if size is None:
            raise to.free_size(node, "padding of a free size")
        kept = view.sliced(dim, max(-before, 0), Extent(size + min(before, 0) + min(after, 0)))
        if kept is None:
            raise to.free_size(node, "padding across a free stride")

        def of(count: int, view: View = view, dim: int = dim) -> Shape:
            return (*view.shape[:dim], Extent(count), *view.shape[dim + 1 :])

        parts = [fill.expanded(of(max(before, 0))), kept, fill.expanded(of(max(after, 0)))]
        view = joined(to, node, parts, dim, of(size + before + after), view.dtype)
    return view


@lowers(aten.repeat.default)
def _repeat(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """Each dimension as (times, size), expanded and merged."""
    view, times = args
    new = len(times) - len(view.shape)
    sizes = [ONE] * new + list(view.shape)
    apart: list[Extent] = []
    wide: list[Extent] = []
    for count, size in zip(times, sizes, strict=True):
        if size != ONE and count != 1:
            apart += [ONE, size]
            wide += [to.extent(count), size]
        else:
            apart.append(size)
            wide.append(to.extent(count) * size)
    spread = to.reshaped(view, tuple(apart)).expanded(tuple(wide))
    return to.reshaped(spread, to.shape_of(node))


@lowers(aten.roll.default)
def _roll(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, shifts, dims = args[0], args[1], args[2] if len(args) > 2 else []
    if not dims:
        raise to.unsupported(node, "a roll of the flattened tensor; name its dimensions")
    for shift, dim in zip(shifts, dims, strict=True):
        dim = dim_of(dim, len(view.shape))
        size = view.shape[dim].number
        if size is None:
            raise to.free_size(node, "a roll along a free size")
        if size == 0 or shift % size == 0:
            continue
        cut = size - shift % size
        parts = [view.sliced(dim, cut, Extent(size - cut)), view.sliced(dim, 0, Extent(cut))]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            raise to.free_size(node, "a roll across a free stride")
        view = joined(to, node, whole, dim, view.shape, view.dtype)
    return view


@lowers(aten.flip.default)
def _flip(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view, dims = args
    for dim in dims:
        dim = dim_of(dim, len(view.shape))
        size = view.shape[dim].number
        if size is None:
            raise to.free_size(node, "turning a free size around")
        strides = list(view.strides)
        stride = strides[dim].number
        if stride is None:
            raise to.free_size(node, "turning around across a free stride")
        parts = [view.sliced(dim, i, ONE) for i in range(size - 1, -1, -1)]
        view = joined(to, node, [p for p in parts if p is not None], dim, view.shape, view.dtype)
    return view

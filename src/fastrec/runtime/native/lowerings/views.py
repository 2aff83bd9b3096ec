"""Reshapes, transposes, slices, concatenation: views, and copies where elements have to move."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native.buffers import Buffer, Extent, View
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


@lowers(aten.expand.default)
@lowers(aten.expand_as.default)
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
        raise to.unsupported(node, "an index from the end of a free size")
    return _selected(to, view, dim, index if index >= 0 else index + (size or 0))


@lowers(aten.unbind.int)
def _unbind(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view = args[0]
    dim = dim_of(args[1] if len(args) > 1 else 0, len(view.shape))
    size = view.shape[dim].number
    if size is None:
        raise to.unsupported(node, "unbinding a free size")
    return [_selected(to, view, dim, i) for i in range(size)]


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    view = args[0]
    dim = dim_of(args[2] if len(args) > 2 else kwargs.get("dim", 0), len(view.shape))
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
    piece = view.sliced(dim_of(dim, len(view.shape)), start, size)
    if piece is None:
        raise to.unsupported(node, "a slice across a free stride")
    return piece


@lowers(aten.cat.default)
def _cat(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """A buffer whose parts are written by copies; the pass ``write_in_place`` removes them."""
    shape = to.shape_of(node)
    dim = dim_of(args[1] if len(args) > 1 else 0, len(shape))
    whole = Buffer(dtype_of(node), shape).view()
    start = 0
    for part in args[0]:
        size = part.shape[dim].number
        into = whole.sliced(dim, start, part.shape[dim])
        if into is None or size is None:
            raise to.unsupported(node, "concatenation along a free size")
        to.copy_into(part, into)
        start += size
    return whole


@lowers(aten.pad.default, aten.constant_pad_nd.default)
def _pad(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    """A concatenation with constants."""
    view, pads, *rest = args
    mode, value = "constant", rest[0] if rest else 0
    if node.target is aten.pad.default:
        mode, value = [*rest, *("constant", None)[len(rest) :]][:2]
    if mode != "constant" or min(pads) < 0:
        raise to.unsupported(node, "padding by copies or by less; the nearest supported: constants")
    fill = constant(torch.tensor(value or 0, dtype=node.meta["val"].dtype))
    for place in range(0, len(pads), 2):
        dim = len(view.shape) - 1 - place // 2
        before, after = pads[place : place + 2]
        size = view.shape[dim].number
        if before == after == 0:
            continue
        if size is None:
            raise to.unsupported(node, "padding of a free size")

        def shape(of: View, dim: int, size: int) -> tuple[Extent, ...]:
            return (*of.shape[:dim], Extent(size), *of.shape[dim + 1 :])

        whole = Buffer(view.dtype, shape(view, dim, before + size + after)).view()
        parts = [(0, fill.expanded(shape(view, dim, before))), (before, view)]
        parts.append((before + size, fill.expanded(shape(view, dim, after))))
        for start, part in parts:
            into = whole.sliced(dim, start, part.shape[dim])
            if into is None:
                raise to.unsupported(node, "padding across a free stride")
            if part.shape[dim] != Extent(0):
                to.copy_into(part, into)
        view = whole
    return view

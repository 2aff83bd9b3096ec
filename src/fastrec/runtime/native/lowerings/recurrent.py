"""Recurrent layers: a linear layer over all inputs, then one step for the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Extent, View
from fastrec.runtime.native.lowerer import Lowerer
from fastrec.runtime.native.lowerings.views import joined
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten

_CELLS = {
    aten.gru.input: "gru",
    aten.lstm.input: "lstm",
    aten.rnn_tanh.input: "tanh",
    aten.rnn_relu.input: "relu",
}


@lowers(*_CELLS)
def _recurrent(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[View]:
    x, first, weights, has_bias, layers, _, _, both, batch_first = args
    cell = _CELLS[node.target]
    if len(x.shape) != 3:
        raise to.unsupported(node, "a single sequence; the nearest supported is a batch of one")
    if any(w.constant is None for w in weights):
        raise to.unsupported(node, "weights that are computed")
    starts = list(first) if cell == "lstm" else [first]
    directions = 2 if both else 1
    each = 4 if has_bias else 2
    if len(weights) != layers * directions * each:
        raise to.unsupported(node, "a projected hidden state (proj_size)")
    if not batch_first:
        x = x.permuted([1, 0, 2])
    lasts: list[list[View]] = [[] for _ in starts]
    for layer in range(layers):
        results = []
        for direction in range(directions):
            place = layer * directions + direction
            own = weights[place * each : (place + 1) * each]
            states = _one(to, node, cell, x, own, _start(to, node, starts, place), direction == 1)
            size = own[1].shape[1]
            last = 0 if direction else -1
            results.append(_part(to, states, 0, size))
            for s, found in enumerate(lasts):
                found.append(_step(to, node, _part(to, states, s, size), last))
        x = results[0]
        if both:
            width = Extent(2 * results[0].shape[2].coefficient)
            x = joined(to, node, results, 2, (*x.shape[:2], width))
    y = x if batch_first else x.permuted([1, 0, 2])
    stacked = []
    for found in lasts:
        shape = (Extent(len(found)), *found[0].shape)
        rows = [to.reshaped(view, (Extent(1), *view.shape)) for view in found]
        stacked.append(rows[0] if len(rows) == 1 else joined(to, node, rows, 0, shape))
    return [y, *stacked]


def _start(to: Lowerer, node: Node, starts: list[View], place: int) -> View | None:
    """The state at the beginning, [B, S * H]; None for zeros."""
    if all(v.repeated is not None and not v.repeated.any() for v in starts):
        return None
    parts = [v.selected(0, place) for v in starts]
    found = [to.copied(p) if p is not None else p for p in parts]
    if any(v is None for v in found):
        raise to.free_size(node, "the state of one of several layers with a free size")
    views = [v for v in found if v is not None]
    if len(views) == 1:
        return views[0]
    batch, size = views[0].shape
    return joined(to, node, views, 1, (batch, size * Extent(2)))


def _one(
    to: Lowerer,
    node: Node,
    cell: str,
    x: View,
    own: list[View],
    start: View | None,
    backwards: bool,
) -> View:
    """The states of one direction of a layer, [B, L, S * H]."""
    into, weight, *biases = own
    gates, size = weight.shape
    batch, length, _ = x.shape
    bias, own_bias = biases or (None, None)
    rows = to.contiguous(x)
    inputs = to.emit(
        node,
        steps.linear,
        (batch, length, gates),
        x=rows,
        weight=into,
        bias=bias,
        activation="none",
    )
    width = Extent(size.coefficient * (2 if cell == "lstm" else 1))
    return to.emit(
        node,
        steps.recurrent,
        (batch, length, width),
        x=inputs,
        weight=weight,
        bias=own_bias,
        start=start,
        cell=cell,
        backwards=backwards,
    )


def _part(to: Lowerer, states: View, place: int, size: Extent) -> View:
    part = states.sliced(2, place * size.coefficient, size)
    assert part is not None
    return part


def _step(to: Lowerer, node: Node, states: View, step: int) -> View:
    """The state after the first or the last step."""
    length = states.shape[1].number
    if step and length is None:
        raise to.free_size(node, "the state behind a free length")
    found = states.selected(1, 0 if step == 0 else (length or 1) - 1)
    assert found is not None
    return found

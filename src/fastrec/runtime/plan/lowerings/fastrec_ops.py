"""fastrec's own ops: the kernels of ``fastrec.nn``'s layers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.kernels.separable_projection.reference import taps_before
from fastrec.kernels.window_sparse_attention._spec import decode
from fastrec.runtime.plan.ir import ONE, View
from fastrec.runtime.plan.lower import Lowerer, lowers
from fastrec.runtime.plan.lowerings.attention import MOST_DIMS

ops = torch.ops.fastrec


def _weights(to: Lowerer, node: Node, *views: View) -> None:
    if any(v.constant is None or v.dtype != "float32" for v in views):
        raise to.unsupported(
            node, "a weight that is computed; the nearest supported is a parameter"
        )


@lowers(ops.grouped_linear.default)
def _grouped_linear(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, weight, bias, shuffle = [*args, *(None, False)[len(args) - 2 :]][:4]
    biases = [] if bias is None else [bias]
    _weights(to, node, weight, *biases)
    x = to.contiguous(x)
    if weight.shape[0] == ONE:
        # One group is the dense layer, whose weight is packed once.
        inputs = [x, weight.selected(0, 0), *biases]
        return to.emit(node, "linear", inputs, to.shape_of(node), integers=[len(biases), 0])
    return to.emit(
        node,
        "grouped_linear",
        [x, weight, *biases],
        to.shape_of(node),
        integers=[len(biases), int(shuffle)],
    )


@lowers(ops.separable_projection.default)
def _separable(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, depthwise, pointwise, bias, lengths, causal = [
        *args,
        *(None, None, False)[len(args) - 3 :],
    ][:6]
    lengths, causal = kwargs.get("lengths", lengths), kwargs.get("causal", causal)
    biases = [] if bias is None else [bias]
    _weights(to, node, depthwise, pointwise, *biases)
    counts = [] if lengths is None else [to.contiguous(lengths)]
    return to.emit(
        node,
        "separable_projection",
        [to.rows_contiguous(x), depthwise, pointwise, *biases, *counts],
        to.shape_of(node),
        integers=[
            len(biases),
            len(counts),
            taps_before(depthwise.shape[1].coefficient, causal),
        ],
    )


@lowers(ops.window_sparse_attention.default)
def _window_sparse_attention(
    to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]
) -> list[View | None]:
    q, k, v, window, offsets, causal, lengths, cu_seqlens, scale, *_ = args
    if cu_seqlens is not None or len(q.shape) != 4:
        raise to.unsupported(node, "cu_seqlens; the nearest supported is a batch with lengths")
    if any(user.args[1] == 1 and user.users for user in node.users):
        raise to.unsupported(node, "the sums' logarithms; the nearest supported is the result")
    batch, heads, rows, dims = q.shape
    if dims.coefficient > MOST_DIMS:
        raise to.unsupported(node, f"heads above {MOST_DIMS}")
    pattern = decode(window, offsets, causal)
    longest = to.at_most(node, rows)
    lists = [
        pattern.distances(longest, h) for h in range(heads.coefficient if pattern.per_head else 1)
    ]
    counts = [] if lengths is None else [to.contiguous(lengths)]
    # Nothing lies further away than the sequence is long.
    integers = [len(counts), int(causal), min(window, longest), len(lists)]
    for distances in lists:
        integers += [len(distances), *distances]
    out = to.emit(
        node,
        "window_sparse_attention",
        [*(to.rows_contiguous(x) for x in (q, k, v)), *counts],
        (batch, rows, heads, dims),
        integers=integers,
        numbers=[scale],
    )
    return [out.permuted((0, 2, 1, 3)), None]

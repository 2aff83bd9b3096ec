"""fastrec's own ops: the kernels of ``fastrec.nn``'s layers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastrec.kernels import _compiled
from fastrec.kernels.pattern_tables import decoded
from fastrec.kernels.separable_projection.reference import taps_before
from fastrec.kernels.window_sparse_attention._spec import decode
from fastrec.kernels.window_sparse_attention_int8 import MAX_KEYS, exponent_scale_of
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import ONE, View
from fastrec.runtime.native.lowerer import Lowerer
from fastrec.runtime.native.lowerings.attention import MOST_DIMS
from fastrec.runtime.native.registry import lowers

ops = torch.ops.fastrec


def _require_constants(to: Lowerer, node: Node, *weights: View | None) -> None:
    """Refuse weights that are not float32 constants; an absent one is None."""
    if any(v is not None and (v.constant is None or v.dtype != "float32") for v in weights):
        raise to.unsupported(
            node, "a weight that is computed; the nearest supported is a parameter"
        )


@lowers(ops.grouped_linear.default)
def _grouped_linear(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, weight, bias, shuffle = [*args, *(None, False)[len(args) - 2 :]][:4]
    _require_constants(to, node, weight, bias)
    x, shape = to.contiguous(x), to.shape_of(node)
    if weight.shape[0] == ONE:
        # One group is the dense layer, whose weight is packed once.
        dense = weight.selected(0, 0)
        return to.emit(node, steps.linear, shape, x=x, weight=dense, bias=bias, activation="none")
    return to.emit(
        node, steps.grouped_linear, shape, x=x, weight=weight, bias=bias, shuffle=bool(shuffle)
    )


@lowers(ops.separable_projection.default)
def _separable(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, depthwise, pointwise, bias, lengths, causal = [
        *args,
        *(None, None, False)[len(args) - 3 :],
    ][:6]
    lengths, causal = kwargs.get("lengths", lengths), kwargs.get("causal", causal)
    _require_constants(to, node, depthwise, pointwise, bias)
    return to.emit(
        node,
        steps.separable_projection,
        to.shape_of(node),
        x=to.rows_contiguous(x),
        depthwise=depthwise,
        pointwise=pointwise,
        bias=bias,
        lengths=None if lengths is None else to.contiguous(lengths),
        before=taps_before(depthwise.shape[1].coefficient, causal),
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
    out = to.emit(
        node,
        steps.window_sparse_attention,
        (batch, rows, heads, dims),
        q=to.rows_contiguous(q),
        k=to.rows_contiguous(k),
        v=to.rows_contiguous(v),
        lengths=None if lengths is None else to.contiguous(lengths),
        scale=scale,
        causal=bool(causal),
        # Nothing lies further away than the sequence is long.
        window=min(window, longest),
        distances=lists,
    )
    return [out.permuted((0, 2, 1, 3)), None]


@lowers(ops.pointwise_attention.default)
def _pointwise_attention(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    q, k, v, position, time, edges, times, query_times, lengths, cu_seqlens, targets = args[:11]
    scale, norm, causal = args[11:14]
    if cu_seqlens is not None or len(q.shape) != 4:
        raise to.unsupported(node, "cu_seqlens; the nearest supported is a batch with lengths")
    _require_constants(to, node, position, time)
    if edges is not None and edges.constant is None:
        raise to.unsupported(node, "edges that are computed; the nearest supported is a buffer")
    batch, heads, rows, _ = q.shape
    numbers = (times, query_times, lengths, targets)
    times, query_times, lengths, targets = (
        None if x is None else to.contiguous(x) for x in numbers
    )
    out = to.emit(
        node,
        steps.pointwise_attention,
        (batch, rows, heads, v.shape[3]),
        q=to.rows_contiguous(q),
        k=to.rows_contiguous(k),
        v=to.rows_contiguous(v),
        position=position,
        time=time,
        edges=edges,
        times=times,
        query_times=query_times,
        lengths=lengths,
        targets=targets,
        scale=scale,
        norm=0.0 if norm is None else norm,
        causal=bool(causal),
    )
    return out.permuted((0, 2, 1, 3))


@lowers(ops.window_sparse_attention_int8.default)
def _window_sparse_attention_int8(
    to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]
) -> View:
    q, k, v, text, q_scale, k_scale, q_zero_point = args
    if kwargs.get("cu_seqlens") is not None or len(q.shape) != 4:
        raise to.unsupported(node, "cu_seqlens; the nearest supported is a batch with lengths")
    if kwargs.get("v_scale") is not None:
        raise to.unsupported(node, "a v_scale a head; the nearest supported is one number")
    batch, heads, rows, dims = q.shape
    pattern = decoded(text)
    # The window that stands for all keys: a part of the queries then sees them all too.
    everything = _compiled.native().engine.EVERYTHING
    keys = longest = to.at_most(node, k.shape[2])
    if pattern.window < everything:
        longest = max(to.at_most(node, rows), keys)
    lists = [
        pattern.distances(longest, h) for h in range(heads.coefficient if pattern.per_head else 1)
    ]
    window = everything if pattern.window >= longest else pattern.window
    if min(keys, 2 * window + 1) + 2 * max(map(len, lists)) > MAX_KEYS:
        raise to.unsupported(node, f"more than {MAX_KEYS} keys a query")
    lengths = kwargs.get("lengths")
    y_scale = kwargs.get("out_scale")
    scale = kwargs.get("scale")
    scale = dims.coefficient**-0.5 if scale is None else scale
    out = to.emit(
        node,
        steps.window_sparse_attention_int8,
        (batch, rows, heads, dims),
        "float32" if y_scale is None else "uint8",
        q=to.rows_contiguous(q),
        k=to.rows_contiguous(k),
        v=to.rows_contiguous(v),
        lengths=None if lengths is None else to.contiguous(lengths),
        exponent_scale=exponent_scale_of(q_scale, k_scale, scale),
        v_scale=kwargs.get("value_scale") or 0.0,
        y_scale=y_scale or 1.0,
        q_zero_point=q_zero_point,
        y_zero_point=kwargs.get("out_zero_point") or 0,
        causal=bool(pattern.causal),
        window=window,
        distances=lists,
    )
    return out.permuted((0, 2, 1, 3))


@lowers(ops.activation_quantize.default)
def _activation_quantize(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    names = ("activation", "scale", "bias", "out", "out_scale", "out_zero_point")
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    x = to.contiguous(args[0])
    plain = all(given.get(name) is None for name in ("activation", "scale", "bias"))
    if not plain or given.get("out") != "uint8" or x.dtype != "float32":
        raise to.unsupported(node, "the supported form is float32 to uint8 alone")
    return to.emit(
        node,
        steps.quantize,
        to.shape_of(node),
        "uint8",
        x=x,
        scale=given["out_scale"],
        zero_point=given.get("out_zero_point") or 0,
    )

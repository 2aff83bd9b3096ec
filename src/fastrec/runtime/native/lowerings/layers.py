"""Embeddings, LayerNorm, linear layers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.fx import Node

from fastrec.kernels.sparse_int8_linear.packed import PackedWeight
from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import View
from fastrec.runtime.native.lowerer import Lowerer, constant, dtype_of
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten


@lowers(torch.ops.fastrec.int8_embedding.default)
def _int8_embedding(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    ids, table, scale = args
    ids = to.contiguous(to.cast(node, ids, "int64"))
    return to.emit(node, steps.gather, to.shape_of(node), ids=ids, table=table, scale=scale)


@lowers(aten.layer_norm.default)
def _layer_norm(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, shape, weight, bias, eps = [*args[:5], *(None, None, 1e-5)[len(args) - 2 :]][:5]
    if len(shape) != 1:
        raise to.unsupported(node, "more than one normalised dimension")
    if weight is None:
        weight = constant(torch.ones(shape))
    if bias is None:
        bias = constant(torch.zeros(shape))
    return to.emit(
        node,
        steps.layer_norm,
        to.shape_of(node),
        x=to.contiguous(x),
        weight=weight,
        bias=bias,
        eps=eps,
        y_scale=1.0,
        y_zero_point=0,
        y_tiles=False,
    )


@lowers(aten.linear.default)
def _linear(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, weight, bias = [*args, None][:3]
    if x.shape[-1].number == 0:
        # Without inputs, the result is the bias.
        fill = constant(torch.zeros(weight.shape[0].coefficient)) if bias is None else bias
        return fill.expanded(to.shape_of(node))
    if weight.constant is None:
        raise to.unsupported(
            node, "a weight that is computed; the nearest supported is a parameter"
        )
    x, order = _rows_as_they_lie(to, x)
    shape = (*x.shape[:-1], weight.shape[0])
    y = to.emit(node, steps.linear, shape, x=x, weight=weight, bias=bias, activation="none")
    return y.permuted(order)


def _rows_as_they_lie(to: Lowerer, x: View) -> tuple[View, list[int]]:
    """x made contiguous, by reordering its leading dimensions where that avoids a copy.

    Returns:
        the view, and the order of dimensions that restores x's own.
    """
    last = len(x.shape) - 1
    for order in itertools.permutations(range(min(last, 4))):
        dims = [*order, *range(len(order), last + 1)]
        if (moved := x.permuted(dims)).is_contiguous:
            return moved, [dims.index(d) for d in range(last + 1)]
    return to.contiguous(x), list(range(last + 1))


@lowers(torch.ops.fastrec.sparse_int8_linear.default)
def _linear_int8(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, values, group_index, panel_start, w_scale, bias, x_scale, x_zero, activation, *y = args
    y_scale, y_zero = y
    outputs, inputs = len(w_scale.constant), x.shape[-1].coefficient
    parts = [torch.from_numpy(v.constant) for v in (values, group_index, panel_start, w_scale)]
    packed = PackedWeight.from_parts(*parts, outputs, inputs)  # type: ignore[call-arg]
    sums = packed.unpack().to(torch.int32).sum(1, dtype=torch.int32)
    return to.emit(
        node,
        steps.linear_int8,
        to.shape_of(node),
        dtype_of(node),
        x=to.contiguous(x),
        values=values,
        group_index=group_index,
        panel_start=panel_start,
        w_scale=w_scale,
        w_sum=constant(sums),
        bias=bias,
        outputs=outputs,
        inputs=inputs,
        x_scale=float(x_scale.constant),
        x_zero_point=int(x_zero.constant),
        activation=activation or "none",
        y_scale=1.0 if y_scale is None else float(y_scale.constant),
        y_zero_point=0 if y_zero is None else int(y_zero.constant),
        x_tiles=False,
        y_tiles=False,
    )

"""Convolutions and pooling over windows of a padded tensor, and batch norm.

A window is a view with overlapping strides: a convolution copies it into rows, and is a linear
layer over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import ONE, Extent, Shape, View, product
from fastrec.runtime.native.lowerer import Lowerer, constant
from fastrec.runtime.native.lowerings.reductions import reduced
from fastrec.runtime.native.lowerings.views import joined, padded
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten
# csrc/cpu/grouped_linear/grouped_linear.h: kLine; csrc/cpu/engine/steps/packed_linear.cpp:
# kFewOutputs, which dot products are faster for.
LINE, FEW_OUTPUTS = 16, 4


def _spread(values: Sequence[int] | int, count: int) -> list[int]:
    given = [values] if isinstance(values, int) else list(values)
    return given * count if len(given) == 1 else given


def _windows(
    to: Lowerer,
    node: Node,
    view: View,
    first: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[View, Shape]:
    """Windows over the dimensions from ``first`` on: [.., positions.., window.., rest..].

    Returns:
        the view, and how many positions there are.
    """
    view = to.contiguous(view)
    count = len(kernel)
    positions, place, inside = [], [], []
    for d in range(count):
        size = view.shape[first + d].number
        if size is None:
            raise to.free_size(node, "windows over a free size")
        reach = dilation[d] * (kernel[d] - 1) + 1
        if size < reach:
            raise to.unsupported(node, "a window larger than what it slides over")
        positions.append(Extent((size - reach) // stride[d] + 1))
        place.append(view.strides[first + d] * Extent(stride[d]))
        inside.append(view.strides[first + d] * Extent(dilation[d]))
    rest = first + count
    sizes = (*view.shape[:first], *positions, *map(Extent, kernel), *view.shape[rest:])
    strides = (*view.strides[:first], *place, *inside, *view.strides[rest:])
    return View(view.buffer, sizes, strides, view.offset), tuple(positions)


def _as_they_lie(windows: View, kernel: Sequence[int]) -> View | None:
    """Windows [B, positions.., kernel.., C] as [B, positions, parts, floats of a part], as
    ``window_linear`` reads them; None where its parts would not be such."""
    batch, *positions = windows.shape[: -1 - len(kernel)]
    for parts in range(len(kernel) + 1):
        width = product(windows.shape[len(windows.shape) - 1 - len(kernel) + parts :])
        shape = (batch, product(positions), Extent(math.prod(kernel[:parts])), width)
        found = windows.reshaped(shape)
        if found is not None and found.strides[-1] == ONE and width.coefficient % LINE == 0:
            return found
    return None


@lowers(aten.convolution.default)
def _convolution(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    values = weight.constant
    if transposed or values is None:
        raise to.unsupported(node, "a transposed convolution, or a weight that is computed")
    outputs, inputs, *kernel = values.shape
    dims = len(kernel)
    stride, padding, dilation = (_spread(v, dims) for v in (stride, padding, dilation))
    # Channels last, so that a window's elements are rows of channels.
    x = x.permuted([0, *range(2, 2 + dims), 1])
    if any(padding):
        pads = [0, 0, *(p for size in reversed(padding) for p in (size, size))]
        x = padded(to, node, x, pads, 0.0)
    lead: Shape
    if all(k == 1 for k in kernel) and all(s == 1 for s in stride):
        rows, lead = x, x.shape[:-1]
    else:
        windows, positions = _windows(to, node, x, 1, kernel, stride, dilation)
        lead = (x.shape[0], *positions)
        rows = windows
    columns = np.moveaxis(values, 1, -1)  # [outputs, window.., inputs of a group]
    results = []
    for g in range(groups):
        part = rows.sliced(len(rows.shape) - 1, g * inputs, Extent(inputs))
        assert part is not None
        width = int(np.prod(columns.shape[1:]))
        own = slice(g * (outputs // groups), (g + 1) * (outputs // groups))
        matrix = np.ascontiguousarray(columns[own].reshape(outputs // groups, width))
        add = None
        if bias is not None:
            add = constant(torch.from_numpy(np.ascontiguousarray(bias.constant[own])))
        count = Extent(outputs // groups)
        named = {
            "weight": constant(torch.from_numpy(matrix)),
            "bias": add,
            "activation": "none",
        }
        apart = _as_they_lie(part, kernel) if rows is not x else None
        if apart is not None and count.coefficient > FEW_OUTPUTS:
            shape = (*apart.shape[:2], count)
            found = to.emit(node, steps.window_linear, shape, x=apart, **named)
            results.append(to.reshaped(found, (*lead, count)))
        else:
            x_rows = to.contiguous(to.reshaped(to.contiguous(part), (*lead, Extent(width))))
            results.append(to.emit(node, steps.linear, (*lead, count), x=x_rows, **named))
    y = results[0]
    if groups > 1:
        y = joined(to, node, results, len(lead), (*lead, Extent(outputs)))
    return y.permuted([0, dims + 1, *range(1, dims + 1)])


@lowers(aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten.avg_pool1d.default)
def _pool(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    maximum = node.target is aten.max_pool2d_with_indices.default
    x, kernel, *given = args
    dims = 1 if node.target is aten.avg_pool1d.default else 2
    kernel = _spread(kernel, dims)
    stride = _spread(given[0], dims) if given and given[0] else kernel
    padding = _spread(given[1] if len(given) > 1 else 0, dims)
    dilation = _spread(given[2] if maximum and len(given) > 2 else 1, dims)
    rest = given[3:] if maximum else given[2:]
    if any(padding) and not maximum and (len(rest) > 1 and not rest[1]):
        raise to.unsupported(node, "an average that leaves padding out")
    if rest and rest[0]:
        raise to.unsupported(node, "pooling with ceil_mode; the nearest supported is without")
    if any(padding):
        pads = [p for size in reversed(padding) for p in (size, size)]
        x = padded(to, node, x, pads, float("-inf") if maximum else 0.0)
    first = len(x.shape) - dims
    windows, positions = _windows(to, node, x, first, kernel, stride, dilation)
    own = list(range(first + dims, first + 2 * dims))
    found = reduced(to, node, windows, own, "max" if maximum else "mean")
    found = to.reshaped(found, (*x.shape[:first], *positions))
    return [found, None] if maximum else found


@lowers(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """A scale and a shift a channel."""
    x, weight, bias, mean, variance, _, eps = args
    if any(v is not None and v.constant is None for v in (weight, bias, mean, variance)):
        raise to.unsupported(node, "statistics that are computed")
    scale = 1.0 / np.sqrt(variance.constant.astype(np.float64) + eps)
    if weight is not None:
        scale = scale * weight.constant
    shift = -mean.constant * scale
    if bias is not None:
        shift = shift + bias.constant
    channels = (1, -1, *[1] * (len(x.shape) - 2))
    operands = [constant(torch.from_numpy(v).float().reshape(channels)) for v in (scale, shift)]
    program = [("mul_f32", 0, 1), ("add_f32", 3, 2)]
    return [to.map(node, [x, *operands], program, x.shape), None, None]

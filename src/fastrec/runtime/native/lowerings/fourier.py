"""Fourier transforms of real tensors as products with constant matrices; complex tensors are pairs
of float ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import Extent, View
from fastrec.runtime.native.lowerer import Complex, Lowerer, constant
from fastrec.runtime.native.lowerings.views import dim_of, joined
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten


@lowers(aten.view_as_complex.default)
def _as_complex(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Complex:
    (view,) = args
    parts = [view.selected(len(view.shape) - 1, i) for i in (0, 1)]
    return Complex(*parts)


@lowers(aten.view_as_real.default)
def _as_real(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    shape = to.shape_of(node)
    parts = [to.reshaped(part, (*shape[:-1], Extent(1))) for part in args[0]]
    return joined(to, node, parts, len(shape) - 1, shape)


@lowers(aten.real.default)
def _real(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view: View = args[0].real
    return view


@lowers(aten.imag.default)
def _imag(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    view: View = args[0].imag
    return view


def _factor(size: int, norm: int) -> float:
    """torch's normalisation: 0 none, 1 by the root of the size, 2 by the size."""
    return (1.0, size**-0.5, 1.0 / size)[norm]


def _along(to: Lowerer, node: Node, view: View, dim: int, matrix: np.ndarray) -> View:
    """The view with ``matrix`` [outputs, size] applied to a dimension."""
    order = [d for d in range(len(view.shape)) if d != dim] + [dim]
    x = to.contiguous(view.permuted(order))
    shape = (*x.shape[:-1], Extent(len(matrix)))
    weight = constant(torch.from_numpy(np.ascontiguousarray(matrix, np.float32)))
    y = to.emit(node, steps.linear, shape, x=x, weight=weight, bias=None, activation="none")
    return y.permuted([order.index(d) for d in range(len(order))])


def _one_dim(to: Lowerer, node: Node, dims: list[int], rank: int) -> int:
    if len(dims) != 1:
        raise to.unsupported(node, "a transform of several dimensions; one is supported")
    return dim_of(dims[0], rank)


@lowers(aten._fft_r2c.default)
def _forwards(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Complex:
    view, dims, norm, onesided = args
    dim = _one_dim(to, node, dims, len(view.shape))
    size = view.shape[dim].number
    if size is None:
        raise to.free_size(node, "a Fourier transform of a free size")
    count = size // 2 + 1 if onesided else size
    angle = 2 * np.pi * np.outer(np.arange(count), np.arange(size)) / size
    factor = _factor(size, norm)
    return Complex(
        _along(to, node, view, dim, factor * np.cos(angle)),
        _along(to, node, view, dim, -factor * np.sin(angle)),
    )


@lowers(aten._fft_c2r.default)
def _backwards(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    value, dims, norm, size = args
    rank = len(value.real.shape)
    dim = _one_dim(to, node, dims, rank)
    count = value.real.shape[dim].number
    if count is None or not isinstance(size, int):
        raise to.free_size(node, "a Fourier transform of a free size")
    if count != size // 2 + 1:
        raise to.unsupported(node, "a transform to another size than it came from")
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(count)) / size
    # All frequencies but the first, and of an even size the last, stand for two.
    weight = np.full(count, 2.0)
    weight[0] = 1.0
    if size % 2 == 0:
        weight[-1] = 1.0
    weight *= _factor(size, norm)
    real = _along(to, node, value.real, dim, weight * np.cos(angle))
    imag = _along(to, node, value.imag, dim, -weight * np.sin(angle))
    return to.map(node, [real, imag], [("add_f32", 0, 1)], to.shape_of(node))

"""Products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import ONE, Extent, View
from fastrec.runtime.native.lowerer import Lowerer, constant
from fastrec.runtime.native.lowerings.sdpa_pattern import attention_of
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten


@lowers(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    a, b = args[:2]
    if any(x.dtype != "float32" for x in (a, b)):
        raise to.unsupported(node, "a product of other dtypes than float32; cast it first")
    shape = to.shape_of(node)
    if (
        len(b.shape) == 2
        and b.constant is not None
        and len(a.shape) > 1
        and a.shape[-1] != Extent(0)
    ):
        # A linear layer, written otherwise: its weight is packed once.
        weight = constant(torch.from_numpy(np.ascontiguousarray(b.constant.T)))
        x = to.contiguous(a)
        return to.emit(node, steps.linear, shape, x=x, weight=weight, activation="none")
    if len(a.shape) > 2 and (attention := attention_of(to, node, a, b)) is not None:
        return attention
    vector_a, vector_b = len(a.shape) == 1, len(b.shape) == 1
    if vector_a:
        a = to.reshaped(a, (ONE, *a.shape))
    if vector_b:
        b = to.reshaped(b, (*b.shape, ONE))
    rank = max(len(a.shape), len(b.shape))
    result = list(shape)
    if vector_a:
        result.insert(len(shape) - (not vector_b), ONE)
    if vector_b:
        result.append(ONE)
    lead = tuple(result[: rank - 2])
    a = to.rows_contiguous(a).expanded((*lead, *a.shape[-2:]))
    matrix = b.shape[-2:]
    by_columns = b.permuted([*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2])
    columns = not _matrices_lie(b) and _matrices_lie(by_columns)
    if not columns and not _matrices_lie(b):
        b = to.copied(b)
    b = b.expanded((*lead, *matrix))
    out = to.emit(node, steps.matmul, tuple(result), a=a, b=b, transposed=columns)
    return to.reshaped(out, shape)


def _matrices_lie(view: View) -> bool:
    """Whether each matrix is contiguous by rows."""
    rows, columns = view.shape[-2:]
    return (view.strides[-1] == ONE or columns == ONE) and (
        view.strides[-2] == columns or rows == ONE
    )

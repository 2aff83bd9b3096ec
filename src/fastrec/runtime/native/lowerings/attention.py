"""Attention: chooses the step by the kind of mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import ONE, Buffer, Extent, View
from fastrec.runtime.native.lowerer import Lowerer
from fastrec.runtime.native.registry import lowers

aten = torch.ops.aten
MOST_DIMS = 256  # csrc/cpu/window_sparse_attention: kMaxDims


@lowers(aten.scaled_dot_product_attention.default)
def _attention(to: Lowerer, node: Node, args: list[Any], kwargs: dict[str, Any]) -> View:
    q, k, v, mask, dropout, causal = [*args, *(None, 0.0, False)[len(args) - 3 :]][:6]
    if dropout:
        raise to.unsupported(node, "attention with dropout; the nearest supported is without")
    if kwargs.get("enable_gqa"):
        raise to.unsupported(node, "grouped queries; the nearest supported is as many keys' heads")
    without_heads = all(len(x.shape) == 3 for x in (q, k, v))
    if without_heads:  # [B, L, D] is one head
        q, k, v = (to.reshaped(x, (x.shape[0], ONE, *x.shape[1:])) for x in (q, k, v))
        if mask is not None and len(mask.shape) == 3:
            mask = to.reshaped(mask, (mask.shape[0], ONE, *mask.shape[1:]))
    if any(x.dtype != "float32" or len(x.shape) != 4 for x in (q, k, v)):
        raise to.unsupported(node, "the supported form is float32 [B, H, L, D]")
    if v.shape[3] != q.shape[3] or k.shape[:2] != q.shape[:2] or v.shape[:2] != q.shape[:2]:
        raise to.unsupported(node, "the supported form has one head size and batch for q, k and v")
    lengths = None
    if mask is not None:
        if _is_causal(mask):
            mask, causal = None, True
        else:
            lengths = padding_lengths(to, mask, k.shape[2])
    q, k, v = (to.rows_contiguous(x) for x in (q, k, v))
    batch, heads, queries, dims = q.shape
    shape = (batch, queries, heads, dims)
    scale = kwargs.get("scale")
    scale = float(dims.coefficient) ** -0.5 if scale is None else scale
    if causal or (mask is not None and lengths is None):
        # The window-sparse kernel has as many queries as keys.
        if mask is None and queries == k.shape[2] and dims.coefficient <= MOST_DIMS:
            out = to.emit(node, steps.causal_attention, shape, q=q, k=k, v=v, scale=scale)
        else:
            out = to.emit(
                node,
                steps.masked_attention,
                shape,
                q=q,
                k=k,
                v=v,
                mask=None if mask is None else _added(to, node, _uncopied(to, mask), q, k),
                scale=scale,
                causal=bool(causal),
                caps=False,
                empty_is_nan=False,
            )
    else:
        out = to.emit(node, steps.attention, shape, q=q, k=k, v=v, lengths=lengths, scale=scale)
    found = out.permuted((0, 2, 1, 3))
    return to.reshaped(found, to.shape_of(node)) if without_heads else found


def _is_causal(mask: View) -> bool:
    """Whether a mask is a square constant that lets query i see keys 0..i."""
    values = mask.repeated
    if values is None or values.ndim < 2 or any(size.number is None for size in mask.shape[-2:]):
        return False
    if values.shape[-1] != values.shape[-2]:
        return False
    if any(size != 1 for size in values.shape[:-2]):
        return False
    values = values.reshape(values.shape[-2:])
    seen = np.tri(len(values), dtype=bool)
    wanted = seen if mask.dtype == "bool" else np.where(seen, np.float32(0), np.float32("-inf"))
    return bool(np.array_equal(values, wanted))


def _uncopied(to: Lowerer, mask: View) -> View:
    """The mask before copies that repeat it for heads and queries, as nn.MultiheadAttention makes
    them: the kernel skips keys that a mask of the keys alone hides."""
    made = to.writers()
    while (step := made.get(mask.buffer)) is not None:
        whole = mask.offset == 0 and mask.is_contiguous and mask.shape == step.y.shape
        if not step.is_copy or not whole:
            return mask
        (mask,) = step.x
    return mask


def _added(to: Lowerer, node: Node, mask: View, q: View, k: View) -> View:
    """The mask as floats to add to the scores, [B, H, Lq, Lk], its rows contiguous."""
    shape = (*q.shape[:3], k.shape[2])
    # Dimensions that are broadcast stay so: their stride is 0.
    own = mask.expanded(shape)
    for dim in range(3):
        if own.strides[dim] == Extent(0):
            own = own.sliced(dim, 0, ONE) or own
    if own.dtype == "bool":
        program = [("number", 0.0), ("number", float("-inf")), ("where_f32", 0, 1, 2)]
        own = to.map(node, [own], program, own.shape)
    elif own.dtype != "float32":
        raise to.unsupported(node, f"a mask of {own.dtype}; float32 and bool are supported")
    return to.rows_contiguous(own).expanded(shape)


def padding_lengths(to: Lowerer, mask: View, keys: Extent) -> View | None:
    """Lengths int64 [B] of a mask that adds 0 before them and a large negative number beyond.

    Recognised: (length - (1, 2, .. L) < 0) * -C, C >= 10,000, broadcast over heads and queries.
    """
    made = to.writers()
    if any(s != ONE for s in mask.shape[1:3]):
        return None
    product_ = made.get(mask.buffer)
    if product_ is None or product_.kind != "map":
        return None
    if [name for name, *_ in product_.program] != ["number", "mul_f32"]:
        return None
    if product_.program[0][1] > -1e4:
        return None
    cast = made.get(product_.x[0].buffer)
    if cast is None or not cast.computes(("to_f32", 0)):
        return None
    less = made.get(cast.x[0].buffer)
    if less is None or not less.computes(("integer", 0), ("lt_i64", 0, 1)):
        return None
    age = made.get(less.x[0].buffer)
    if age is None or not age.computes(("sub_i64", 0, 1)):
        return None
    length, positions = age.x
    if length.strides[1] != Extent(0) or not _counts_from_one(made, positions, keys):
        return None
    return length.selected(1, 0)


def _counts_from_one(made: dict[Buffer, Any], positions: View, keys: Extent) -> bool:
    if positions.repeated is not None:
        row = positions.repeated[0]
        return keys.number == len(row) and bool(np.array_equal(row, np.arange(1, len(row) + 1)))
    step = made.get(positions.buffer)
    if step is None or not step.computes(("index", 0), ("integer", 1), ("add_i64", 0, 1)):
        return False
    return positions.shape[-1] == keys

"""Attention written as products and a softmax: ``softmax(q @ k^T * scale + mask) @ v``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fastrec.runtime.native import steps
from fastrec.runtime.native.buffers import ONE, Buffer, Extent, Shape, View
from fastrec.runtime.native.lowerer import Lowerer, constant
from fastrec.runtime.native.lowerings.attention import MOST_DIMS
from fastrec.runtime.native.steps import Instruction, Step

_INFINITY = float("inf")
# A score replaced by a number up to this one hides its key.
_HIDDEN = -1e4


@dataclass
class Fill:
    """Scores replaced by a number where a condition holds, or does not."""

    condition: View
    value: float
    where: bool


@dataclass
class Scores:
    """The scores inside a softmax: q @ k^T * scale, with masks."""

    q: View
    k: View
    scale: float = 1.0
    fills: list[Fill] = field(default_factory=list)
    added: list[View] = field(default_factory=list)


def attention_of(to: Lowerer, node: Node, weights: View, v: View) -> View | None:
    """Lower the product of a softmax with values to one attention step.

    The steps that it replaces stay, for other readers.

    Args:
        to, node: the lowerer, and the product's node.
        weights, v: its operands.

    Returns:
        the result, or None where the product is not an attention.
    """
    made = to.writers()
    softmax = made.get(weights.buffer)
    if softmax is None or softmax.kind != "softmax" or not _is_all(weights, softmax):
        return None
    scores = _scores(made, softmax.x)
    if scores is None or len(v.shape) != len(scores.q.shape) or (scores.fills and scores.added):
        return None
    q, k, v = (_with_heads(x) for x in (scores.q, scores.k, _uncopied(made, v)))
    batch, heads, rows, dims = q.shape
    keys = k.shape[2]
    if k.shape != (batch, heads, keys, dims) or v.shape != k.shape or not dims.number:
        return None
    operands: dict[str, Any] = {
        "q": to.rows_contiguous(q),
        "k": to.rows_contiguous(k),
        "v": to.rows_contiguous(v),
        "scale": scores.scale,
    }
    shape, result = (batch, heads, rows, keys), (batch, rows, heads, dims)
    if rows == keys and dims.number <= MOST_DIMS and _is_causal(scores):
        out = to.emit(node, steps.causal_attention, result, **operands)
    elif scores.fills or scores.added:
        masks = [_cap(to, node, fill, shape) for fill in scores.fills]
        masks += [_own(_with_heads(view), shape) for view in scores.added]
        mask = masks[0]
        for other in masks[1:]:
            combine = "min_f32" if scores.fills else "add_f32"
            larger = tuple(
                b if a == ONE else a for a, b in zip(mask.shape, other.shape, strict=True)
            )
            mask = to.map(node, [mask, other], [(combine, 0, 1)], larger)
        if mask.shape[3] != keys:
            mask = to.copied(mask.expanded((*mask.shape[:3], keys)))
        out = to.emit(
            node,
            steps.masked_attention,
            result,
            **operands,
            mask=to.rows_contiguous(mask).expanded(shape),
            causal=False,
            caps=bool(scores.fills),
            # A softmax of nothing but -inf is NaN.
            empty_is_nan=True,
        )
    else:
        out = to.emit(node, steps.attention, result, **operands)
    out = out.permuted((0, 2, 1, 3))
    return out if len(weights.shape) == 4 else out.selected(1, 0)


def _scores(made: dict[Buffer, Step], view: View) -> Scores | None:
    """The parts of the scores, found backwards from the softmax; None where there are others."""
    step = made.get(view.buffer)
    if step is None or not _is_all(view, step):
        return None
    if step.kind == "matmul":
        a, b = step.a, step.b
        # Before the copy that the product asks for.
        b = _uncopied(made, b)
        rank = len(a.shape)
        k = b.permuted([*range(rank - 2), rank - 1, rank - 2])
        return Scores(a, k) if rank in (3, 4) else None
    if step.kind != "map":
        return None
    if (scaled := _scaled(step)) is not None:
        found = _scores(made, step.x[0])
        if found is None or found.fills or found.added:
            return None
        found.scale *= scaled
        return found
    if (fill := _filled(step)) is not None:
        found = _scores(made, step.x[1])
        if found is not None:
            found.fills.append(fill)
        return found
    if step.computes(("add_f32", 0, 1)):
        for inner, mask in (step.x, step.x[::-1]):
            if (found := _scores(made, inner)) is not None:
                found.added.append(mask)
                return found
    return None


def _scaled(step: Step) -> float | None:
    """The factor of a map that multiplies by a number or divides by one."""
    *before, last = step.program or [("",)]
    if last[1:] != (0, 1) or last[0] not in ("mul_f32", "div_f32"):
        return None
    number = None
    if len(step.x) == 1:
        number = _number(before)
    elif len(step.x) == 2 and not before:
        number = _single(step.x[1])
    if not number:
        return None
    return number if last[0] == "mul_f32" else 1.0 / number


def _single(view: View) -> float | None:
    """The value of a constant that holds one float."""
    data = view.buffer.data
    return float(data.item()) if data is not None and data.size == 1 else None


def _filled(step: Step) -> Fill | None:
    """A map that replaces its second input by a large negative number where its first says so."""
    *before, last = step.program or [("",)]
    if last[0] != "where_f32" or last[1] != 0 or sorted(last[2:]) != [1, 2]:
        return None
    value = _number(before) if len(step.x) == 2 else None
    if value is None or value > _HIDDEN or step.x[0].dtype != "bool":
        return None
    return Fill(step.x[0], value, last[2] == 2)


def _number(program: list[Instruction]) -> float | None:
    """The number of a program that is one number, else None."""
    if len(program) != 1:
        return None
    name, *operands = program[0]
    return float(operands[0]) if name == "number" else None


def _is_all(view: View, step: Step) -> bool:
    """Whether a view is a step's whole result."""
    whole = view.offset == 0 and view.is_contiguous
    return whole and view.shape == step.y.shape == view.buffer.shape


def _uncopied(made: dict[Buffer, Step], view: View) -> View:
    step = made.get(view.buffer)
    if step is None or not step.is_copy or not _is_all(view, step):
        return view
    (source,) = step.x
    return source if source.dtype == view.dtype else view


def _with_heads(view: View) -> View:
    """[B, L, D] as [B, 1, L, D]."""
    if len(view.shape) == 4:
        return view
    shape, strides = view.shape, view.strides
    return View(
        view.buffer, (shape[0], ONE, *shape[1:]), (strides[0], ONE, *strides[1:]), view.offset
    )


def _own(view: View, shape: Shape) -> View:
    """The view with dimensions that are broadcast (stride 0) reduced to size 1."""
    own = view.expanded(shape)
    for dim in range(4):
        if own.strides[dim] == Extent(0):
            own = own.sliced(dim, 0, ONE) or own
    return own


def _is_causal(scores: Scores) -> bool:
    if scores.added or len(scores.fills) != 1:
        return False
    (fill,) = scores.fills
    condition = fill.condition.repeated
    if condition is None or any(size.number is None for size in fill.condition.shape[-2:]):
        return False
    seen = np.asarray(condition != fill.where)
    return bool((seen == (np.tri(*seen.shape[-2:]) > 0)).all())


def _cap(to: Lowerer, node: Node, fill: Fill, shape: Shape) -> View:
    """Upper bounds of the scores: the number where they are replaced, else infinity."""
    condition = _own(_with_heads(fill.condition), shape)
    values = (fill.value, _INFINITY) if fill.where else (_INFINITY, fill.value)
    if condition.constant is not None:
        data = np.where(condition.constant, *map(np.float32, values))
        return constant(torch.from_numpy(np.ascontiguousarray(data)))
    program = [("number", values[0]), ("number", values[1]), ("where_f32", 0, 1, 2)]
    return to.map(node, [condition], program, condition.shape)

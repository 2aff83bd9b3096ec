"""Copies that reshapes of transposed tensors ask for, and that nobody needs: what reads the copy
reads the original instead. ``nn.MultiheadAttention`` puts the sequence first, say, and back."""

from __future__ import annotations

import itertools
from collections import Counter

from fastrec.runtime.native.ir import (
    ONE,
    Buffer,
    Extent,
    Plan,
    Step,
    View,
    contiguous_strides,
    product,
)

# Kinds whose first operands need contiguous rows only: their strides are the kernels' own.
_STRIDED = {
    "attention": 3,
    "causal_attention": 3,
    "masked_attention": 4,
    "separable_projection": 1,
    "window_sparse_attention": 3,
    "window_sparse_attention_int8": 3,
}


def remove_copies(plan: Plan) -> None:
    """Let steps read originals; the copies that nobody reads any more are left to remove_unused."""
    _swap_with_linears(plan)
    for copy in plan.steps:
        if _is_copy(copy) and copy.output.buffer is not plan.output.buffer:
            _read_through(plan, copy)


def _is_copy(step: Step) -> bool:
    """A map that copies into the whole of a buffer in order, and changes nothing."""
    if step.kind != "map" or step.program or step.inputs[0].dtype != step.output.dtype:
        return False
    return _whole(step.output)


def _whole(view: View) -> bool:
    return view.offset == 0 and view.shape == view.buffer.shape and view.is_contiguous


def _read_through(plan: Plan, copy: Step) -> None:
    source, buffer = copy.inputs[0], copy.output.buffer
    for reader in dict.fromkeys(plan.readers().get(buffer, [])):
        for position, view in enumerate(reader.inputs):
            if view.buffer is not buffer:
                continue
            found = through(view, source)
            if found is not None and accepts(reader, position, found):
                reader.inputs[position] = found


def accepts(step: Step, position: int, view: View) -> bool:
    """Whether the kernel of a step can read an operand with such strides."""
    if step.kind == "map":
        return True
    if position < _STRIDED.get(step.kind, 0):
        return view.strides[-1] == ONE or view.shape[-1] == ONE
    return view.is_contiguous


def through(read: View, source: View) -> View | None:
    """What a view of a contiguous copy of ``source`` sees, as a view of source's buffer.

    Each dimension of ``read`` has to lie within one of the source's; None where it does not.
    """
    strides = contiguous_strides(source.shape)
    dims = [d for d, size in enumerate(source.shape) if size != ONE]
    if any(size.coefficient == 0 for size in read.shape):
        return None
    # The last index that is reached within each of the source's dimensions.
    reach = dict.fromkeys(dims, 0)
    covered: set[int] = set()
    offset, rest = source.offset, read.offset
    for d in dims:
        step = strides[d].number
        if step is None or rest == 0:
            continue
        index, rest = divmod(rest, step)
        along = source.strides[d].number
        if index and along is None:
            return None
        reach[d] += index
        offset += index * (along or 0)
    if rest:
        return None
    new: list[Extent] = []
    for size, stride in zip(read.shape, read.strides, strict=True):
        if size == ONE or stride == Extent(0):
            new.append(Extent(0))
            continue
        found = next(((d, k) for d in dims if (k := _times(stride, strides[d]))), None)
        if found is None:
            return None
        d, k = found
        if size == source.shape[d] and k == 1 and reach[d] == 0 and d not in covered:
            covered.add(d)
        elif size.number is None or source.shape[d].number is None or d in covered:
            return None
        else:
            reach[d] += (size.coefficient - 1) * k
            if reach[d] >= source.shape[d].coefficient:
                return None
        new.append(source.strides[d] * Extent(k))
    if any(reach[d] and reach[d] >= (source.shape[d].number or 0) for d in dims):
        return None
    return View(source.buffer, read.shape, tuple(new), offset)


def _times(stride: Extent, unit: Extent) -> int | None:
    """k where stride = k * unit, a number of 1 or more; else None."""
    if unit.coefficient == 0 or Counter(stride.symbols) != Counter(unit.symbols):
        return None
    k, rest = divmod(stride.coefficient, unit.coefficient)
    return k if rest == 0 and k > 0 else None


def _swap_with_linears(plan: Plan) -> None:
    """Rows copied into another order for a linear layer are put in order after it instead, where
    its readers can read them so."""
    writers, readers = plan.writer(), plan.readers()
    for linear in plan.steps:
        if linear.kind != "linear" or not _whole(linear.output):
            continue
        made = writers.get(linear.inputs[0].buffer, [])
        if len(made) != 1 or not _is_copy(made[0]):
            continue
        read = linear.inputs[0]
        if read.offset or product(read.shape) != product(read.buffer.shape):
            continue
        source, y = made[0].inputs[0], linear.output
        if y.buffer is plan.output.buffer:
            continue
        moved = _in_order(source, read.shape[-1])
        if moved is None:
            continue
        x, order = moved
        lead = tuple(x.shape[:-1])
        swapped = Buffer(y.dtype, (*lead, y.shape[-1])).view()
        # y as a copy of the new result, its rows in the old order
        undone = swapped.permuted([*(order.index(d) for d in range(len(order))), len(order)])
        users = dict.fromkeys(readers.get(y.buffer, []))
        reads = [
            (user, position, through(view, undone))
            for user in users
            for position, view in enumerate(user.inputs)
            if view.buffer is y.buffer
        ]
        if all(v is not None and accepts(user, position, v) for user, position, v in reads):
            linear.inputs[0], linear.output = x, swapped
            for user, position, view in reads:
                assert view is not None
                user.inputs[position] = view


def _in_order(source: View, width: Extent) -> tuple[View, list[int]] | None:
    """The rows of ``source`` as they lie, contiguous, and the order that its dimensions took; the
    last of them, width elements together, are a row."""
    shape = list(source.shape)
    columns, count = ONE, len(shape)
    while count and columns != width:
        count -= 1
        columns = columns * shape[count]
    if columns != width or not 0 < count <= 4:
        return None
    for order in itertools.permutations(range(count)):
        moved = source.permuted([*order, *range(count, len(shape))])
        if moved.is_contiguous and moved.offset == 0:
            rows = moved.reshaped((*moved.shape[:count], width))
            if rows is not None:
                return rows, list(order)
    return None

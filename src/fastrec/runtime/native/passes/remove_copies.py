"""Let steps read the original of a copy where their kernels can.

Reshapes of transposed tensors ask for copies: ``nn.MultiheadAttention``, for example, puts the
sequence first, and back.
"""

from __future__ import annotations

import itertools
from collections import Counter

from fastrec.runtime.native.buffers import (
    ONE,
    Buffer,
    Extent,
    View,
    contiguous_strides,
    product,
)
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.steps import Step


def remove_copies(program: Program) -> None:
    """Let steps read originals; copies that are no longer read are left to remove_unused."""
    _swap_with_linears(program)
    for copy in program.steps:
        if _is_copy(copy) and not program.gives(copy.y.buffer):
            _read_through(program, copy)


def _is_copy(step: Step) -> bool:
    """Whether a step copies elements, without a cast, into a whole buffer."""
    return bool(step.is_copy and step.x[0].dtype == step.y.dtype and step.y.is_whole)


def _read_through(program: Program, copy: Step) -> None:
    (source,) = copy.x
    buffer = copy.y.buffer
    for reader in dict.fromkeys(program.readers().get(buffer, [])):
        for view in reader.reads(buffer):
            found = through(view, source)
            if found is not None and reader.accepts(view, found):
                reader.replace_operand(view, found)


def through(read: View, source: View) -> View | None:
    """A view of a contiguous copy of ``source`` as a view of source's own buffer.

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


def _swap_with_linears(program: Program) -> None:
    """Let a linear layer read rows in their original order instead of a reordered copy, where the
    readers of its result can read that order too."""
    writers, readers = program.writers(), program.readers()
    for linear in program.steps:
        if linear.kind != "linear" or not linear.y.is_whole:
            continue
        read, y = linear.x, linear.y
        made = writers.get(read.buffer, [])
        if len(made) != 1 or not _is_copy(made[0]):
            continue
        if read.offset or product(read.shape) != product(read.buffer.shape):
            continue
        if program.gives(y.buffer):
            continue
        moved = _in_order(made[0].x[0], read.shape[-1])
        if moved is None:
            continue
        x, order = moved
        lead = tuple(x.shape[:-1])
        swapped = Buffer(y.dtype, (*lead, y.shape[-1])).view()
        # y as a copy of the new result, its rows in the old order
        undone = swapped.permuted([*(order.index(d) for d in range(len(order))), len(order)])
        users = dict.fromkeys(readers.get(y.buffer, []))
        reads = [
            (user, view, through(view, undone)) for user in users for view in user.reads(y.buffer)
        ]
        if all(new is not None and user.accepts(view, new) for user, view, new in reads):
            linear.x, linear.y = x, swapped
            for user, view, new in reads:
                assert new is not None
                user.replace_operand(view, new)


def _in_order(source: View, width: Extent) -> tuple[View, list[int]] | None:
    """``source`` with its leading dimensions in the order of memory, so that it is contiguous rows.

    Args:
        source: the view.
        width: elements of a row, its last dimensions.

    Returns:
        the rows and the order of the leading dimensions, or None where there is no such order.
    """
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

"""How much room a view leaves in its buffer, for all values of the symbols at once. No torch."""

from __future__ import annotations

import itertools
from collections import Counter

from fastrec.runtime.native.buffers import Extent, View, product

Polynomial = Counter[tuple[str, ...]]


def room_behind(view: View) -> Polynomial:
    """Elements of the buffer behind the view's last, with each symbol s written as 1 + t, t >= 0.

    Where no coefficient is negative, the view lies inside its buffer whatever the sizes.
    """
    room = _shifted(product(view.buffer.shape))
    room[()] -= 1 + view.offset
    for size, stride in zip(view.shape, view.strides, strict=True):
        room.subtract(_shifted(size * stride))
        room.update(_shifted(stride))
    return room


def _shifted(extent: Extent) -> Polynomial:
    terms: Polynomial = Counter()
    for count in range(len(extent.symbols) + 1):
        for chosen in itertools.combinations(extent.symbols, count):
            terms[chosen] += extent.coefficient
    return terms

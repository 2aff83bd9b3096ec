"""Sizes, buffers and views of buffers: the operands of a program's steps. No torch, so that serving
can load it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# csrc/cpu/engine/plan.h: Dtype, in its order.
DTYPES = ("float32", "int64", "uint8", "int8", "bool", "int32")
ITEMSIZE = {name: np.dtype(name).itemsize for name in DTYPES}
# csrc/cpu/engine/plan.h: Space, in its order.
SPACES = ("input", "constant", "arena", "output")


@dataclass(frozen=True)
class Extent:
    """A size or stride: a whole number times symbols such as "B" (sorted; repeated for powers)."""

    coefficient: int
    symbols: tuple[str, ...] = ()

    @staticmethod
    def of(value: int | str | Extent) -> Extent:
        """A number, the name of a symbol, or an extent already."""
        if isinstance(value, Extent):
            return value
        return Extent(value) if isinstance(value, int) else Extent(1, (value,))

    def __mul__(self, other: Extent) -> Extent:
        if self.coefficient == 0 or other.coefficient == 0:
            return Extent(0)
        return Extent(
            self.coefficient * other.coefficient, tuple(sorted(self.symbols + other.symbols))
        )

    def at(self, sizes: dict[str, int]) -> int:
        """Its value for the given values of the symbols."""
        value = self.coefficient
        for symbol in self.symbols:
            value *= sizes[symbol]
        return value

    @property
    def number(self) -> int | None:
        """The value where it depends on no symbol."""
        return None if self.symbols else self.coefficient

    def powers(self, symbols: Sequence[str]) -> list[int]:
        """[coefficient, exponent of each symbol]: the native form."""
        count = Counter(self.symbols)
        return [self.coefficient, *(count[s] for s in symbols)]

    def __str__(self) -> str:
        shown = [str(self.coefficient)] if self.coefficient != 1 or not self.symbols else []
        return "*".join([*shown, *self.symbols])


ONE = Extent(1)
Shape = tuple[Extent, ...]


def product(extents: Sequence[Extent]) -> Extent:
    """The product of all; 1 if there are none."""
    result = ONE
    for extent in extents:
        result = result * extent
    return result


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    reverse = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=ONE)
    return tuple(reversed(list(reverse))) if shape else ()


@dataclass(eq=False)
class Buffer:
    """Contiguous memory.

    Attributes:
        dtype, shape: of its elements.
        space: one of SPACES.
        index: which input or output it is.
        data: a constant's values.
    """

    dtype: str
    shape: Shape
    space: str = "arena"
    index: int = 0
    data: np.ndarray | None = None

    def view(self) -> View:
        """The whole buffer as a view."""
        return View(self, self.shape, contiguous_strides(self.shape))


@dataclass(frozen=True)
class View:
    """A strided part of a buffer; strides and offset in elements."""

    buffer: Buffer
    shape: Shape
    strides: Shape
    offset: int = 0

    @property
    def dtype(self) -> str:
        """Its buffer's."""
        return self.buffer.dtype

    @property
    def constant(self) -> np.ndarray | None:
        """The values of a constant; None for other buffers, and where a size is free."""
        return None if any(size.symbols for size in self.shape) else self.repeated

    @property
    def repeated(self) -> np.ndarray | None:
        """The values of a constant, once along each free size (which repeats them: its stride is
        0); None for other buffers."""
        data = self.buffer.data
        if data is None:
            return None
        shape = [s.coefficient for s in self.shape]
        strides = [s.coefficient * data.itemsize for s in self.strides]
        flat = data.reshape(-1)[self.offset :]
        return np.lib.stride_tricks.as_strided(flat, shape, strides)

    @property
    def is_whole(self) -> bool:
        """Whether it is its whole buffer, with the buffer's own dimensions."""
        same = self.offset == 0 and self.shape == self.buffer.shape
        return same and self.is_contiguous

    @property
    def is_contiguous(self) -> bool:
        """Whether elements follow each other in row-major order."""
        expected = contiguous_strides(self.shape)
        return all(
            size == ONE or stride == wanted
            for size, stride, wanted in zip(self.shape, self.strides, expected, strict=True)
        )

    def permuted(self, order: Sequence[int]) -> View:
        """Dimensions in another order."""
        shape = tuple(self.shape[d] for d in order)
        return View(self.buffer, shape, tuple(self.strides[d] for d in order), self.offset)

    def selected(self, dim: int, index: int) -> View | None:
        """One index of a dimension, which is dropped; None where its stride depends on a symbol."""
        stride = self.strides[dim].number
        if stride is None and index != 0:
            return None
        rest = [d for d in range(len(self.shape)) if d != dim]
        kept = self.permuted(rest)
        return View(self.buffer, kept.shape, kept.strides, self.offset + index * (stride or 0))

    def sliced(self, dim: int, start: int, size: Extent) -> View | None:
        """``size`` elements of a dimension from ``start`` on; None as for :meth:`selected`."""
        stride = self.strides[dim].number
        if stride is None and start != 0:
            return None
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return View(self.buffer, shape, self.strides, self.offset + start * (stride or 0))

    def expanded(self, shape: Shape) -> View:
        """Broadcast to ``shape``: strides 0 where a size of 1 is repeated or a dim is new."""
        new = len(shape) - len(self.shape)
        strides = [Extent(0)] * new
        for have, want, stride in zip(self.shape, shape[new:], self.strides, strict=True):
            strides.append(stride if have == want else Extent(0))
        return View(self.buffer, shape, tuple(strides), self.offset)

    def reshaped(self, shape: Shape) -> View | None:
        """The same elements under another shape, or None where that takes a copy."""
        if Extent(0) in shape:
            return View(self.buffer, shape, contiguous_strides(shape), self.offset)
        # Old dimensions that lie contiguously are one run: (elements, stride of the last).
        runs: list[tuple[Extent, Extent]] = []
        for size, stride in zip(self.shape, self.strides, strict=True):
            if size == ONE:
                continue
            if runs and runs[-1][1] == size * stride:
                runs[-1] = (runs[-1][0] * size, stride)
            else:
                runs.append((size, stride))
        strides: list[Extent] = []
        done, inside = ONE, None  # of the present run, from the right
        for size in reversed(shape):
            if size == ONE:
                strides.append(ONE)
                continue
            if inside is None:
                if not runs:
                    return None
                inside, done = runs.pop(), ONE
            strides.append(inside[1] * done)
            done = done * size
            if done == inside[0]:
                inside = None
        if runs or inside is not None:
            return None
        return View(self.buffer, shape, tuple(reversed(strides)), self.offset)

"""The state of users: their histories encoded, to be scored and taken further. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrec.errors import BackendError

_LINE = 64


@dataclass(frozen=True, eq=False)
class Past:
    """The part of a state that appending events needs.

    Attributes:
        caches: the rows of the past that attention reads, a row an event.
        others: the history's inputs that are not events.
        lengths: events of each user.
    """

    caches: tuple[np.ndarray, ...]
    others: tuple[np.ndarray, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class State:
    """The encoded histories of B users; immutable, for any number of threads.

    Attributes:
        arrays: the values, read-only.
        sizes: the histories' sizes by symbol, e.g. ``{"B": 1, "L": 100}``.
        lengths: events of each user, of a state that events can be appended to; else None.
    """

    arrays: tuple[np.ndarray, ...] = dataclasses.field(repr=False)
    sizes: Mapping[str, int]
    _executors: Any = dataclasses.field(repr=False)
    _addresses: tuple[int, ...] = dataclasses.field(repr=False)
    lengths: tuple[int, ...] | None = None
    _past: Past | None = dataclasses.field(default=None, repr=False)

    @property
    def output(self) -> np.ndarray:
        """The model's result for these histories, where it has no candidates; read-only.

        Raises:
            BackendError: it has candidates; :meth:`PlanEngine.score` scores them.
        """
        if self._executors.split.score is not None:
            raise BackendError("a state of a model with candidates has no output: score(state, …)")
        return self.arrays[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        past = () if self._past is None else (*self._past.caches, *self._past.others)
        return sum(a.nbytes for a in (*self.arrays, *past))


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Like a buffer of the executor's arena: it begins on a cache line."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def freeze(array: np.ndarray) -> None:
    """Make an array read-only, and the memory behind it."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base.flags.writeable = False
        base = base.base

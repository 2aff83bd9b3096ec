"""From the ids of a log to the dense ids of a data set and back; needs numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastrec.data.hashing import text_keys
from fastrec.errors import ArgumentError, IdRangeError

Int64 = NDArray[np.int64]


class OriginalIds:
    """The ids of users, items or categories as the log wrote them.

    Args:
        ids: int64 [n], dense id -> integer of the log, or key of its text; row 0 is padding.
        text: uint8, the texts of the ids 1 .. n - 1 one after another, in UTF-8; None where the
            log's ids are integers.
        offsets: int64 [n], where each text begins, and the end.
        missing: id that stands for "none" (categories).
    """

    def __init__(
        self,
        ids: Int64,
        text: NDArray[np.uint8] | None = None,
        offsets: Int64 | None = None,
        missing: int | None = None,
    ) -> None:
        self._ids, self._text, self._offsets, self._missing = ids, text, offsets, missing

    def __len__(self) -> int:
        return len(self._ids) - 1

    @property
    def are_text(self) -> bool:
        """Whether the log's ids are text; integers otherwise."""
        return self._text is not None

    def to_original(self, dense: Sequence[int] | Int64) -> list[int | str | None]:
        """The log's id of each dense id; None for padding (0) and for "no category".

        Args:
            dense: integers of any shape, flattened, 0 .. n.

        Raises:
            IdRangeError: a dense id that the data set does not have.
        """
        flat = np.asarray(dense, np.int64).ravel()
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self._ids):
            raise IdRangeError(
                "dense", f"0 .. {len(self._ids) - 1}", f"{flat.min()} .. {flat.max()}"
            )
        return [self._one(int(i)) for i in flat]

    def _one(self, dense: int) -> int | str | None:
        raw = int(self._ids[dense])
        if not dense or raw == self._missing:
            return None
        if self._text is None or self._offsets is None:
            return raw
        begin, end = self._offsets[dense - 1 : dense + 1]
        return self._text[begin:end].tobytes().decode()

    def to_dense(self, originals: Sequence[int | str]) -> Int64:
        """int64 [n]: the dense id of each id of the log; 0 (padding) where the log does not hold
        it.

        Args:
            originals: integers or texts, as the log has them.

        Raises:
            ArgumentError: a text where the log's ids are integers.
        """
        if self._text is not None:
            keys = text_keys([str(value) for value in originals])
        else:
            try:
                keys = np.array([int(value) for value in originals], np.int64)
            except (ValueError, OverflowError, TypeError) as error:
                raise ArgumentError(
                    "originals", "64-bit integers, as in the log", str(error)
                ) from error
        at = np.searchsorted(self._sorted, keys).clip(max=len(self._sorted) - 1)
        dense = np.where(self._sorted[at] == keys, self._order[at] + 1, 0)
        if self._text is not None:
            for i in np.flatnonzero(dense).tolist():
                dense[i] *= self._one(int(dense[i])) == str(originals[i])
        return dense

    @cached_property
    def _order(self) -> Int64:
        return np.argsort(self._ids[1:], kind="stable")

    @cached_property
    def _sorted(self) -> Int64:
        return self._ids[1:][self._order]

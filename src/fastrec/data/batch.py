"""The batch that models, training and engines get from the data room."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class SequenceBatch:
    """B examples: a user's history and m candidates, one of which is the positive.

    All arrays are int64. Histories are left-aligned, oldest first: positions ``0 .. length-1`` are
    valid and the rest is 0, the padding id of items, categories and behaviours.

    Attributes:
        item, category, behaviour: [B, L].
        length: [B], 1 <= length <= L.
        cand_item, cand_category: [B, m].
        label: [B], the column of the positive in ``cand_item``.
        user: [B], dense user id (from 1).
    """

    item: Int64
    category: Int64
    behaviour: Int64
    length: Int64
    cand_item: Int64
    cand_category: Int64
    label: Int64
    user: Int64

    def __len__(self) -> int:
        return len(self.length)

    def inputs(self) -> tuple[Int64, Int64, Int64, Int64, Int64, Int64]:
        """The arrays in the order of the ranker's arguments."""
        return (
            self.item,
            self.category,
            self.behaviour,
            self.length,
            self.cand_item,
            self.cand_category,
        )

"""Running table of the items of a log: category, number of events; memory grows with items only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

_PENDING_ROWS = 2_000_000


class ItemTable:
    """Collects (item, category) pairs block by block.

    Dense ids follow the order of the raw ids, so they do not depend on the order of the rows. An
    item seen under several categories gets the smallest of their ids, and is counted.
    """

    def __init__(self) -> None:
        self._base: pl.DataFrame | None = None
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Add the rows of ``frame`` (columns item and category)."""
        import polars as pl

        part = frame.group_by("item").agg(
            low=pl.col("category").min(),
            high=pl.col("category").max(),
            count=pl.len().cast(pl.Int64),
        )
        self._pending.append(part)
        self._pending_rows += part.height
        base = 0 if self._base is None else self._base.height
        if self._pending_rows > max(_PENDING_ROWS, base):
            self._merge()

    def _merge(self) -> None:
        import polars as pl

        parts = self._pending if self._base is None else [self._base, *self._pending]
        merged = pl.concat(parts).group_by("item")
        self._base = merged.agg(pl.col("low").min(), pl.col("high").max(), pl.col("count").sum())
        self._pending, self._pending_rows = [], 0

    def finish(self) -> ItemIndex:
        """The finished table; call once, after at least one :meth:`add`."""
        self._merge()
        base = self._base
        assert base is not None
        self._base = None
        base = base.sort("item")
        conflicts = int((base["low"] != base["high"]).sum())
        category_ids = base["low"].unique().sort().to_numpy()
        category = np.zeros(base.height + 1, np.int32)
        category[1:] = np.searchsorted(category_ids, base["low"].to_numpy()) + 1
        return ItemIndex(
            with_padding(base["item"].to_numpy()),
            category,
            with_padding(base["count"].to_numpy()),
            with_padding(category_ids),
            conflicts,
        )


def with_padding(values: NDArray[Any]) -> NDArray[np.int64]:
    """int64 copy with a 0 in front: the row of padding."""
    padded = np.zeros(len(values) + 1, np.int64)
    padded[1:] = values
    return padded


class ItemIndex:
    """Raw item id -> dense id from 1, and what is known of each item (row 0 is padding).

    Attributes:
        item_ids: raw ids, ascending, int64 [n_items].
        item_category: dense category of each item, int32 [n_items].
        count: events of each item in the log, int64 [n_items].
        category_ids: raw ids, ascending, int64 [n_categories].
        conflicts: number of items seen under more than one category.
    """

    def __init__(
        self,
        item_ids: NDArray[np.int64],
        item_category: NDArray[np.int32],
        count: NDArray[np.int64],
        category_ids: NDArray[np.int64],
        conflicts: int,
    ) -> None:
        self.item_ids, self.item_category, self.count = item_ids, item_category, count
        self.category_ids, self.conflicts = category_ids, conflicts
        self._low = int(item_ids[1])
        span = int(item_ids[-1]) - self._low + 1
        self._table: NDArray[np.int32] | None = None
        # Ids of real catalogues fill most of their range: one gather then replaces a binary search.
        if span <= 4 * len(item_ids) + (1 << 20):
            self._table = np.zeros(span, np.int32)
            self._table[item_ids[1:] - self._low] = np.arange(1, len(item_ids), dtype=np.int32)

    def dense(self, items: NDArray[np.int64]) -> NDArray[np.int32]:
        """Dense ids of raw ids that are all in the table."""
        if self._table is not None:
            return self._table[items - self._low]
        return (np.searchsorted(self.item_ids[1:], items) + 1).astype(np.int32)

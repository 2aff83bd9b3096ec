"""Running table of the items of a log: category, number of events; memory grows with items only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

_PENDING_ROWS = 2_000_000
_DENSE_SPAN = 16_000_000
_NO_CATEGORY = np.iinfo(np.int64).max

MISSING_CATEGORY = -(1 << 63)
"""Category id of items that have none."""


class ItemTable:
    """Collects (item, category) pairs block by block.

    Dense ids follow the order of the raw ids (of texts: of their keys), so they do not depend on
    the order of the rows. An item seen under several categories gets the smallest of their ids, and
    is counted; one seen under no category gets :data:`MISSING_CATEGORY`.
    """

    def __init__(self) -> None:
        self._parts: _Direct | _Grouped = _Direct()

    def add(self, frame: pl.DataFrame) -> None:
        """Add the rows of ``frame`` (columns item and category)."""
        if isinstance(self._parts, _Direct) and not self._parts.fits(frame):
            self._parts = _Grouped(self._parts.collect())
        self._parts.add(frame)

    def finish(self) -> ItemIndex:
        """The finished table; call once, after at least one :meth:`add`."""
        table = self._parts.collect().sort("item")
        low = table["low"].fill_null(MISSING_CATEGORY).to_numpy()
        high = table["high"].fill_null(MISSING_CATEGORY).to_numpy()
        category_ids = np.unique(low)
        category = np.zeros(table.height + 1, np.int32)
        category[1:] = np.searchsorted(category_ids, low) + 1
        return ItemIndex(
            with_padding(table["item"].to_numpy()),
            category,
            with_padding(table["count"].to_numpy()),
            with_padding(category_ids),
            int((low != high).sum()),
        )


class _Direct:
    """One slot for each id of a range: an order faster than grouping, for ids that fill theirs."""

    def __init__(self) -> None:
        self._first = 0
        self._low = self._high = self._count = np.zeros(0, np.int64)

    def fits(self, frame: pl.DataFrame) -> bool:
        """Make room for the frame's items; False where their range is too wide for slots."""
        first, last = _bounds(frame)
        size = len(self._low)
        if size:
            first, last = min(first, self._first), max(last, self._first + size - 1)
        if last - first >= _DENSE_SPAN:
            return False
        if not size or first < self._first or last >= self._first + size:
            # A quarter more than asked, so that a slowly widening range is not copied each time.
            slack = min((last - first) // 4 + 1, _DENSE_SPAN - (last - first) - 1)
            new_size = last - first + 1 + slack
            at = self._first - first if size else 0
            for name, empty in (("_low", _NO_CATEGORY), ("_high", ~_NO_CATEGORY), ("_count", 0)):
                grown = np.full(new_size, empty, np.int64)
                grown[at : at + size] = getattr(self, name)
                setattr(self, name, grown)
            self._first = first
        return True

    def add(self, frame: pl.DataFrame) -> None:
        slot = frame["item"].to_numpy() - self._first
        category = frame["category"]
        for table, extreme, empty in (
            (self._low, np.minimum, _NO_CATEGORY),
            (self._high, np.maximum, ~_NO_CATEGORY),
        ):
            extreme.at(table, slot, category.fill_null(empty).to_numpy())
        np.add.at(self._count, slot, 1)

    def collect(self) -> pl.DataFrame:
        import polars as pl

        used = np.flatnonzero(self._count)
        columns = {"low": self._low, "high": self._high, "count": self._count}
        table = pl.DataFrame(
            {"item": used + self._first, **{name: column[used] for name, column in columns.items()}}
        )
        none = pl.col("low") == _NO_CATEGORY
        return table.with_columns(
            pl.when(none).then(None).otherwise(name).alias(name) for name in ("low", "high")
        )


class _Grouped:
    """Any ids at all: blocks are grouped by item, and merged as often as the table doubles."""

    def __init__(self, table: pl.DataFrame) -> None:
        self._base = table
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = 0

    def add(self, frame: pl.DataFrame) -> None:
        import polars as pl

        category = pl.col("category")
        part = frame.group_by("item").agg(
            low=category.min(), high=category.max(), count=pl.len().cast(pl.Int64)
        )
        self._pending.append(part)
        self._pending_rows += part.height
        if self._pending_rows > max(_PENDING_ROWS, self._base.height):
            self._base = self.collect()

    def collect(self) -> pl.DataFrame:
        import polars as pl

        merged = pl.concat([self._base, *self._pending]).group_by("item")
        self._pending, self._pending_rows = [], 0
        return merged.agg(pl.col("low").min(), pl.col("high").max(), pl.col("count").sum())


def _bounds(frame: pl.DataFrame) -> tuple[int, int]:
    items = frame["item"].to_numpy()
    return int(items.min()), int(items.max())


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

"""Ids that are text: a 64-bit key stands for each while a log is sorted; the texts are kept beside.

The key is a hash of the text alone. Two texts of one key (one chance in 350,000 among ten million
ids) are found and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastrec.data.hashing import text_keys
from fastrec.errors import DataError

if TYPE_CHECKING:
    import polars as pl

_PENDING_ROWS = 500_000


class TextIds:
    """The different texts of a column, collected block by block; memory grows with them only."""

    def __init__(self) -> None:
        self._base: pl.DataFrame | None = None
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = 0

    def keys(self, texts: pl.Series) -> pl.Series:
        """Int64 keys of a String column; null stays null."""
        import polars as pl

        unique = texts.drop_nulls().unique()
        table = pl.DataFrame({"text": unique, "key": text_keys(unique.to_list())})
        self._pending.append(table)
        self._pending_rows += table.height
        if self._pending_rows > max(_PENDING_ROWS, 0 if self._base is None else self._base.height):
            self._merge()
        joined = pl.DataFrame({"text": texts}).join(
            table, on="text", how="left", maintain_order="left"
        )
        return joined["key"]

    def _merge(self) -> pl.DataFrame:
        import polars as pl

        parts = self._pending if self._base is None else [self._base, *self._pending]
        self._base = pl.concat(parts).unique(maintain_order=False)
        self._pending, self._pending_rows = [], 0
        return self._base

    def encoded(
        self, keys: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """The texts of some keys, a few at a time: (their UTF-8 bytes, the length of each).

        Args:
            keys: int64; the text of an unknown one (items without a category) is empty.

        Raises:
            DataError: two texts have the same key.
        """
        table = self._merge().sort("key")
        known = table["key"].to_numpy()
        twice = np.flatnonzero(known[1:] == known[:-1])
        if len(twice):
            pair = table["text"][int(twice[0]) : int(twice[0]) + 2].to_list()
            raise DataError(
                f"the ids {pair[0]!r} and {pair[1]!r} have the same hash; rename one of them"
            )
        for start in range(0, len(keys), _PENDING_ROWS):
            some = keys[start : start + _PENDING_ROWS]
            at = np.searchsorted(known, some).clip(max=len(known) - 1)
            texts = [text.encode() for text in table["text"].gather(at).to_list()]
            hit = (known[at] == some).tolist()
            texts = [text if found else b"" for text, found in zip(texts, hit, strict=True)]
            lengths = np.array([len(text) for text in texts], np.int64)
            yield np.frombuffer(b"".join(texts), np.uint8), lengths

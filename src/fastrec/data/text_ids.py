"""Ids that are text: a 64-bit key stands for each while a log is sorted, and the text is kept
beside.

The key is BLAKE2b of the text, so it depends on nothing else. Two texts of one key (one chance in
350,000 among ten million ids) are found and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def texts_of(self, keys: NDArray[np.int64]) -> list[str]:
        """The text of each key; empty where there is none (the category of items without one).

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
        at = np.searchsorted(known, keys).clip(max=len(known) - 1)
        texts = table["text"].gather(at).to_list()
        return [text if hit else "" for text, hit in zip(texts, known[at] == keys, strict=True)]


def encode_texts(texts: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(bytes, offsets): text i is bytes[offsets[i]] .. bytes[offsets[i + 1] - 1], in UTF-8."""
    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets

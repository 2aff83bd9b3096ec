"""Behaviours of a log: names to small ids, in an order that does not depend on the rows' order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastrec.errors import DataError

if TYPE_CHECKING:
    import polars as pl

BEHAVIOURS = {"pv": 1, "cart": 2, "fav": 3, "buy": 4}
"""Ids of the behaviours of Taobao's log; 0 is padding, so the table has five rows."""

_OTHER_WORDS = {
    "pv": "view views pageview page_view click clicks clk impression read",
    "cart": "addtocart add_to_cart add-to-cart add2cart",
    "fav": "favorite favourite collect wishlist add_to_wishlist",
    "buy": "purchase purchased transaction order checkout",
}
KNOWN = {name: name for name in BEHAVIOURS} | {
    word: name for name, words in _OTHER_WORDS.items() for word in words.split()
}
"""Words of public logs, lower case -> one of the four behaviours."""

MAX_BEHAVIOURS = 255


class Vocabulary:
    """Collects the behaviours of a log, block by block.

    Ids while reading are given in the order of appearance; :meth:`final` puts the four known
    behaviours first (1 to 4) where one of them occurs, and the others after them in alphabetical
    order.

    Args:
        renamed: a behaviour as written in the log -> its name.
    """

    def __init__(self, renamed: Mapping[str, str]) -> None:
        self._renamed = {
            word.strip().lower(): name.strip().lower() for word, name in renamed.items()
        }
        self._codes: dict[str, int] = {}  # as written -> index in `names`, plus 1
        self._names: list[str] = []

    def codes(self, words: pl.Series) -> pl.Series:
        """UInt8 ids of a String column; null where the word is null or blank.

        Raises:
            DataError: more than 255 different behaviours.
        """
        import polars as pl

        known = words.replace_strict(self._codes, default=None, return_dtype=pl.UInt8)
        if known.null_count() > words.null_count():
            for word in sorted(words.filter(known.is_null()).drop_nulls().unique().to_list()):
                self._add(word)
            known = words.replace_strict(self._codes, default=None, return_dtype=pl.UInt8)
        return known

    def _add(self, word: str) -> None:
        name = word.strip().lower()
        if not name:
            return
        name = self._renamed.get(name, name)
        name = KNOWN.get(name, name)
        if name not in self._names:
            if len(self._names) == MAX_BEHAVIOURS:
                raise DataError(
                    f"more than {MAX_BEHAVIOURS} different behaviours, {word!r} among them: state "
                    "the column with --columns behaviour=NAME, or behaviour=none to leave it out"
                )
            self._names.append(name)
        self._codes[word] = self._names.index(name) + 1

    def final(self) -> tuple[list[str], NDArray[np.uint8]]:
        """Names of the ids 1, 2, ... and the table from ids while reading to those ids."""
        found = set(self._names)
        first = list(BEHAVIOURS) if not found or found & set(BEHAVIOURS) else []
        names = first + sorted(found - set(first))
        if len(names) > MAX_BEHAVIOURS:
            raise DataError(
                f"{len(names)} different behaviours with Taobao's four; at most {MAX_BEHAVIOURS}"
            )
        table = np.zeros(len(self._names) + 1, np.uint8)
        for code, name in enumerate(self._names, 1):
            table[code] = names.index(name) + 1
        return names, table

"""Rows of any layout to the columns that all else works on: ids, behaviours and times as
numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastrec.data.behaviours import Vocabulary
from fastrec.data.layout import TICKS, Layout, ReadOptions
from fastrec.data.rows import CODES, Rows
from fastrec.data.text_ids import TextIds
from fastrec.data.values import parse_times

if TYPE_CHECKING:
    import polars as pl

_REPLACEMENT = "\ufffd"
_WHOLE = float(1 << 53)
_LIMIT = (1 << 63) - 1


class Normaliser:
    """Turns rows into Int64 ``user``, ``item``, ``category`` (null = none), ``time`` and UInt8
    ``behaviour``, and finds the rows that cannot be used.

    Args:
        layout: of the log.
        options: ``behaviours`` are used.
        window: first and last time taken, in seconds since 1970, or None.

    Attributes:
        ticks: units of ``time`` in a second.
        texts: role -> its ids, where they are text.
        vocabulary: the behaviours met so far.
    """

    def __init__(
        self, layout: Layout, options: ReadOptions, window: tuple[int, int] | None
    ) -> None:
        self._layout, self._window = layout, window
        self.vocabulary = Vocabulary(options.behaviours)
        self.texts = {
            role: TextIds()
            for role, column in layout.columns.items()
            if role in ("user", "item", "category") and column.kind == "text"
        }
        time = layout.columns.get("time")
        self._seconds_as_floats = (
            time is not None and time.kind == "float" and layout.time_unit == "s"
        )
        self.ticks = 1000 if self._seconds_as_floats else TICKS.get(layout.time_unit, 1)

    def __call__(self, rows: Rows) -> tuple[pl.DataFrame, NDArray[np.uint8]]:
        """(columns, code of the reason of each row, 0 = good); bad rows hold anything or null."""
        import polars as pl

        reason = (
            np.zeros(rows.frame.height, np.uint8) if rows.problem is None else rows.problem.copy()
        )
        columns: dict[str, pl.Series] = {}
        for role in ("user", "item", "category"):
            if role not in self._layout.columns:
                continue
            raw = rows.frame[role]
            if raw.dtype == pl.String:
                raw = raw.str.strip_chars()
                raw = without(raw, (raw == "").fill_null(False))
            if self._layout.columns[role].kind == "text":
                raw = self._keys(role, raw.cast(pl.String), reason)
            ids = raw if raw.dtype == pl.Int64 else _integers(raw)
            # No category is fine, a category that is no number is not.
            bad = ids.is_null() & raw.is_not_null() if role == "category" else ids.is_null()
            if role == "category":
                bad |= ((ids >= _LIMIT) | (ids <= -_LIMIT)).fill_null(False)
            _mark(reason, role, bad)
            columns[role] = ids
        n = rows.frame.height
        if "category" not in columns:
            columns["category"] = pl.repeat(None, n, dtype=pl.Int64, eager=True)
        if "behaviour" in self._layout.columns:
            words = without(rows.frame["behaviour"].cast(pl.String), reason > 0)
            columns["behaviour"] = self.vocabulary.codes(words)
            _mark(reason, "behaviour", columns["behaviour"].is_null())
        else:
            columns["behaviour"] = pl.repeat(1, n, dtype=pl.UInt8, eager=True)
        if "time" in self._layout.columns:
            columns["time"] = self._times(rows.frame["time"])
            _mark(reason, "time", columns["time"].is_null())
            if self._window is not None:
                low = max(self._window[0] * self.ticks, -_LIMIT)
                high = min((self._window[1] + 1) * self.ticks - 1, _LIMIT)
                _mark(reason, "window", ~columns["time"].is_between(low, high))
        else:
            columns["time"] = pl.repeat(0, n, dtype=pl.Int64, eager=True)
        return pl.DataFrame(columns), reason

    def _keys(self, role: str, texts: pl.Series, reason: NDArray[np.uint8]) -> pl.Series:
        broken = texts.str.contains(_REPLACEMENT, literal=True).fill_null(False)
        _mark(reason, "encoding", broken)
        return self.texts[role].keys(without(texts, reason > 0))

    def _times(self, raw: pl.Series) -> pl.Series:
        import polars as pl

        column = self._layout.columns["time"]
        if raw.dtype == pl.String:
            raw = raw.str.strip_chars()
        if "%" in column.kind:
            return parse_times(raw.cast(pl.String), column.kind)
        if column.kind == "integer":
            return raw if raw.dtype == pl.Int64 else _integers(raw)
        numbers = _floats(raw)
        if self._seconds_as_floats:
            numbers = (numbers * self.ticks).round()
        return numbers.floor().cast(pl.Int64, strict=False)


def _integers(raw: pl.Series) -> pl.Series:
    """Int64; null where a value is no whole number (7.0 is one, below 2^53) that 64 bits hold."""
    import polars as pl

    if raw.dtype == pl.String:
        found = raw.cast(pl.Int64, strict=False)
        rest = (found.is_null() & raw.is_not_null()).arg_true()
        return found if not len(rest) else found.scatter(rest, _integers(_floats(raw.gather(rest))))
    numbers = _floats(raw)
    whole = (numbers == numbers.floor()) & (numbers.abs() < _WHOLE)
    return without(numbers, ~whole.fill_null(False)).cast(pl.Int64, strict=False)


def _floats(raw: pl.Series) -> pl.Series:
    import polars as pl

    return raw.cast(pl.Float64, strict=False)


def without(values: pl.Series, bad: pl.Series | NDArray[np.bool_]) -> pl.Series:
    """``values`` with null where ``bad``."""
    import polars as pl

    mask = pl.Series(bad) if isinstance(bad, np.ndarray) else bad
    return (
        pl.select(pl.when(mask).then(None).otherwise(values)).to_series() if mask.any() else values
    )


def _mark(reason: NDArray[np.uint8], name: str, bad: pl.Series) -> None:
    if bad.any():
        reason[bad.fill_null(True).to_numpy() & (reason == 0)] = CODES[name]

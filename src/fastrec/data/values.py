"""Sampled values of one column: numbers, times, behaviours or text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from fastrec.data.behaviours import KNOWN
from fastrec.data.layout import TICKS

if TYPE_CHECKING:
    import polars as pl

_INTEGER = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LEADING_ZERO = re.compile(r"[+-]?0\d")
_NEARLY_ALL = 0.99
_YEARS = (631_152_000, 2_366_841_600)  # 1990 to 2045, in seconds since 1970
_MAX_KINDS = 11
_BIGGEST_RATING = 10

TIME_FORMATS = (
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f UTC",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d %H",
    "%Y-%m-%d",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d %H:%M",
    "%Y/%m/%d",
    "%Y%m%d",
    "%a %b %d %H:%M:%S %z %Y",
    "%b %d, %Y",
    "%B %d, %Y",
)
"""Dates and times in words, as polars writes their formats; without an offset they are UTC."""


class Values:
    """Values of a column as text.

    Args:
        values: as they stand in the log.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self._values = [value for raw in values if (value := raw.strip())]

    @property
    def example(self) -> str:
        """The first value, cut to 40 characters."""
        return self._values[0][:40] if self._values else ""

    @cached_property
    def kind(self) -> str:
        """``empty``, ``integer``, ``float`` or ``text``, of all values but one in a hundred."""
        if not self._values:
            return "empty"
        if self._share(_INTEGER) >= _NEARLY_ALL:
            return "integer"
        return "float" if self._share(_FLOAT) >= _NEARLY_ALL else "text"

    @cached_property
    def id_kind(self) -> str:
        """How ids are kept: ``integer``, ``float`` (whole numbers such as 7.0) or ``text``."""
        if self.kind == "integer":
            # 007 and 7 are two ids; and 64 bits hold no more than 2^63 - 1.
            if any(map(_LEADING_ZERO.match, self._values)):
                return "text"
            fitting = sum(-(1 << 63) <= number < 1 << 63 for number in self._numbers)
            return "integer" if fitting >= _NEARLY_ALL * len(self._numbers) else "text"
        return "float" if self.kind == "float" and not self.has_fractions else "text"

    @property
    def is_value(self) -> bool:
        """Whether it cannot be the name of a column: a number, a date or a behaviour."""
        return (
            self.kind in ("integer", "float") or self.is_date or self.example.lower() in BARE_WORDS
        )

    @cached_property
    def is_behaviour(self) -> bool:
        """Whether most are known words for behaviours."""
        return self._most(sum(value.lower() in KNOWN for value in self._values))

    @cached_property
    def is_epoch(self) -> bool:
        """Whether most look like times since 1970, in a unit."""
        return self._unit() is not None

    @cached_property
    def is_date(self) -> bool:
        """Whether most are dates or times in words."""
        return self.kind == "text" and self._format() is not None

    @cached_property
    def has_fractions(self) -> bool:
        """Whether there are numbers with a fraction, as of scores and coordinates."""
        return self.kind == "float" and any(not number.is_integer() for number in self._floats)

    @cached_property
    def is_small_number(self) -> bool:
        """Whether it has a few different whole numbers, as codes of behaviours."""
        return self.kind == "integer" and self._few()

    @cached_property
    def is_rating(self) -> bool:
        """Whether it looks like ratings: a few different numbers from 0 to 10."""
        return self.kind in ("integer", "float") and self._few()

    def time_kind(self, unit: str | None) -> tuple[str, str]:
        """Kind and unit of the column as a time (see :class:`fastrec.data.layout.Column`); the kind
        is ``""`` where it is none.

        Args:
            unit: the unit that the user states for numbers.
        """
        integers = self._most(len(self._numbers))
        if unit is None and integers and self._format() == "%Y%m%d":
            return "%Y%m%d", "us"
        if integers or unit is not None or self._most(len(self._floats)):
            kind = "integer" if integers else "float"
            return kind, unit or self._unit() or "number"
        return self._format() or "", "us"

    def _unit(self) -> str | None:
        """The unit in which the values lie between 1990 and 2045."""
        for unit, ticks in TICKS.items():
            low, high = (year * ticks for year in _YEARS)
            if self._most(sum(low <= number < high for number in self._floats)):
                return unit
        return None

    def _format(self) -> str | None:
        import polars as pl

        if not self._values:
            return None
        series = pl.Series(self._values, dtype=pl.String)
        for text in TIME_FORMATS:
            if text == "%Y%m%d" and not self._most(sum(len(value) == 8 for value in self._values)):
                continue
            found = parse_times(series, text)
            low, high = (year * TICKS["us"] for year in _YEARS)
            if self._most(int(found.is_between(low, high).sum() or 0)):
                return text
        return None

    def _few(self) -> bool:
        kinds = set(self._floats)
        return (
            bool(kinds)
            and len(kinds) <= _MAX_KINDS
            and 0 <= min(kinds) <= max(kinds) <= _BIGGEST_RATING
        )

    def _share(self, pattern: re.Pattern[str]) -> float:
        return sum(map(bool, map(pattern.fullmatch, self._values))) / len(self._values)

    def _most(self, hits: int) -> bool:
        return 2 * hits > len(self._values)

    @cached_property
    def _numbers(self) -> list[int]:
        return [int(value) for value in self._values if _INTEGER.fullmatch(value)]

    @cached_property
    def _floats(self) -> list[float]:
        return [float(value) for value in self._values if _FLOAT.fullmatch(value)]


BARE_WORDS = frozenset(("pv", "fav", "buy"))
"""Behaviours that name no column."""


def parse_times(texts: pl.Series, format: str) -> pl.Series:
    """Microseconds since 1970, Int64; null where the text is no time in this format.

    Args:
        texts: String.
        format: one of :data:`TIME_FORMATS`.
    """
    import polars as pl

    if format == "%Y-%m-%d %H":  # chrono wants minutes where there are hours
        texts, format = texts + ":00", "%Y-%m-%d %H:%M"
    if "%H" in format:
        found = texts.str.to_datetime(format, strict=False, time_unit="us")
    else:
        found = texts.str.to_date(format, strict=False).cast(pl.Datetime("us"))
    return found.dt.epoch("us")

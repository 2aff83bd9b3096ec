"""Rows as the readers of the containers give them: a column for each role, and their places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

REASONS = (
    "blank",
    "fields",
    "json",
    "encoding",
    "user",
    "item",
    "category",
    "behaviour",
    "time",
    "window",
)
"""Why a line is not taken, in order of precedence (the code is the index + 1): a blank line (no
row), a wrong number of fields, no JSON object, not UTF-8, a value that the column cannot hold, a
time outside the window."""

CODES = {reason: code for code, reason in enumerate(REASONS, 1)}


@dataclass(frozen=True)
class Rows:
    """Some rows of a log.

    Attributes:
        frame: a column for each role of the layout: Int64, Float64 or String.
        problem: uint8 [rows], code of a reason or 0; None where every row has its fields.
        where: index of a row -> (number of its line or row in the file, its text).
    """

    frame: pl.DataFrame
    problem: NDArray[np.uint8] | None
    where: Callable[[int], tuple[int, str]]

"""Logs in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastrec.data.layout import Layout
from fastrec.data.rows import Rows
from fastrec.errors import DataError

if TYPE_CHECKING:
    import polars as pl

_ROWS = 500_000


def sample(path: Path, n_rows: int) -> dict[str, list[str]]:
    """The first rows as text, column by column; columns of lists and structures are left out.

    Raises:
        DataError: the file cannot be read.
    """
    import polars as pl

    try:
        frame = pl.scan_parquet(path).head(n_rows).collect()
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, error) from error
    flat = [name for name in frame.columns if not frame[name].dtype.is_nested()]
    texts = frame.select(_plain(pl.col(name), frame[name].dtype).alias(name) for name in flat)
    return {
        name: texts[name].cast(pl.String, strict=False).fill_null("").to_list() for name in flat
    }


def read(path: Path, layout: Layout) -> Iterator[Rows]:
    """The rows of one file.

    Raises:
        DataError: the file cannot be read, or lacks a column of the first file.
    """
    import polars as pl

    scan = pl.scan_parquet(path)
    try:
        schema = scan.collect_schema()
        total = int(scan.select(pl.len()).collect().item())
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, error) from error
    names = {role: column.name or "" for role, column in layout.columns.items()}
    missing = set(names.values()) - set(schema)
    if missing:
        raise DataError(f"{path}: lacks columns of the first file: {', '.join(sorted(missing))}")
    wanted = scan.select(
        _plain(pl.col(name), schema[name]).alias(role) for role, name in names.items()
    )
    for offset in range(0, total, _ROWS):
        try:
            frame = wanted.slice(offset, _ROWS).collect()
        except pl.exceptions.PolarsError as error:
            raise _damaged(path, error) from error
        yield Rows(frame, None, _where(frame, offset))


def _where(frame: pl.DataFrame, offset: int):  # type: ignore[no-untyped-def]
    return lambda i: (offset + i + 1, str(frame.row(i, named=True)))


def _plain(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Times as microseconds since 1970, numbers in 64 bits, all else as text."""
    import polars as pl

    if dtype.is_temporal():
        return column.cast(pl.Datetime("us")).dt.epoch("us")
    if dtype.is_integer() and dtype != pl.UInt64:
        return column.cast(pl.Int64)
    return column.cast(pl.Float64) if dtype.is_float() else column.cast(pl.String)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: a Parquet file that cannot be read ({str(error).splitlines()[0]})")

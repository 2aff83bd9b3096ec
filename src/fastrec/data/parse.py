"""A log file in blocks of whole lines, each parsed by polars, with a reason for every refused row.

The good path is ``polars.read_csv`` on the block's bytes. A block it does not take whole (an error,
a missing field, a blank line) is parsed again line by line, still in polars expressions, so one bad
line in a hundred million costs one block and is counted under its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastrec.errors import ArgumentError, DataError, MissingDependencyError

if TYPE_CHECKING:
    import polars as pl

BEHAVIOURS = {"pv": 1, "cart": 2, "fav": 3, "buy": 4}
"""Behaviour ids; 0 is padding, so the table has five rows."""

TAOBAO_WINDOW = (1511539200, 1512316799)
"""2017-11-25 00:00:00 to 2017-12-03 23:59:59 in UTC+8, as seconds since 1970: the days that the
published file covers. It also holds a few rows with negative and year-2037 times."""

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 1 << 20

COLUMNS = ("user", "item", "category", "behaviour", "time")
_FIELDS = {"taobao": COLUMNS, "user-item": ("user", "item")}
_SEPARATOR = {"taobao": ",", "user-item": " "}

REASONS = ("blank", "fields", "integer", "behaviour", "window")
"""Why a line is not taken, in order of precedence (the index + 1 is the code in ``reason``): blank
line, wrong number of fields, a field that is no 64-bit integer, unknown behaviour, time outside the
window. Blank lines are not counted as rows."""

_BLANK, _COUNT, _INTEGER, _BEHAVIOUR, _WINDOW = range(1, 6)
_MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
_INT = re.compile(r"\s*[+-]?\d+\s*")


def polars() -> object:
    """The polars module, or MissingDependencyError naming the extra that brings it."""
    try:
        import polars as module
    except ImportError as error:
        raise MissingDependencyError("polars", "data", "Reading and writing logs") from error
    return module


def check_format(format: str) -> str:
    """``format`` itself, or ArgumentError naming the known ones."""
    if format not in _FIELDS:
        raise ArgumentError("format", " or ".join(map(repr, _FIELDS)), repr(format))
    return format


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, each ended by ``\\n``; ``first_line`` counts from 1."""

    data: bytes
    first_line: int
    n_lines: int
    end_byte: int


def is_header(line: bytes, format: str) -> bool:
    """True where a first line names columns: as many words as there are fields, none a value."""
    fields = line.decode("utf-8", "replace").strip().split(_SEPARATOR[format])
    return len(fields) == len(_FIELDS[format]) and all(
        field.strip() and not _INT.fullmatch(field) and field not in BEHAVIOURS for field in fields
    )


def read_blocks(path: Path, format: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Blocks of about ``block_bytes``, cut after a line end; a byte-order mark and a header are
    dropped, and a missing newline at the end of the file is added.

    Raises:
        DataError: the file is compressed, or holds a line of more than ``MAX_LINE_BYTES``.
    """
    first_line, end_byte, rest, started = 1, 0, b"", False
    with path.open("rb") as file:
        while True:
            chunk = file.read(block_bytes)
            end_byte += len(chunk)
            if not started:
                for magic, kind in _MAGIC.items():
                    if chunk.startswith(magic):
                        raise DataError(f"{path}: is a {kind} file; decompress it first")
                chunk = chunk.removeprefix(b"\xef\xbb\xbf")
            data = rest + chunk
            if chunk:
                cut = data.rfind(b"\n") + 1
                data, rest = data[:cut], data[cut:]
                if len(rest) > MAX_LINE_BYTES:
                    line = first_line + data.count(b"\n")
                    limit = f"{MAX_LINE_BYTES:,} bytes"
                    raise DataError(f"{path}:{line}: a line of more than {limit} is no log row")
            else:
                data, rest = data + b"\n" if data else b"", b""
            if data and not started:
                started = True
                head, _, tail = data.partition(b"\n")
                if is_header(head, format):
                    data, first_line = tail, 2
            if data:
                n_lines = data.count(b"\n")
                yield Block(data, first_line, n_lines, end_byte)
                first_line += n_lines
            if not chunk:
                return


def parse_block(block: Block, format: str, window: tuple[int, int] | None) -> pl.DataFrame:
    """One row per line of the block: user, item, category, time (Int64), behaviour and reason
    (UInt8). Where ``reason`` is 0 the row is good; else it is 1 + an index into ``REASONS`` and
    the values may be null. ``user-item`` has no time: it is 0 here, and category, behaviour are 1.
    """
    import polars as pl

    frame = _parse_fast(block, format)
    if frame is None:
        frame = _parse_lines(block, format)
    if format == "user-item":
        return frame.with_columns(
            category=pl.lit(1, pl.Int64), behaviour=pl.lit(1, pl.UInt8), time=pl.lit(0, pl.Int64)
        )
    known = pl.col("behaviour").replace_strict(BEHAVIOURS, default=None, return_dtype=pl.UInt8)
    inside = pl.lit(True) if window is None else pl.col("time").is_between(*window)
    return frame.with_columns(behaviour=known).with_columns(
        reason=pl.when(pl.col("reason") > 0)
        .then("reason")
        .when(pl.col("behaviour").is_null())
        .then(pl.lit(_BEHAVIOUR, pl.UInt8))
        .when(~inside)
        .then(pl.lit(_WINDOW, pl.UInt8))
        .otherwise(pl.lit(0, pl.UInt8))
    )


def _parse_fast(block: Block, format: str) -> pl.DataFrame | None:
    """The block as polars reads it, or None unless every line became one row without a null."""
    import polars as pl

    fields = _FIELDS[format]
    schema = {name: pl.String if name == "behaviour" else pl.Int64 for name in fields}
    try:
        frame = pl.read_csv(
            block.data,
            has_header=False,
            schema=schema,
            separator=_SEPARATOR[format],
            quote_char=None,
        )
    except pl.exceptions.PolarsError:
        return None
    if frame.height != block.n_lines or any(column.null_count() for column in frame):
        return None
    return frame.with_columns(reason=pl.lit(0, pl.UInt8))


def _parse_lines(block: Block, format: str) -> pl.DataFrame:
    """The same columns from a block that holds at least one bad line; about six times the CPU."""
    import polars as pl

    fields = _FIELDS[format]
    # An invalid byte becomes U+FFFD, which no integer and no behaviour contains.
    lines = block.data.decode("utf-8", "replace").split("\n")[:-1]
    text = pl.Series("line", lines, dtype=pl.String)
    split = text.str.split(_SEPARATOR[format])
    # At the end of a field, and before an integer, polars' CSV reader skips what its cast does not.
    columns = [
        split.list.get(i, null_on_oob=True).str.strip_suffix("\r").alias(name)
        for i, name in enumerate(fields)
    ]
    blank = text.str.strip_chars() == ""
    integers = [
        pl.col(name).str.strip_chars_start(" \t").cast(pl.Int64, strict=False)
        for name in fields
        if name != "behaviour"
    ]
    no_integer = pl.any_horizontal(pl.col(n).is_null() for n in fields if n != "behaviour")
    return (
        pl.DataFrame([*columns, blank.alias("blank"), split.list.len().alias("count")])
        .with_columns(*integers)
        .with_columns(
            reason=pl.when("blank")
            .then(pl.lit(_BLANK, pl.UInt8))
            .when(pl.col("count") != len(fields))
            .then(pl.lit(_COUNT, pl.UInt8))
            .when(no_integer)
            .then(pl.lit(_INTEGER, pl.UInt8))
            .otherwise(pl.lit(0, pl.UInt8))
        )
        .drop("blank", "count")
    )


def describe_first_bad(path: Path, block: Block, frame: pl.DataFrame) -> str | None:
    """``file:line: reason: text`` of the first refused line that is not blank, or None."""
    bad = (frame["reason"] > _BLANK).arg_true()
    if not len(bad):
        return None
    index = int(bad[0])
    text = block.data.split(b"\n", index + 1)[index].decode("utf-8", "replace").rstrip("\r")[:120]
    reason = REASONS[int(frame["reason"][index]) - 1]
    meaning = {
        "fields": "wrong number of fields",
        "integer": "a field is not a 64-bit integer",
        "behaviour": f"behaviour is none of {', '.join(BEHAVIOURS)}",
        "window": "time outside the window",
    }[reason]
    return f"{path}:{block.first_line + index}: {meaning}: {text!r}"

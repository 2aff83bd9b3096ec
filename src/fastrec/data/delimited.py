"""Logs with one event a line and fields between delimiters.

The good path is ``polars.read_csv`` on a block's bytes. A block that it does not take whole (an
error, a missing field, a blank line) is divided, and where only a few lines are left they are read
one by one, so that a bad line costs little and is counted under its reason.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

import numpy as np

from fastrec.data.blocks import Block, cut_block, read_blocks, split_line
from fastrec.data.layout import Layout
from fastrec.data.rows import CODES, Rows
from fastrec.data.streams import ByteStream
from fastrec.errors import DataError

_SEPARATOR = b"\x1f"
"""Stands for a delimiter of several bytes while polars reads."""

_FEW_LINES = 2048
_PARTS = 8
_DTYPES = {"integer": "Int64", "float": "Float64"}


def read(stream: ByteStream, layout: Layout, *, first: bool, block_bytes: int) -> Iterator[Rows]:
    """The rows of one file.

    Args:
        stream: the file.
        layout: container ``delimited``.
        first: it is the first file of the log, whose header was looked at; a header of the others
            is skipped where it is the same.
        block_bytes: bytes read at a time.

    Raises:
        DataError: another header than the first file's, or a line that is far too long.
    """
    skip = _header_lines(stream, layout, first) if layout.header else 0
    blocks = read_blocks(stream, skip_lines=skip, quoted=layout.quoted, block_bytes=block_bytes)
    for block in blocks:
        yield from _parse(block, layout)


def _header_lines(stream: ByteStream, layout: Layout, first: bool) -> int:
    """Lines to skip: the header and blank ones before it; 0 where a further file has no header."""
    lines = stream.sample.decode("utf-8", "replace").split("\n")
    number = next((i for i, line in enumerate(lines) if line.strip()), 0)
    head = _fields([lines[number].rstrip("\r")], layout, quoted=layout.quoted)[0][1] or []
    found, names = [field.strip() for field in head], list(layout.header or ())
    if not first and found != names and sorted(found) == sorted(names):
        raise DataError(
            f"{stream.file.name}: its columns are in another order than in the first file"
        )
    return number + 1 if first or found == names else 0


def _parse(block: Block, layout: Layout) -> Iterator[Rows]:
    rows = _parse_fast(block, layout)
    if rows is not None:
        yield rows
    elif block.n_lines <= _FEW_LINES:
        yield parse_lines(block, layout)
    else:
        for part in cut_block(block, len(block.data) // _PARTS, quoted=layout.quoted):
            if part.n_lines < block.n_lines:
                yield from _parse(part, layout)
            else:
                yield parse_lines(part, layout)


def _parse_fast(block: Block, layout: Layout) -> Rows | None:
    """The block as polars reads it, or None unless every line became one row with all it needs."""
    import polars as pl

    data, separator = block.data, layout.delimiter.encode()
    if separator == b" ":
        data = _single_spaces(data)
    elif len(separator) > 1:
        data, separator = data.replace(separator, _SEPARATOR), _SEPARATOR
    by_index = {column.index: column for column in layout.columns.values()}
    schema = {
        f"column_{i + 1}": getattr(
            pl, _DTYPES.get(by_index[i].kind, "String") if i in by_index else "String"
        )
        for i in range(layout.n_fields)
    }
    try:
        frame = pl.read_csv(
            data,
            has_header=False,
            schema=schema,
            columns=sorted(by_index),
            separator=separator.decode("latin-1"),
            quote_char='"' if _may_quote(block, layout) else None,
        )
    except pl.exceptions.PolarsError:
        return None
    frame = frame.select(
        pl.col(f"column_{column.index + 1}").alias(role) for role, column in layout.columns.items()
    )
    if frame.height != block.n_lines:
        return None
    if any(frame[role].null_count() for role in layout.columns if role != "category"):
        return None
    return Rows(frame, None, lambda i: (block.first_line + i, _line(block, i)))


def _may_quote(block: Block, layout: Layout) -> bool:
    return layout.quoted or (layout.delimiter in ",;" and b'"' in block.data)


def _single_spaces(data: bytes) -> bytes:
    """Runs of spaces and tabs as one space, none at the ends of lines."""
    data = data.replace(b"\t", b" ").replace(b"\r\n", b"\n")
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return data.replace(b" \n", b"\n").replace(b"\n ", b"\n").removeprefix(b" ")


def _line(block: Block, index: int) -> str:
    return block.data.split(b"\n", index + 1)[index].decode("utf-8", "replace").rstrip("\r")


def parse_lines(block: Block, layout: Layout) -> Rows:
    """The same columns, as text, of a block that holds at least one bad line."""
    import polars as pl

    lines = block.data.decode("utf-8", "replace").split("\n")[:-1]
    found = _fields(lines, layout, quoted=_may_quote(block, layout))
    needed = max(column.index for role, column in layout.columns.items() if role != "category")
    problem = np.zeros(len(found), np.uint8)
    for row, (_, fields) in enumerate(found):
        if fields == []:
            problem[row] = CODES["blank"]
        elif fields is None or not needed < len(fields) <= layout.n_fields:
            problem[row] = CODES["fields"]
    columns = {
        role: pl.Series(
            [
                f[column.index] if f is not None and column.index < len(f) else None
                for _, f in found
            ],
            dtype=pl.String,
        )
        for role, column in layout.columns.items()
    }

    def where(row: int) -> tuple[int, str]:
        line = found[row][0]
        return block.first_line + line, lines[line].rstrip("\r")

    return Rows(pl.DataFrame(columns), problem, where)


def _fields(
    lines: list[str], layout: Layout, *, quoted: bool = False
) -> list[tuple[int, list[str] | None]]:
    """(index of the line, fields) of each row; no field of a blank line, None for bad quotes."""
    if not quoted:
        delimiter = layout.delimiter
        return [
            (i, split_line(line.rstrip("\r"), delimiter) if line.strip() else [])
            for i, line in enumerate(lines)
        ]
    found: list[tuple[int, list[str] | None]] = []
    start = 0
    while start < len(lines):
        reader = csv.reader(
            (line + "\n" for line in lines[start:]), delimiter=layout.delimiter, strict=True
        )
        begin = start
        try:
            for fields in reader:
                blank = not fields or (len(fields) == 1 and not fields[0].strip())
                found.append((begin, [] if blank else fields))
                begin = start + reader.line_num
            return found
        except csv.Error:
            found.append((begin, None))
            start = begin + 1
    return found

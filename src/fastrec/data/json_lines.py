"""Logs with one JSON object a line; objects as Python prints them (single quotes) are taken too."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastrec.data.blocks import Block, read_blocks
from fastrec.data.layout import Layout
from fastrec.data.rows import CODES, Rows
from fastrec.data.streams import ByteStream


def parse_object(line: str) -> dict[str, Any] | None:
    """The object of one line, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def as_text(value: object) -> str | None:
    """A value of an object as a column holds it; None for null."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str)


def read(stream: ByteStream, layout: Layout, *, block_bytes: int) -> Iterator[Rows]:
    """The rows of one file, all columns as text."""
    for block in read_blocks(stream, block_bytes=block_bytes):
        yield _parse_fast(block, layout) or _parse_lines(block, layout)


def _parse_fast(block: Block, layout: Layout) -> Rows | None:
    import polars as pl

    names = {role: column.name or "" for role, column in layout.columns.items()}
    try:
        frame = pl.read_ndjson(block.data, schema=dict.fromkeys(names.values(), pl.String))
    except pl.exceptions.PolarsError:
        return None
    if frame.height != block.n_lines:
        return None
    frame = frame.select(pl.col(name).alias(role) for role, name in names.items())
    return Rows(
        frame,
        None,
        lambda i: (
            block.first_line + i,
            block.data.split(b"\n", i + 1)[i].decode("utf-8", "replace"),
        ),
    )


def _parse_lines(block: Block, layout: Layout) -> Rows:
    import polars as pl

    lines = block.data.decode("utf-8", "replace").split("\n")[:-1]
    objects = [parse_object(line) for line in lines]
    problem = np.zeros(len(lines), np.uint8)
    for i, value in enumerate(objects):
        if value is None:
            problem[i] = CODES["json" if lines[i].strip() else "blank"]
    columns = {
        role: pl.Series(
            [None if value is None else as_text(value.get(column.name or "")) for value in objects],
            dtype=pl.String,
        )
        for role, column in layout.columns.items()
    }
    return Rows(pl.DataFrame(columns), problem, lambda i: (block.first_line + i, lines[i]))

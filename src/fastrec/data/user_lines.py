"""Logs with one line a user: ``user item item ...``, in time order."""

from __future__ import annotations

from collections.abc import Iterator

from fastrec.data.blocks import Block, read_blocks, split_line
from fastrec.data.layout import Layout
from fastrec.data.rows import Rows
from fastrec.data.streams import ByteStream

MAX_BLOCK_BYTES = 1 << 20
"""Lines are taken apart in Python, so that less is held at a time."""


def read(stream: ByteStream, layout: Layout, *, block_bytes: int) -> Iterator[Rows]:
    """The rows of one file: an event for each item of a line."""
    for block in read_blocks(stream, block_bytes=min(block_bytes, MAX_BLOCK_BYTES)):
        yield _parse(block, layout)


def _parse(block: Block, layout: Layout) -> Rows:
    import polars as pl

    lines = block.data.decode("utf-8", "replace").split("\n")[:-1]
    users: list[str] = []
    items: list[str] = []
    numbers: list[int] = []
    for number, line in enumerate(lines):
        user, *events = split_line(line.strip(), layout.delimiter) if line.strip() else [""]
        users += [user] * len(events)
        items += events
        numbers += [number] * len(events)
    frame = pl.DataFrame(
        {"user": users, "item": items}, schema={"user": pl.String, "item": pl.String}
    )
    return Rows(frame, None, lambda i: (block.first_line + numbers[i], lines[numbers[i]]))

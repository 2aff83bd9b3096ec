"""Logs of any size and row order -> memory-mapped per-user sequences.

Two passes, each in bounded memory. The first parses the file block by block, collects the item
table, and appends each row to one of at most 256 bucket files chosen by a hash of its user. The
second sorts one bucket at a time by (user, time, original order) and keeps the latest events of
each user. Users are numbered in the order of their hash, so neither the order of the rows nor the
number of buckets changes the result, and any first N users are a fair sample.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time as clock
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastrec.data.idmap import ItemIndex, ItemTable, with_padding
from fastrec.data.parse import (
    BLOCK_BYTES,
    REASONS,
    TAOBAO_WINDOW,
    check_format,
    describe_first_bad,
    parse_block,
    polars,
    read_blocks,
)
from fastrec.data.storage import FolderWriter
from fastrec.errors import ArgumentError, DataError

if TYPE_CHECKING:
    import polars as pl

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; a stage ends when done == total."""

TARGETS = 2
"""Events kept beyond ``max_history``: the test target, and the valid target before it."""

MIN_EVENTS_FOR_TARGETS = 3
"""A user with fewer events has neither a valid nor a test example (SASRec's rule)."""

_RECORD = np.dtype([("user", "<u8"), ("item", "<i8"), ("time", "<i8"), ("behaviour", "u1")])
_BYTES_PER_ROW = {"taobao": 30, "user-item": 8}
_ROWS_PER_BUCKET = 400_000
_SLICE_ROWS = 2_000_000
_MAX_BUCKET_BITS = 8
_MASK64 = (1 << 64) - 1
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_INV1, _INV2 = pow(_MUL1, -1, 1 << 64), pow(_MUL2, -1, 1 << 64)


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare` read, refused and wrote.

    Attributes:
        source, out, format: as given.
        rows: lines that are neither blank nor a header; ``kept + sum(rejected.values())``.
        kept: rows taken into the catalogue, the counts and the sequences.
        rejected: refused rows by reason (fields, integer, behaviour, window).
        blank_lines: lines of white space only; not rows.
        users, items, categories: how many real ones (tables have one row more, for padding).
        stored_events: events in the sequences (the latest ``max_history + 2`` of each user).
        users_with_test: users with at least three events, hence a valid and a test example.
        item_category_conflicts: items seen under several categories (the smallest id is kept).
        seconds, rows_per_s, source_bytes, out_bytes: cost.
    """

    source: str
    out: str
    format: str
    max_history: int
    window: tuple[int, int] | None
    rows: int
    kept: int
    rejected: dict[str, int]
    blank_lines: int
    users: int
    items: int
    categories: int
    stored_events: int
    users_with_test: int
    item_category_conflicts: int
    seconds: float
    rows_per_s: float
    source_bytes: int
    out_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "taobao",
    max_history: int = 100,
    strict: bool = False,
    window: tuple[int, int] | None = TAOBAO_WINDOW,
    force: bool = False,
    progress: Progress | None = None,
) -> PrepareReport:
    """Turn a log into a folder that :meth:`SequenceDataset.open` maps.

    Args:
        source: ``taobao``: ``user,item,category,behaviour,time`` lines (integers; behaviour one of
            pv, cart, fav, buy; time in seconds since 1970), rows in any order. ``user-item``:
            SASRec's ``user item`` lines, in time order; category and behaviour are 1.
        out: folder to create; it appears whole, at the end, or not at all.
        max_history: events of history to keep for each user, beside the two targets.
        strict: raise on the first refused row instead of counting it.
        window: first and last time taken, inclusive; None takes every time. Not used for
            ``user-item``.
        force: replace an existing data set at ``out``, once the new one is complete.
        progress: called with ("read", bytes done, bytes) and ("sort", buckets done, buckets).

    Raises:
        ArgumentError: a bad argument, or ``out`` exists and ``force`` is not set.
        DataError: the file cannot be read, has no usable row, or (strict) a refused row; names the
            file and, where there is one, the line.
    """
    polars()
    check_format(format)
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if max_history < 1:
        raise ArgumentError("max_history", ">= 1", max_history)
    if window is not None and window[0] > window[1]:
        raise ArgumentError("window", "(first, last) with first <= last", window)
    started = clock.monotonic()
    with FolderWriter(out, force=force) as writer:
        reader = _Reader(path, format, None if format == "user-item" else window, strict)
        buckets, index = reader.partition(writer.path / "buckets", progress)
        stored = _write_sequences(buckets, index, writer, max_history + TARGETS, progress)
        shutil.rmtree(writer.path / "buckets")
        meta = {
            "history_length": max_history,
            "source_format": format,
            "window": None if reader.window is None else list(reader.window),
            "rows": reader.rows,
            "kept": reader.kept,
            "rejected": reader.rejected,
            "blank_lines": reader.blank,
            "item_category_conflicts": index.conflicts,
            "n_users": stored.users,
            "n_items": len(index.item_ids),
            "n_categories": len(index.category_ids),
            "stored_events": stored.events,
            "users_with_test": stored.with_test,
        }
        writer.commit(meta)
    seconds = clock.monotonic() - started
    return PrepareReport(
        source=str(path),
        out=str(out),
        format=format,
        max_history=max_history,
        window=reader.window,
        rows=reader.rows,
        kept=reader.kept,
        rejected=reader.rejected,
        blank_lines=reader.blank,
        users=stored.users,
        items=len(index.item_ids) - 1,
        categories=len(index.category_ids) - 1,
        stored_events=stored.events,
        users_with_test=stored.with_test,
        item_category_conflicts=index.conflicts,
        seconds=seconds,
        rows_per_s=reader.rows / max(seconds, 1e-9),
        source_bytes=path.stat().st_size,
        out_bytes=sum(file.stat().st_size for file in Path(out).iterdir()),
    )


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MUL1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MUL2)
    return values ^ (values >> np.uint64(31))


def unmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Inverse of :func:`mix64`."""

    def unshift(words: NDArray[np.uint64], by: int) -> NDArray[np.uint64]:
        return words ^ (words >> np.uint64(by)) ^ (words >> np.uint64(2 * by))

    values = unshift(values, 31) * np.uint64(_INV2)
    values = unshift(values, 27) * np.uint64(_INV1)
    return unshift(values, 30)


class _Reader:
    """First pass: parse, count, collect the items, and spread the rows over the buckets."""

    def __init__(
        self, path: Path, format: str, window: tuple[int, int] | None, strict: bool
    ) -> None:
        self.path, self.format, self.window, self.strict = path, format, window, strict
        self.kept = self.rows = self.blank = 0
        self.rejected = dict.fromkeys(REASONS[1:], 0)

    def partition(self, folder: Path, progress: Progress | None) -> tuple[list[Path], ItemIndex]:
        folder.mkdir()
        size = self.path.stat().st_size
        rows = size // _BYTES_PER_ROW[self.format]
        bits = min(max(rows // _ROWS_PER_BUCKET, 1).bit_length(), _MAX_BUCKET_BITS)
        paths = [folder / f"{i:03d}" for i in range(1 << bits)]
        table = ItemTable()
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(path.open("wb")) for path in paths]
            for block in read_blocks(self.path, self.format, BLOCK_BYTES):
                frame = parse_block(block, self.format, self.window)
                if self.strict and (first_bad := describe_first_bad(self.path, block, frame)):
                    raise DataError(first_bad)
                frame = self._take(frame)
                if frame.height:
                    table.add(frame)
                    self._append(frame, files, bits)
                    self.kept += frame.height
                if progress:
                    progress("read", block.end_byte, size)
        if not self.kept:
            detail = ", ".join(f"{count} {reason}" for reason, count in self.rejected.items())
            found = f"{self.rows} rows, all refused: {detail}" if self.rows else "it is empty"
            raise DataError(f"{self.path}: no usable row in format {self.format!r} ({found})")
        return paths, table.finish()

    def _take(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The good rows; the others are counted."""
        counts = np.bincount(frame["reason"].to_numpy(), minlength=len(REASONS) + 1)
        self.blank += int(counts[1])
        self.rows += frame.height - int(counts[1])
        for reason, count in zip(REASONS[1:], counts[2:], strict=True):
            self.rejected[reason] += int(count)
        return frame if counts[0] == frame.height else frame.filter(frame["reason"] == 0)

    def _append(self, frame: pl.DataFrame, files: list[BinaryIO], bits: int) -> None:
        records = np.empty(frame.height, _RECORD)
        # int64 -> the same 64 bits unsigned, so that negative user ids are as good as any
        user = mix64(frame["user"].to_numpy().view(np.uint64))
        bucket = (user >> np.uint64(64 - bits)).astype(np.uint8)
        # Stable, so each bucket keeps the order of the file: equal times are broken by it.
        order = np.argsort(bucket, kind="stable")
        records["user"] = user[order]
        records["item"] = frame["item"].to_numpy()[order]
        if self.format == "user-item":
            records["time"] = order + self.kept
        else:
            records["time"] = frame["time"].to_numpy()[order]
        records["behaviour"] = frame["behaviour"].to_numpy()[order]
        data = records.view(np.uint8).data
        ends = np.cumsum(np.bincount(bucket, minlength=len(files))) * _RECORD.itemsize
        start = 0
        for file, end in zip(files, ends.tolist(), strict=True):
            if end > start:
                file.write(data[start:end])
            start = end


@dataclass
class _Stored:
    users: int = 0
    events: int = 0
    with_test: int = 0


def _latest(frame: pl.DataFrame, keep: int) -> pl.DataFrame:
    """Rows sorted by (user, time, order in ``frame``), the latest ``keep`` of each user."""
    import polars as pl

    # A unique last key makes polars' faster unstable sort deterministic.
    frame = frame.with_row_index("order").sort("user", "time", "order").drop("order")
    user = frame["user"].to_numpy()
    ends = np.append(np.flatnonzero(user[1:] != user[:-1]) + 1, len(user))
    lengths = np.diff(ends, prepend=0)
    if lengths.max() <= keep:
        return frame
    from_end = np.repeat(ends, lengths) - np.arange(len(user))
    return frame.filter(pl.Series(from_end <= keep))


def _read_bucket(path: Path, keep: int) -> pl.DataFrame:
    """The kept events of one bucket. A bucket swollen by a few huge users is read in slices."""
    import polars as pl

    merged: pl.DataFrame | None = None
    with path.open("rb") as file:
        while True:
            records = np.fromfile(file, _RECORD, _SLICE_ROWS)
            if not len(records):
                break
            names = _RECORD.names
            assert names is not None
            part = pl.DataFrame({name: np.ascontiguousarray(records[name]) for name in names})
            merged = _latest(part if merged is None else pl.concat([merged, part]), keep)
    path.unlink()
    if merged is None:
        return pl.DataFrame(schema={"user": pl.UInt64})
    return merged


def _write_sequences(
    buckets: list[Path],
    index: ItemIndex,
    writer: FolderWriter,
    keep: int,
    progress: Progress | None,
) -> _Stored:
    """Second pass: sort, cut and write each bucket; then the tables."""
    stored = _Stored()
    items, behaviours = writer.array("items", np.int32), writer.array("behaviours", np.uint8)
    times, offsets = writer.array("times", np.int64), writer.array("offsets", np.int64)
    offsets.append(np.zeros(1, np.int64))
    users: list[NDArray[np.uint64]] = []
    # Popularity is of the train part only: every event but the two targets of each user.
    train_count = index.count.copy()
    for number, path in enumerate(buckets):
        frame = _read_bucket(path, keep)
        if frame.height:
            user = frame["user"].to_numpy()
            ends = np.append(np.flatnonzero(user[1:] != user[:-1]) + 1, len(user))
            dense = index.dense(frame["item"].to_numpy())
            has_test = np.diff(ends, prepend=0) >= MIN_EVENTS_FOR_TARGETS
            for back in range(1, TARGETS + 1):
                np.subtract.at(train_count, dense[ends[has_test] - back], 1)
            items.append(dense)
            behaviours.append(frame["behaviour"].to_numpy())
            times.append(frame["time"].to_numpy())
            offsets.append(ends + stored.events)
            users.append(user[ends - 1])
            stored.users += len(ends)
            stored.events += len(user)
            stored.with_test += int(has_test.sum())
        if progress:
            progress("sort", number + 1, len(buckets))
    writer.write("user_ids", with_padding(unmix64(np.concatenate(users)).view(np.int64)))
    writer.write("item_ids", index.item_ids)
    writer.write("item_category", index.item_category)
    writer.write("item_count", train_count)
    writer.write("category_ids", index.category_ids)
    return stored

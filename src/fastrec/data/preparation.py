"""Logs of any size and row order -> memory-mapped per-user sequences.

Two passes, each in bounded memory. The first reads the log block by block, collects the item table,
and appends each row to one of at most 256 bucket files chosen by a hash of its user. The second
sorts one bucket at a time by (user, time, original order) and keeps the latest events of each user.
Users are numbered in the order of their hash, so neither the order of the rows nor the number of
buckets changes the result, and any first N users are a fair sample.
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

from fastrec.data.blocks import BLOCK_BYTES
from fastrec.data.hashing import mix64, unmix64
from fastrec.data.idmap import ItemIndex, ItemTable, with_padding
from fastrec.data.layout import ReadOptions
from fastrec.data.reader import LogReader, Progress, Source
from fastrec.data.storage import FolderWriter
from fastrec.data.text_ids import TextIds
from fastrec.errors import ArgumentError

if TYPE_CHECKING:
    import polars as pl

TARGETS = 2
"""Events kept beyond ``max_history``: the test target, and the valid target before it."""

MIN_EVENTS_FOR_TARGETS = 3
"""A user with fewer events has neither a valid nor a test example (SASRec's rule)."""

_RECORD = np.dtype([("user", "<u8"), ("item", "<i8"), ("time", "<i8"), ("behaviour", "u1")])
_ROWS_PER_BUCKET = 400_000
_SLICE_ROWS = 2_000_000
_MAX_BUCKET_BITS = 8
_FEW_ITEMS = 50


@dataclass(frozen=True)
class PrepareReport:
    """Counts of one :func:`prepare`.

    Attributes:
        source, out, max_history, window: as given.
        read_as: the layout, as found or stated.
        rows: rows read (a blank line or a header is none); ``kept + sum(rejected.values())``.
        kept: rows taken into the catalogue, the counts and the sequences.
        rejected: refused rows by reason (:data:`fastrec.data.rows.REASONS`).
        first_rejected: reason -> the first such row: place, what was expected, what would read it.
        blank_lines: lines of white space only; not rows.
        users, items, categories: how many real ones (tables have one row more, for padding).
        behaviours: name -> stored events, in the order of their ids from 1.
        stored_events: events in the sequences (the latest ``max_history + 2`` of each user).
        duplicates: stored events that repeat another one in user, item, behaviour and time; kept.
        users_with_test: users with at least three events, hence a valid and a test example.
        item_category_conflicts: items seen under several categories (the smallest id is kept).
        notes: sentences on what a user of the data set should know.
        seconds, rows_per_s, source_bytes, out_bytes: cost.
    """

    source: str
    out: str
    read_as: str
    max_history: int
    window: tuple[int, int] | None
    rows: int
    kept: int
    rejected: dict[str, int]
    first_rejected: dict[str, str]
    blank_lines: int
    users: int
    items: int
    categories: int
    behaviours: dict[str, int]
    stored_events: int
    duplicates: int
    users_with_test: int
    item_category_conflicts: int
    notes: list[str]
    seconds: float
    rows_per_s: float
    source_bytes: int
    out_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    *,
    options: ReadOptions | None = None,
    max_history: int = 100,
    strict: bool = False,
    window: tuple[int, int] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> PrepareReport:
    """Turn a log into a folder that :meth:`SequenceDataset.open` maps.

    Args:
        source: a file, folder, pattern (``parts/*.csv``) or ``-`` for standard input, or several:
            CSV and other delimited text, JSON lines, Parquet, or one line a user; text may be
            compressed (gzip, bzip2, xz, zip, zstd). Rows in any order where there are times, else
            oldest first.
        out: folder to create; it appears whole, at the end, or not at all.
        options: how to read the log, where that should not be found by looking.
        max_history: events of history to keep for each user, beside the two targets.
        strict: raise on the first refused row instead of counting it.
        window: first and last time taken, in seconds since 1970, inclusive; None takes every time.
        force: replace an existing data set at ``out``, once the new one is complete.
        progress: called with ("read", bytes done, bytes) and ("sort", buckets done, buckets).
        tell: called with one line, how the log is read, before it is.

    Raises:
        ArgumentError: a bad argument, or ``out`` exists and ``force`` is not set.
        DataError: the log cannot be read, has no usable row, or (strict) a refused row; names
            the file and, where there is one, the line.
    """
    if max_history < 1:
        raise ArgumentError("max_history", ">= 1", max_history)
    started = clock.monotonic()
    with (
        LogReader(source, options, window=window, strict=strict) as reader,
        FolderWriter(out, force=force) as writer,
    ):
        read_as = reader.layout.describe()
        if tell is not None:
            tell(f"read as: {read_as}")
        buckets, index = _partition(reader, writer.path / "buckets", progress)
        stored = _write_sequences(reader, buckets, index, writer, max_history + TARGETS, progress)
        shutil.rmtree(writer.path / "buckets")
        counts: dict[str, Any] = {
            "read_as": read_as,
            "window": reader.window,
            "rows": reader.rows,
            "kept": reader.kept,
            "rejected": reader.rejected,
            "blank_lines": reader.blank,
            "item_category_conflicts": index.conflicts,
            "stored_events": stored.events,
            "duplicates": stored.duplicates,
            "users_with_test": stored.with_test,
        }
        writer.commit(
            {
                **counts,
                "history_length": max_history,
                "behaviours": list(stored.behaviours),
                "n_users": stored.users,
                "n_items": len(index.item_ids),
                "n_categories": len(index.category_ids),
            }
        )
    seconds = clock.monotonic() - started
    return PrepareReport(
        source=_names([file.name for file in reader.files]),
        out=str(out),
        max_history=max_history,
        first_rejected=reader.first_rejected,
        users=stored.users,
        items=len(index.item_ids) - 1,
        categories=len(index.category_ids) - 1,
        behaviours=stored.behaviours,
        notes=_notes(reader, stored, index),
        seconds=seconds,
        rows_per_s=reader.rows / max(seconds, 1e-9),
        source_bytes=reader.total_bytes,
        out_bytes=sum(file.stat().st_size for file in Path(out).iterdir()),
        **counts,
    )


def _names(files: list[str], shown: int = 3) -> str:
    more = len(files) - shown
    return ", ".join(files[:shown]) + (f" and {more} more" if more > 0 else "")


def _notes(reader: LogReader, stored: _Stored, index: ItemIndex) -> list[str]:
    """Properties of a log that change what can be done with it."""
    notes = []
    if short := stored.users - stored.with_test:
        notes.append(
            f"{short:,} of {stored.users:,} users have fewer than {MIN_EVENTS_FOR_TARGETS} events: "
            "all are training events, without a valid or test example"
        )
    if (items := len(index.item_ids) - 1) < _FEW_ITEMS:
        notes.append(
            f"{items} items: evaluation ranks all of them, not {_FEW_ITEMS} candidates; batches "
            f"hold at most {items} (n_candidates)"
        )
    if stored.duplicates:
        notes.append(
            f"{stored.duplicates:,} stored events repeat another one (same user, item, behaviour "
            "and time): kept"
        )
    if "time" in reader.layout.columns and stored.first_time == stored.last_time:
        notes.append("all events have the same time: the rows of a user count as oldest first")
    if reader.layout.time_unit == "number":
        notes.append("the times are plain numbers: good for the order of events, not as dates")
    if index.conflicts:
        notes.append(
            f"items under several categories, which have the smallest id: {index.conflicts:,}"
        )
    return notes


def _partition(
    reader: LogReader, folder: Path, progress: Progress | None
) -> tuple[list[Path], ItemIndex]:
    """First pass: collect the items, and spread the rows over the buckets."""
    folder.mkdir()
    bits = min(max(reader.estimated_rows // _ROWS_PER_BUCKET, 1).bit_length(), _MAX_BUCKET_BITS)
    paths = [folder / f"{i:03d}" for i in range(1 << bits)]
    table, done = ItemTable(), 0
    with ExitStack() as stack:
        files: list[BinaryIO] = [stack.enter_context(path.open("wb")) for path in paths]
        for frame in reader.frames(progress, BLOCK_BYTES):
            table.add(frame)
            _append(frame, files, bits, None if "time" in reader.layout.columns else done)
            done += frame.height
    return paths, table.finish()


def _append(frame: pl.DataFrame, files: list[BinaryIO], bits: int, first_row: int | None) -> None:
    """Write rows to their users' buckets; those without times are numbered from ``first_row``."""
    records = np.empty(frame.height, _RECORD)
    # int64 -> the same 64 bits unsigned, so that negative user ids are as good as any
    user = mix64(frame["user"].to_numpy().view(np.uint64))
    bucket = (user >> np.uint64(64 - bits)).astype(np.uint8)
    # Stable, so each bucket keeps the order of the file: equal times are broken by it.
    order = np.argsort(bucket, kind="stable")
    records["user"] = user[order]
    records["item"] = frame["item"].to_numpy()[order]
    records["time"] = frame["time"].to_numpy()[order] if first_row is None else order + first_row
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
    """Counts of the second pass; times in seconds."""

    behaviours: dict[str, int]
    users: int = 0
    events: int = 0
    with_test: int = 0
    duplicates: int = 0
    first_time: int = 1 << 62
    last_time: int = -(1 << 62)


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


def _duplicates(frame: pl.DataFrame) -> int:
    """Events of a sorted bucket that repeat another one of the same user and time."""
    user, time = frame["user"].to_numpy(), frame["time"].to_numpy()
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    if not same.any():
        return 0
    tied = np.zeros(len(user), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    ties = frame.filter(tied)
    return ties.height - ties.n_unique()


def _write_sequences(
    reader: LogReader,
    buckets: list[Path],
    index: ItemIndex,
    writer: FolderWriter,
    keep: int,
    progress: Progress | None,
) -> _Stored:
    """Second pass: sort, cut and write each bucket; then the tables."""
    names, final_behaviour = reader.behaviours()
    has_time = "time" in reader.layout.columns
    stored = _Stored(dict.fromkeys(names, 0))
    items, behaviours = writer.array("items", np.int32), writer.array("behaviours", np.uint8)
    times, offsets = writer.array("times", np.int64), writer.array("offsets", np.int64)
    offsets.append(np.zeros(1, np.int64))
    users: list[NDArray[np.uint64]] = []
    n_of_behaviour = np.zeros(len(names) + 1, np.int64)
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
            behaviour = final_behaviour[frame["behaviour"].to_numpy()]
            seconds = frame["time"].to_numpy()
            if reader.normaliser.ticks > 1:
                seconds = seconds // reader.normaliser.ticks
            items.append(dense)
            behaviours.append(behaviour)
            times.append(seconds)
            offsets.append(ends + stored.events)
            users.append(user[ends - 1])
            n_of_behaviour += np.bincount(behaviour, minlength=len(n_of_behaviour))
            stored.users += len(ends)
            stored.events += len(user)
            stored.with_test += int(has_test.sum())
            stored.duplicates += _duplicates(frame) if has_time else 0
            stored.first_time = min(stored.first_time, int(seconds.min()))
            stored.last_time = max(stored.last_time, int(seconds.max()))
        if progress:
            progress("sort", number + 1, len(buckets))
    stored.behaviours = dict(zip(names, n_of_behaviour[1:].tolist(), strict=True))
    user_ids = with_padding(unmix64(np.concatenate(users)).view(np.int64))
    for role, ids in (
        ("user", user_ids),
        ("item", index.item_ids),
        ("category", index.category_ids),
    ):
        writer.write(f"{role}_ids", ids)
        if role in reader.normaliser.texts:
            _write_texts(writer, role, reader.normaliser.texts[role], ids[1:])
    writer.write("item_category", index.item_category)
    writer.write("item_count", train_count)
    return stored


def _write_texts(writer: FolderWriter, role: str, texts: TextIds, keys: NDArray[np.int64]) -> None:
    """The texts of ids, one after another, and where each ends."""
    text = writer.array(f"{role}_text", np.uint8)
    offsets = writer.array(f"{role}_text_offsets", np.int64)
    offsets.append(np.zeros(1, np.int64))
    for data, lengths in texts.encoded(keys):
        offsets.append(text.length + np.cumsum(lengths))
        text.append(data)

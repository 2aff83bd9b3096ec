"""A log of any layout as blocks of normalised rows; what is refused is counted and shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastrec.data import delimited, detection, json_lines, parquet, user_lines
from fastrec.data.behaviours import BEHAVIOURS
from fastrec.data.blocks import BLOCK_BYTES
from fastrec.data.layout import Layout, ReadOptions, require_polars
from fastrec.data.normalisation import Normaliser
from fastrec.data.rows import REASONS, Rows
from fastrec.data.sources import LogFile, find_files
from fastrec.data.streams import ByteStream
from fastrec.errors import ArgumentError, DataError, FastrecError

if TYPE_CHECKING:
    import polars as pl

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, folder, pattern or ``-`` (standard input), or several."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; a stage ends when done == total; a total of 0 is
unknown."""

_SAMPLE_ROWS = 2000
_MANY_ROWS = 1 << 40
_COMPRESSION = 8
_FIELD_BYTES = 4
_BLANK = 1
_SHOWN = 120

_HINTS = {
    "fields": "another delimiter: --delimiter TEXT; a line is a user: --container user-lines",
    "json": "text with delimiters: --container delimited",
    "encoding": "convert it first, e.g. iconv -f latin1 -t utf-8",
    "category": "ids that are no integers: --ids text; without: --columns category=none",
    "behaviour": "without behaviours: --columns behaviour=none",
    "time": "order of the rows instead: --columns time=none; another unit: --time-unit",
    "window": "a wider --window, or none",
}


class LogReader:
    """Reads a log once; a context manager.

    Args:
        source: where it is.
        options: how to read it; what they leave open is found by looking at the first file.
        window: first and last time taken, in seconds since 1970, inclusive; None takes every time.
        strict: raise on the first refused row.

    Attributes:
        files: the files of the log.
        layout: of the log, stated or found.
        is_packed: the first file is compressed.
        rows, kept, blank: rows read, rows taken, blank lines (no rows).
        rejected: refused rows by reason.
        first_rejected: reason -> the first such row, with its place, what was expected and what
            would read it.

    Raises:
        ArgumentError, DataError: see :func:`fastrec.data.sources.find_files`.
    """

    def __init__(
        self,
        source: Source,
        options: ReadOptions | None = None,
        *,
        window: tuple[int, int] | None = None,
        strict: bool = False,
    ) -> None:
        require_polars()
        if window is not None and window[0] > window[1]:
            raise ArgumentError("window", "(first, last) with first <= last", window)
        sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
        self.files = find_files(sources)
        self.options = options or ReadOptions()
        self.strict, self._window = strict, window
        self.rows = self.kept = self.blank = 0
        self.rejected = dict.fromkeys(REASONS[1:], 0)
        self.first_rejected: dict[str, str] = {}
        self._stream: ByteStream | None = None
        self.is_packed = False
        try:
            self.layout = self._open()
        except FastrecError:
            self.close()
            raise
        self.normaliser = Normaliser(self.layout, self.options, window)

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that was opened to look at it, where its rows were never asked for."""
        if self._stream is not None:
            self._stream.close()

    @property
    def total_bytes(self) -> int:
        """Bytes of the files on disk."""
        return sum(file.size for file in self.files)

    @property
    def window(self) -> tuple[int, int] | None:
        """The window where the log has times to hold against it."""
        return self._window if "time" in self.layout.columns else None

    @property
    def estimated_rows(self) -> int:
        """A guess, from above, of the rows of the log; of standard input a large one."""
        if self.files[0].path is None:
            return _MANY_ROWS
        unpacked = self.total_bytes * (_COMPRESSION if self.is_packed else 1)
        if self.layout.container == "delimited":
            return unpacked // (_FIELD_BYTES * self.layout.n_fields)
        return unpacked // _FIELD_BYTES

    def behaviours(self) -> tuple[list[str], NDArray[np.uint8]]:
        """Names of the ids 1, 2, ... in the data set, and the table from ids in ``frames`` to it.

        Call it after :meth:`frames`.
        """
        if "behaviour" in self.layout.columns:
            return self.normaliser.vocabulary.final()
        return list(BEHAVIOURS), np.arange(2, dtype=np.uint8)

    def _open(self) -> Layout:
        """The layout, from the first file that holds something."""
        for number, file in enumerate(self.files):
            self._stream = stream = ByteStream(file)
            if stream.is_parquet or stream.sample.strip() or number == len(self.files) - 1:
                self.files = self.files[number:]
                self.is_packed = stream.is_packed
                if stream.is_parquet:
                    columns = parquet.sample(_path(file), _SAMPLE_ROWS)
                    return detection.look_parquet(file.name, columns, self.options)
                return detection.look(stream, self.options)
            stream.close()
        raise DataError(f"{self.files[0].name}: no usable row")

    def frames(
        self, progress: Progress | None = None, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[pl.DataFrame]:
        """The good rows, block by block: Int64 user, item, category (null = none), time (in
        ``normaliser.ticks`` a second) and UInt8 behaviour (of ``normaliser.vocabulary``).

        Args:
            progress: called with ("read", bytes done, bytes).
            block_bytes: bytes read at a time.

        Raises:
            DataError: a file cannot be read; no row is usable; (strict) a row is refused.
        """
        done, total = 0, self.total_bytes
        for file in self.files:
            first = self._stream is not None
            stream = self._stream or ByteStream(file)
            self._stream = None
            with stream:
                for rows in self._rows(stream, first, block_bytes):
                    frame = self._take(rows, file)
                    if frame.height:
                        self.kept += frame.height
                        yield frame
                    if progress:
                        progress("read", min(done + stream.position, total), total)
            done += file.size
        if not self.kept:
            raise DataError(f"{self.files[0].name}: no usable row ({self._nothing()})")
        if progress:
            progress("read", total, total)

    def _rows(self, stream: ByteStream, first: bool, block_bytes: int) -> Iterator[Rows]:
        if stream.is_parquet != (self.layout.container == "parquet"):
            raise DataError(f"{stream.file.name}: Parquet and text files in one log")
        if stream.is_parquet:
            return parquet.read(_path(stream.file), self.layout)
        if self.layout.container == "json":
            return json_lines.read(stream, self.layout, block_bytes=block_bytes)
        if self.layout.container == "user-lines":
            return user_lines.read(stream, self.layout, block_bytes=block_bytes)
        return delimited.read(stream, self.layout, first=first, block_bytes=block_bytes)

    def _take(self, rows: Rows, file: LogFile) -> pl.DataFrame:
        """The good rows; the others are counted."""
        frame, reason = self.normaliser(rows)
        counts = np.bincount(reason, minlength=len(REASONS) + 1)
        self.blank += int(counts[_BLANK])
        self.rows += frame.height - int(counts[_BLANK])
        for code, count in enumerate(counts[2:].tolist(), 2):
            name = REASONS[code - 1]
            if count and name not in self.first_rejected:
                line, text = rows.where(int(np.argmax(reason == code)))
                where = f"{file.name}:{line}: {self._expected(name)}: {text[:_SHOWN]!r}"
                hint = self._hint(name)
                self.first_rejected[name] = f"{where} ({hint})" if hint else where
            self.rejected[name] += count
        if self.strict and reason.max(initial=0) > _BLANK:
            code = int(reason[np.argmax(reason > _BLANK)])
            raise DataError(self.first_rejected[REASONS[code - 1]])
        return frame if counts[0] == frame.height else frame.filter(reason == 0)

    def _expected(self, reason: str) -> str:
        column = self.layout.columns.get(reason)
        unit = self.layout.time_unit
        if reason in ("user", "item", "category") and column is not None:
            return f"{reason} is " + ("empty" if column.kind == "text" else "not a 64-bit integer")
        if reason == "time" and column is not None:
            return "time is not " + (
                f"in the format {column.kind}" if "%" in column.kind else f"a number ({unit})"
            )
        return {
            "fields": f"wrong number of fields (expected {self.layout.n_fields})",
            "json": "not a JSON object",
            "encoding": "not UTF-8",
            "behaviour": "behaviour is empty",
            "window": "time outside the window",
        }[reason]

    def _hint(self, reason: str) -> str:
        if reason in ("user", "item"):
            return (
                "ids that are no integers: --ids text"
                if self.layout.columns[reason].kind != "text"
                else ""
            )
        return _HINTS[reason]

    def _nothing(self) -> str:
        detail = ", ".join(f"{count} {reason}" for reason, count in self.rejected.items() if count)
        first = "; ".join(self.first_rejected.values())
        return (
            f"{self.rows} rows, all refused: {detail}; {first}" if self.rows else "it holds no row"
        )


def _path(file: LogFile) -> Path:
    if file.path is None or file.member is not None:
        raise DataError(f"{file.name}: Parquet is read from files; extract it first")
    return file.path

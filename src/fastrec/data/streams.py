"""The content of one file of a log as a stream of UTF-8 bytes, whatever it is packed in."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import sys
import zipfile
from typing import Any, BinaryIO

from fastrec.data.sources import DAMAGED, LogFile
from fastrec.errors import DataError, FastrecError, MissingDependencyError

SAMPLE_BYTES = 1 << 20

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_UNREADABLE = {
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "HDF5",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"ARROW1": "Arrow IPC",
}
_TAR_MAGIC = slice(257, 262)


class ByteStream:
    """A file's content decompressed, as UTF-8 with ``\\n`` line ends. A context manager.

    Attributes:
        file: where it comes from.
        is_parquet: it is a Parquet file, to be read by its path.
        is_packed: it holds more than its size on disk.
    """

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._archive: zipfile.ZipFile | None = None
        try:
            if file.member is not None and file.path is not None:
                self._archive = zipfile.ZipFile(file.path)
                self._disk: Any = self._archive.open(file.member)
            else:
                self._disk = sys.stdin.buffer if file.path is None else file.path.open("rb")
        except DAMAGED as error:
            raise DataError(f"{file.name}: cannot be opened ({error})") from error
        try:
            self._begin()
        except FastrecError:
            self.close()
            raise

    def _begin(self) -> None:
        start = self._read_some(self._disk, 8)
        self.is_parquet = start.startswith(b"PAR1")
        self.is_packed = (
            self.is_parquet
            or self.file.member is not None
            or any(map(start.startswith, _COMPRESSED))
        )
        for magic, kind in _UNREADABLE.items():
            if start.startswith(magic[:8]):
                raise DataError(
                    f"{self.file.name}: is {kind}, which is not read; convert it to CSV or Parquet"
                )
        self._source = _decompressed(_Joined(start, self._disk), start, self.file)
        self._held = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._carriage_returns = False
        self._look()

    def _look(self) -> None:
        """Read the sample and find out encoding and line ends."""
        raw = b"" if self.is_parquet else self._fill(SAMPLE_BYTES)
        if raw[_TAR_MAGIC] == b"ustar":
            raise DataError(f"{self.file.name}: is a tar archive; extract the log from it")
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self._decoder = codecs.getincrementaldecoder("utf-16")()
        elif b"\x00" in raw:
            raise DataError(
                f"{self.file.name}: is a binary file; CSV, JSON lines and Parquet are read"
            )
        text = self._as_utf8(raw).removeprefix(codecs.BOM_UTF8)
        self._carriage_returns = b"\r" in text[:-1] and b"\n" not in text
        self._held = self._line_ends(text)

    @property
    def sample(self) -> bytes:
        """The first megabyte or less; still to be read."""
        return self._held

    @property
    def position(self) -> int:
        """Bytes taken from the disk so far."""
        try:
            return 0 if self.file.path is None or self._archive else int(self._disk.tell())
        except (OSError, ValueError):
            return 0

    def read(self, size: int) -> bytes:
        """The next bytes, about ``size``; empty at the end."""
        if self._held:
            data, self._held = self._held, b""
            return data
        raw = self._fill(size)
        return self._line_ends(self._as_utf8(raw, final=not raw))

    def _fill(self, size: int) -> bytes:
        parts, left = [], size
        while left > 0:
            part = self._read_some(self._source, left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _read_some(self, source: Any, size: int) -> bytes:
        try:
            return bytes(source.read(size))
        except DAMAGED as error:
            raise DataError(f"{self.file.name}: cut short or damaged ({error})") from error

    def _as_utf8(self, raw: bytes, *, final: bool = False) -> bytes:
        if self._decoder is None:
            return raw
        try:
            return self._decoder.decode(raw, final).encode()
        except UnicodeError as error:
            raise DataError(f"{self.file.name}: not UTF-16 throughout ({error})") from error

    def _line_ends(self, data: bytes) -> bytes:
        return data.replace(b"\r", b"\n") if self._carriage_returns else data

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file (not standard input)."""
        if self.file.path is not None:
            self._disk.close()
        if self._archive is not None:
            self._archive.close()


class _Joined:
    """Bytes that were read to look at them, then the rest of the file."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start, self._rest = start, rest

    def read(self, size: int = -1) -> bytes:
        if self._start:
            size = len(self._start) if size < 0 else size
            data, self._start = self._start[:size], self._start[size:]
            return data
        return self._rest.read(size)


class _Zstd:
    """Frames of zstd, each read to its end (the library's own reader takes a cut file for a whole
    one)."""

    _INPUT = 4096  # what comes of so little fits the memory, whatever it says

    def __init__(self, source: Any, zstandard: Any) -> None:
        self._source, self._library = source, zstandard
        self._frame: Any = None
        self._left = b""

    def read(self, size: int) -> bytes:
        """The next bytes; empty at the end."""
        while True:
            data = self._left or self._source.read(min(size, self._INPUT))
            self._left = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return b""
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                found: bytes = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
            if found:
                return found


def _decompressed(source: Any, start: bytes, file: LogFile) -> Any:
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=source)
    if kind == "bzip2":
        return bz2.BZ2File(source)
    if kind == "xz":
        return lzma.LZMAFile(source)
    if kind == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise MissingDependencyError("zstandard", "data", "Reading .zst files") from error
        return _Zstd(source, zstandard)
    if kind == "zip":
        raise DataError(
            f"{file.name}: a zip archive within another or on standard input; extract it first"
        )
    return source

"""The files of a log: from paths, folders, patterns and archives."""

from __future__ import annotations

import glob
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrec.data.storage import is_prepared
from fastrec.errors import ArgumentError, DataError

STDIN = "-"

DAMAGED = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
)
"""Errors of the libraries that unpack files, for files that are cut short, damaged or encrypted."""


@dataclass(frozen=True)
class LogFile:
    """One file of a log; ``member`` is its name within a zip archive."""

    path: Path | None
    member: str | None = None

    @property
    def name(self) -> str:
        """As shown in messages."""
        if self.path is None:
            return "standard input"
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    @property
    def suffix(self) -> str:
        """The ending of its name without those of compression, lower case."""
        name = Path(self.member or self.path or "")
        while name.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip"):
            name = name.with_suffix("")
        return name.suffix.lower()

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for standard input."""
        return 0 if self.path is None else self.path.stat().st_size


def find_files(sources: Sequence[str | os.PathLike[str]]) -> list[LogFile]:
    """The files of a log, in the order given; those of a folder or glob in the order of their names
    (``part-2`` before ``part-10``), without hidden ones and those that begin with ``_``.

    Args:
        sources: files, folders, patterns such as ``parts/*.csv``, or ``-`` for standard input.

    Raises:
        DataError: nothing there, or a folder holds files of several kinds.
        ArgumentError: no source, or standard input beside others.
    """
    if not sources:
        raise ArgumentError("source", "at least one file, folder or pattern", "none")
    files: list[LogFile] = []
    for source in sources:
        text = os.fspath(source)
        if text == STDIN:
            if len(sources) > 1:
                raise ArgumentError(
                    "source", "'-' (standard input) alone", f"{len(sources)} sources"
                )
            return [LogFile(None)]
        path = Path(text)
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file() and _is_data(file, path)]
            _check_one_kind(path, found)
            paths = sorted(found, key=_natural)
        elif path.exists():
            paths = [path]
        else:
            paths = sorted((Path(name) for name in glob.glob(text, recursive=True)), key=_natural)
            paths = [file for file in paths if file.is_file()]
        if not paths:
            what = "no file in this folder" if path.is_dir() else "no such file"
            raise DataError(f"{text}: {what}")
        for file in paths:
            files += _members(file)
    return files


def _is_data(file: Path, folder: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _natural(path: Path) -> list[Any]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _check_one_kind(folder: Path, files: list[Path]) -> None:
    if is_prepared(folder):
        raise DataError(f"{folder}: is a data set that is prepared already, not a log")
    kinds = {LogFile(file).suffix for file in files}
    if len(kinds) > 1:
        names = ", ".join(sorted(file.name for file in files)[:6])
        raise DataError(f"{folder}: holds files of several kinds ({names}): name those of the log")


def _members(path: Path) -> list[LogFile]:
    """The file itself, or what a zip archive holds."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return [LogFile(path)]
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error})") from error
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except DAMAGED as error:
        raise DataError(f"{path}: a zip archive that is cut short or damaged ({error})") from error
    if "[Content_Types].xml" in names:
        raise DataError(f"{path}: is an office document; save its table as CSV")
    names = [
        name
        for name in names
        if not Path(name).name.startswith((".", "_")) and "__MACOSX" not in name
    ]
    if not names:
        raise DataError(f"{path}: the zip archive holds no file")
    suffixes = {LogFile(path, name).suffix for name in names}
    if len(suffixes) > 1:
        raise DataError(
            f"{path}: holds files of several kinds ({', '.join(names[:6])}): extract the log"
        )
    return [LogFile(path, name) for name in sorted(names, key=lambda name: _natural(Path(name)))]

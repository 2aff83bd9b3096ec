"""A folder of ``.npy`` files that appears whole or not at all.

Everything is written to a draft beside the target, which replaces it at the end (``files.py``). The
manifest, written last, holds the size and CRC-32 of each file, so a cut or altered folder is found
on opening.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastrec.errors import ArgumentError, ArtifactError, DataError
from fastrec.files import draft_folder, install, recover

MANIFEST = "manifest.json"
FORMAT = "fastrec-sequences"
VERSION = 1
SMALL_BYTES = 64 << 20
_CHUNK = 1 << 20


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


class ArrayWriter:
    """Appends to a one-dimensional ``.npy`` whose length is known only at the end."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self._path = path
        self._file: BinaryIO = path.open("wb")
        self._file.write(self._header(0))

    def _header(self, length: int) -> bytes:
        header = io.BytesIO()
        # numpy pads this header so that a longer shape still fits: it is rewritten in place.
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (length,),
            },
        )
        return header.getvalue()

    def append(self, values: NDArray[Any]) -> None:
        """Add values (cast to the file's dtype, which must hold them)."""
        data = np.ascontiguousarray(values, dtype=self.dtype).view(np.uint8).data
        self._file.write(data)
        self.length += len(values)

    def close(self) -> dict[str, int]:
        """Finish the file; returns its size and CRC-32."""
        first, last = self._header(0), self._header(self.length)
        if len(first) != len(last):
            raise ArtifactError(f"{self._file.name}: numpy did not reserve room in the .npy header")
        self._file.seek(0)
        self._file.write(last)
        self._file.close()
        return {"bytes": self._path.stat().st_size, "crc32": crc32_of(self._path)}

    def abandon(self) -> None:
        """Close without finishing."""
        with contextlib.suppress(OSError):  # a full disk refuses the rest of the buffer again
            self._file.close()


class FolderWriter:
    """Context manager for the new folder; leaving it without :meth:`commit` removes every trace.

    Args:
        out: the folder to create.
        force: replace an existing data set. Anything else at ``out`` is refused, never deleted.
    """

    def __init__(self, out: str | os.PathLike[str], *, force: bool = False) -> None:
        self.out = Path(out).absolute()
        self._force = force
        self._writers: dict[str, ArrayWriter] = {}
        self._check_target()
        if not self.out.parent.is_dir():
            raise ArgumentError("out", "a path in an existing folder", f"'{out}'")

    def _check_target(self) -> None:
        if not self.out.exists() and not self.out.is_symlink():
            return
        if not self._force:
            raise ArgumentError("out", "a new path (force replaces a data set)", f"'{self.out}'")
        replaceable = self.out.is_dir() and not self.out.is_symlink()
        if not (replaceable and ((self.out / MANIFEST).is_file() or not any(self.out.iterdir()))):
            raise ArgumentError(
                "out", "a data set or an empty folder to replace", f"'{self.out}' (something else)"
            )

    def __enter__(self) -> FolderWriter:
        self._stack = contextlib.ExitStack()
        self.path = self._stack.enter_context(draft_folder(self.out))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers.values():
            writer.abandon()
        self._stack.__exit__(kind, error, trace)

    def array(self, name: str, dtype: DTypeLike) -> ArrayWriter:
        """An appendable array that becomes ``<name>.npy``."""
        writer = ArrayWriter(self.path / f"{name}.npy", dtype)
        self._writers[f"{name}.npy"] = writer
        return writer

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write a whole array as ``<name>.npy``."""
        self.array(name, values.dtype).append(values)

    def commit(self, meta: dict[str, Any]) -> None:
        """Close every file, write the manifest last, and put the folder in its place."""
        files = {name: writer.close() for name, writer in self._writers.items()}
        self._writers = {}
        manifest = {"format": FORMAT, "version": VERSION, "files": files, **meta}
        manifest["crc32"] = zlib.crc32(_canonical(manifest))
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (self.path / MANIFEST).write_text(text, encoding="utf-8")
        self._check_target()
        install(self.path, self.out)


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a folder of a prepared data set (which may be damaged)."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | os.PathLike[str], *, verify: bool | None = None) -> dict[str, Any]:
    """The manifest of a finished folder after checking it.

    Args:
        path: the folder.
        verify: True reads every file and compares its CRC-32; False compares sizes only; None
            does the former where the files add up to at most 64 MiB.

    Raises:
        DataError: there is no such folder, or it is no (finished) data set.
        ArtifactError: a file is missing, cut, altered, or of a newer version; names the file.
    """
    folder = Path(path)
    recover(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; `fastrec data prepare` makes one")
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(f"{folder}: has no {MANIFEST}: not a data set, or one that was cut short")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file}: is not a {FORMAT} manifest")
    if manifest.get("version") != VERSION:
        got = manifest.get("version")
        raise ArtifactError(f"{file}: version {got!r}; this fastrec reads version {VERSION}")
    crc32 = manifest.pop("crc32", None)
    if crc32 != zlib.crc32(_canonical(manifest)):
        raise ArtifactError(f"{file}: was altered (its checksum does not match)")
    files = manifest["files"]
    for name, entry in files.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: is missing")
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(f"{folder / name}: has {size} bytes, expected {entry['bytes']}")
    if verify is None:
        verify = sum(entry["bytes"] for entry in files.values()) <= SMALL_BYTES
    if verify:
        for name, entry in files.items():
            if crc32_of(folder / name) != entry["crc32"]:
                raise ArtifactError(f"{folder / name}: was altered (CRC-32 does not match)")
    return manifest

"""A native engine as one file, whose layout and checks are csrc/cpu/engine/file.h's. No torch."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, ArtifactError
from fastrec.files import atomic_write
from fastrec.kernels import _compiled
from fastrec.runtime.engine import PRECISIONS
from fastrec.spec import InputSpec
from fastrec.structure import structure_of

MAGIC = b"\x89fastrec"
_PREFIX = struct.Struct("<8sIIQQ")
_DIGEST = 32
_LINE = 64
_MAX_THREADS = 1024


def write(header: dict[str, Any], constants: Sequence[np.ndarray], path: Path) -> Path:
    """Write an engine; the file appears under its name only once it is whole.

    Args:
        header: of the engine, with its program.
        constants: their bytes, in the program's order.
        path: of the file.

    Raises:
        ArtifactError: ``path`` exists and is not a native engine's file.
        OSError: the disk is full, or the folder may not be written; an older file is as it was.
    """
    if path.exists() and not is_engine_file(path):
        raise ArtifactError(f"{path} exists and is not a native engine's file; it is left as it is")
    sections, position = [], 0
    for data in constants:
        padding = bytes(-data.nbytes % _LINE)
        digest = hashlib.sha256(data.data)
        digest.update(padding)
        sections.append({"begin": position, "bytes": data.nbytes, "sha256": digest.hexdigest()})
        position += data.nbytes + len(padding)
    text = json.dumps(
        {
            **header,
            # Weights are stored as every instruction set reads them, and packed when loaded.
            "requires": "scalar",
            "saved_on": kernels.active_isa(),
            "sections": sections,
        }
    ).encode()
    text += b" " * (-(len(text) + _PREFIX.size + _DIGEST) % _LINE)
    version = _compiled.native().engine.FILE_VERSION
    begin = _PREFIX.size + _DIGEST + len(text)
    prefix = _PREFIX.pack(MAGIC, version, 0, len(text), begin + position)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft, draft.open("wb") as stream:
        stream.write(prefix + hashlib.sha256(prefix + text).digest() + text)
        for data in constants:
            stream.write(data.data)
            stream.write(bytes(-data.nbytes % _LINE))
    return path


def is_engine_file(path: Path) -> bool:
    """Whether a file begins as a native engine's does."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def is_whole(path: Path) -> bool:
    """Whether a file is a native engine's that opens here; all of its bytes are read."""
    if not is_engine_file(path):
        return False
    try:
        read(path, None)
    except ArtifactError:
        return False
    return True


def read(path: Path, threads: int | None, *, copy: bool = False) -> tuple[Any, dict[str, Any]]:
    """The compiled engine of a file, and what the file says of it.

    Args:
        path: of the file.
        threads: that a call may use; None: as when it was compiled.
        copy: keep a private copy of the weights, which nobody can change or truncate. By default
            they are mapped, and processes that open one file share their memory.

    Raises:
        ArgumentError: ``threads`` is not a positive integer or None.
        ArtifactError: missing, foreign, truncated, altered, of another version, or not sound.
        BackendError: the compiled kernels are missing, or lack what the file requires.
    """
    if threads is not None and (
        isinstance(threads, bool)
        or not isinstance(threads, int)
        or not 1 <= threads <= _MAX_THREADS
    ):
        raise ArgumentError("threads", "a positive integer or None", threads)
    native = _compiled.native().engine.Engine.open(str(path), copy)
    header = json.loads(native.header)
    try:
        about = {
            "backend": "native",
            "precision": header["precision"],
            "threads": threads or header["threads"],
            "spec": InputSpec.from_dict(header["spec"]),
            "rows": [dict(row) for row in header["rows"]],
            "versions": {str(k): str(v) for k, v in header["versions"].items()},
            "structure": structure_of(header),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: an invalid header: {error!r}") from error
    if about["precision"] not in PRECISIONS:
        raise ArtifactError(f"{path}: an invalid header: an unknown precision")
    return native, about

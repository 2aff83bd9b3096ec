"""A native engine as one file: a prefix, a JSON header, and constants that are mapped, not read.

    prefix, 64 bytes   magic, version, 0, bytes of the header, bytes of the file, SHA-256 of all of
                       this and the header
    header             JSON: the engine, its inputs, the program, place and SHA-256 of each section
    sections           the constants, each from a multiple of 64 bytes to the next section

Little-endian. Nothing in it is executed; the program is validated before it runs, since a file with
the right checksums may still be hostile. Processes that open one file share its pages.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, ArtifactError, BackendError, FastrecError
from fastrec.files import atomic_write
from fastrec.runtime.engine import PRECISIONS
from fastrec.runtime.native.buffers import DTYPES
from fastrec.runtime.native.codec import decode_program, encode_program, integer, text
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.validate import validate
from fastrec.spec import InputSpec

MAGIC = b"\x89fastrec"
VERSION = 2
_PREFIX = struct.Struct("<8sIIQQ")
_DIGEST = 32
_LINE = 64
_MAX_HEADER = 1 << 26
_MAX_THREADS = 1024
_MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError)


def write(program: Program, spec: InputSpec, about: dict[str, Any], path: str | Path) -> Path:
    """Write an engine; the file appears under its name only once it is complete.

    Args:
        program: what it runs.
        spec: its inputs.
        about: what the header says of the engine.
        path: of the file.

    Raises:
        ArtifactError: ``path`` exists and is not a native engine's file.
        BackendError: the program has a form that files do not hold, and which.
        OSError: the disk is full, or the folder may not be written; an older file is as it was.
    """
    path = Path(path)
    if path.exists() and not is_engine_file(path):
        raise ArtifactError(f"{path} exists and is not a native engine's file; it is left as it is")
    values, constants = encode_program(program)
    try:
        validate(program, spec)
    except ArtifactError as error:
        raise BackendError(f"this engine cannot be saved: {error}") from error
    sections, position = [], 0
    for data in constants:
        data = np.ascontiguousarray(data)
        padding = bytes(-data.nbytes % _LINE)
        digest = hashlib.sha256(data.data)
        digest.update(padding)
        place = {"begin": position, "bytes": data.nbytes, "sha256": digest.hexdigest()}
        sections.append({"dtype": data.dtype.name, **place})
        position += data.nbytes + len(padding)
    header = json.dumps(
        {
            **about,
            # Weights are stored as every instruction set reads them, and packed when loaded.
            "requires": "scalar",
            "saved_on": kernels.active_isa(),
            "program": values,
            "sections": sections,
        }
    ).encode()
    header += b" " * (-(len(header) + _PREFIX.size + _DIGEST) % _LINE)
    begin = _PREFIX.size + _DIGEST + len(header)
    prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(header), begin + position)
    with atomic_write(path) as draft, draft.open("wb") as stream:
        stream.write(prefix + hashlib.sha256(prefix + header).digest() + header)
        for data in constants:
            stream.write(np.ascontiguousarray(data).data)
            stream.write(bytes(-data.nbytes % _LINE))
    return path


def is_engine_file(path: Path) -> bool:
    """Whether a file begins as a native engine's does."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path, threads: int | None) -> tuple[Program, dict[str, Any]]:
    """The validated program of a file that :func:`write` wrote, and what it says of its engine.

    Raises:
        ArgumentError: ``threads`` is not a positive integer or None.
        ArtifactError: missing, foreign, truncated, altered, newer, or a plan that is not sound.
        BackendError: the compiled kernels are missing, or lack what the file requires.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise ArgumentError("threads", "a positive integer or None", threads)
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise ArgumentError("threads", "a positive integer or None", threads)
    header, memory = _open(path)
    try:
        isa = text(header["requires"])
        if isa not in kernels.available_isas():
            raise BackendError(f"{path} needs the instruction set {isa}, which this CPU lacks")
        constants = [_section(memory, row, path) for row in header["sections"]]
        program = decode_program(header["program"], constants)
        about = _about(header)
        validate(program, about["spec"])
        return program, {**about, "threads": threads or about["threads"]}
    except FastrecError as error:
        if isinstance(error, ArtifactError):
            raise ArtifactError(f"{path}: {error}") from error
        raise
    except (*_MALFORMED, OverflowError) as error:
        raise ArtifactError(f"{path}: an invalid plan: {error!r}") from error


def _open(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The header, and the mapped sections."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(_PREFIX.size)
            digest = stream.read(_DIGEST)
            if not start.startswith(MAGIC):
                short = size < len(MAGIC) and MAGIC.startswith(start)
                what = "is truncated" if short else "is not an engine artifact"
                raise ArtifactError(f"{path} {what}")
            if len(digest) < _DIGEST:
                raise ArtifactError(f"{path} is truncated: {size} bytes")
            _, version, zero, header_bytes, file_bytes = _PREFIX.unpack(start)
            if version != VERSION:
                remedy = (
                    "compile the model anew" if version < VERSION else "install a newer fastrec"
                )
                raise ArtifactError(f"{path} has version {version}, this reads {VERSION}: {remedy}")
            begin = _PREFIX.size + _DIGEST + header_bytes
            if zero or header_bytes > _MAX_HEADER or begin > file_bytes or size > file_bytes:
                raise ArtifactError(f"{path} was altered: its sizes disagree")
            if size < file_bytes:
                raise ArtifactError(f"{path} is truncated: {size} of {file_bytes} bytes")
            content = stream.read(header_bytes)
            if hashlib.sha256(start + content).digest() != digest:
                raise ArtifactError(f"{path} was altered: its header's checksum differs")
            memory = np.zeros(0, np.uint8)
            if size > begin:
                memory = np.asarray(np.memmap(stream, np.uint8, "r", begin))
    except OSError as error:
        raise ArtifactError(f"{path} is not an engine artifact: {error}") from error
    if sys.byteorder != "little":
        raise BackendError(f"{path} is little-endian, this machine is not")
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: an invalid header: {error}") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: an invalid header")
    return header, memory


def _section(memory: np.ndarray, row: dict[str, Any], path: Path) -> np.ndarray:
    begin, size = integer(row["begin"]), integer(row["bytes"])
    end = begin + size + -size % _LINE
    dtype = text(row["dtype"])
    if dtype not in DTYPES or begin < 0 or begin % _LINE or size < 0 or end > len(memory):
        raise ValueError("a section outside the file")
    whole = memory[begin:end]
    if hashlib.sha256(whole.data).hexdigest() != row["sha256"]:
        raise ArtifactError(f"{path} was altered: the checksum of a section differs")
    data = whole[:size].view(dtype)
    # Indices are read after they are checked, so they must not change with the file: a copy.
    return np.array(data) if dtype == "int32" else data


def _about(header: dict[str, Any]) -> dict[str, Any]:
    """The header's description of the engine, its types checked."""
    spec = InputSpec.from_dict(header["spec"])
    for field in spec.fields:
        text(field.name)
        for size in field.dims:
            if not isinstance(size, str) and integer(size) < 1:
                raise ValueError("sizes below 1")
        if field.dtype not in DTYPES:
            raise ValueError("an input of an unknown dtype")
        known = {d for f in spec.fields for d in f.dims if isinstance(d, str)}
        if field.rows is None:
            continue
        if field.dtype != "int64" or (
            field.rows not in known if isinstance(field.rows, str) else integer(field.rows) < 0
        ):
            raise ValueError("an input of an unknown range")
    for low, high in spec.limits.values():
        if integer(low) > (math.inf if high is None else integer(high)):
            raise ValueError("limits out of order")
    if len(set(spec.names)) != len(spec.names):
        raise ValueError("two inputs of one name")
    if header["backend"] != "native" or header["precision"] not in PRECISIONS:
        raise ValueError("another backend or precision")
    if not 1 <= integer(header["threads"]) <= _MAX_THREADS:
        raise ValueError("another number of threads")
    return {
        "backend": "native",
        "precision": header["precision"],
        "threads": header["threads"],
        "spec": spec,
        "rows": [dict(row) for row in header["rows"]],
        "versions": {text(k): text(v) for k, v in header["versions"].items()},
    }

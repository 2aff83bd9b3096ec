"""An engine on disk. No torch here.

A native engine is one file (``fastrec.runtime.native.file``); those of other backends are a
folder of the backend's own files and ``engine.json``.

``engine.json`` names the backend, precision, settings and inputs, and every file's SHA-256. A
folder appears under its name only once it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastrec.errors import ArgumentError, ArtifactError, BackendError
from fastrec.files import atomic_folder, recover
from fastrec.runtime.engine import Engine

HEADER = "engine.json"
FORMAT = "fastrec-engine"
VERSION = 1
# Backends whose engines are folders; each has a module of its name with a `load`.
FOLDERS = ("onnxruntime", "openvino", "tensorrt", "litert", "qnn")


@contextlib.contextmanager
def building(backend: str) -> Iterator[Path]:
    """A folder for the files of an engine that is being built: gone if that fails, else the
    engine's own (:func:`keeps`)."""
    scratch = Path(tempfile.mkdtemp(prefix=f"fastrec-{backend}-"))
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def keeps(engine: Engine, scratch: Path | None) -> None:
    """The folder goes when the engine goes; None: the files are not the engine's."""
    if scratch is not None:
        weakref.finalize(engine, shutil.rmtree, scratch, ignore_errors=True)


def write(path: str | Path, header: dict[str, Any], fill: Callable[[Path], None]) -> Path:
    """Write an artifact: ``fill(folder)`` puts the backend's files, the header is added.

    Raises:
        ArtifactError: ``path`` exists and is not an engine artifact.
    """
    path = Path(path)
    if path.exists() and not (path / HEADER).is_file():
        raise ArtifactError(f"{path} exists and is not an engine artifact; it is left as it is")
    with atomic_folder(path) as draft:
        fill(draft)
        files = {
            f.name: {"sha256": _digest(f), "bytes": f.stat().st_size}
            for f in sorted(draft.iterdir())
        }
        text = json.dumps(
            {"format": FORMAT, "version": VERSION, **header, "files": files}, indent=1
        )
        (draft / HEADER).write_text(text + "\n")
    return path


def read(path: str | Path) -> dict[str, Any]:
    """The header of an artifact whose files are all there and unaltered.

    Raises:
        ArtifactError: not an engine artifact, a newer version, or a file missing or altered.
    """
    path = Path(path)
    recover(path)
    try:
        header = json.loads((path / HEADER).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not an engine artifact: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ArtifactError(f"{path / HEADER} is not an engine artifact's header")
    if header.get("version") != VERSION:
        raise ArtifactError(f"{path} has version {header.get('version')}, this reads {VERSION}")
    for name, stored in header["files"].items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing")
        if file.stat().st_size != stored["bytes"] or _digest(file) != stored["sha256"]:
            raise ArtifactError(f"{file} is truncated or was altered: its checksum differs")
    return header


def load_engine(path: str | Path, *, threads: int | None = None, copy: bool = False) -> Engine:
    """Open what ``engine.save(path)`` wrote; imports no torch.

    Args:
        path: a native engine's file, or the folder of another backend's artifact.
        threads: threads a call may use; None means as when it was saved.
        copy: of a native engine's file, keep a private copy: overwriting or cutting the file
            changes nothing. By default it is mapped, and processes that open it share its memory.

    Raises:
        ArgumentError: ``copy`` for another backend's folder.
        ArtifactError: not an engine artifact, truncated, altered, newer, or an invalid plan.
        BackendError: its backend cannot run here.
        MissingDependencyError: its backend's package is not installed.
    """
    if not Path(path).is_dir():
        from fastrec.runtime.native.engine import PlanEngine

        return PlanEngine.load(Path(path), threads, copy=copy)
    if copy:
        raise ArgumentError("copy", "False for a folder: only native engines are copied", copy)
    header = read(path)
    backend = header.get("backend")
    if backend not in FOLDERS:
        raise BackendError(
            f"folders hold artifacts of {', '.join(FOLDERS)}, not {backend!r}: a native engine is "
            "one file"
        )
    module: Any = importlib.import_module(f"fastrec.runtime.backends.{backend}")
    engine: Engine = module.load(Path(path), header, threads)
    return engine


def _digest(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()

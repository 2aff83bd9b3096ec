"""A data set from a prepared folder, or from a log that is prepared on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from fastrec.data.dataset import SequenceDataset
from fastrec.data.layout import ReadOptions
from fastrec.data.preparation import prepare
from fastrec.data.reader import Progress
from fastrec.data.sources import STDIN, find_files
from fastrec.data.storage import is_prepared
from fastrec.errors import ArgumentError
from fastrec.files import atomic_write

_MADE_OF = "made_of.json"


def open_or_prepare(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    options: ReadOptions | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> SequenceDataset:
    """The data set at ``source``, or the one that is made of the log there.

    Args:
        source: a prepared folder, or a log as for :func:`fastrec.data.prepare`.
        folder: where a log's data set is kept; used again while the log's files are the same.
        options: how to read the log; not for a prepared folder.
        progress: as for :func:`fastrec.data.prepare`.
        tell: as for :func:`fastrec.data.prepare`.

    Raises:
        ArgumentError: options beside a prepared folder.
        DataError, ArtifactError: as :func:`fastrec.data.prepare` and :meth:`SequenceDataset.open`.
    """
    options = options or ReadOptions()
    if is_prepared(source):
        if options != ReadOptions():
            raise ArgumentError("columns", "none for a folder that is prepared already", source)
        return SequenceDataset.open(source)
    made_of = None if os.fspath(source) == STDIN else log_identity(source, options)
    note = Path(folder) / _MADE_OF
    if not (made_of and note.is_file() and note.read_text(encoding="utf-8") == made_of):
        Path(folder).absolute().parent.mkdir(parents=True, exist_ok=True)
        prepare(source, folder, options=options, force=True, progress=progress, tell=tell)
        if made_of:
            with atomic_write(note) as draft:
                draft.write_text(made_of, encoding="utf-8")
    return SequenceDataset.open(folder)


def log_identity(source: str | os.PathLike[str], options: ReadOptions) -> str:
    """Text that differs between two logs, two states of one, and two ways to read one."""
    stats = [(file.name, file.path.stat()) for file in find_files([source]) if file.path]
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return json.dumps({"files": files, "options": repr(options)})

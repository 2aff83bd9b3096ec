"""Engines behind a screen, where one lies beside their file."""

from __future__ import annotations

import os
from pathlib import Path

from fastrec.runtime.artifact import load_engine
from fastrec.runtime.screening import SUFFIX, Screen, Screened
from fastrec.serving.core.config import Screening
from fastrec.serving.core.engines import EntryPoint, Source


def screened_source(source: Source, config: Screening, threads: int | None) -> tuple[Source, int]:
    """The screened source for ``source``, and the candidates it scores in full (0 = all). Sources
    other than files, and files without a screen, are returned unchanged."""
    if not config.keep or not isinstance(source, str | Path):
        return source, 0
    screen = Path(f"{os.fspath(source)}{SUFFIX}")
    if not screen.is_file():
        return source, 0
    options = {
        "path": os.fspath(source),
        "screen": str(screen),
        "threads": threads,
        "keep": config.keep,
        "audit": config.audit,
        "audit_k": config.audit_k,
    }
    return EntryPoint("fastrec.serving.core.screened:open_screened", options), config.keep


def open_screened(
    path: str, screen: str, threads: int | None, keep: int, audit: float, audit_k: int
) -> Screened:
    """The engine at ``path`` behind its screen.

    Args:
        path, screen: files of the engine and of its screen.
        threads: of the engine; None = as saved.
        keep: candidates of a user that are scored in full.
        audit: share of calls that are scored whole as well.
        audit_k: recall is measured over this many of the best candidates.

    Raises:
        ArtifactError: either file is damaged.
        ArgumentError: the screen is another engine's.
    """
    engine = load_engine(path, threads=threads)
    try:
        return Screened(engine, Screen.load(screen), keep, audit=audit, audit_k=audit_k)
    except BaseException:
        engine.close()
        raise

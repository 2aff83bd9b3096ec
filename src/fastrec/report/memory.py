"""File sizes, and the peak memory of every engine in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastrec.compress import artifact_bytes
from fastrec.measure.memory import peak_rss_mb
from fastrec.report.engines import Built, Spec, attempt
from fastrec.report.settings import CANDIDATES

SAVED = ("onnxruntime", "openvino", "litert", "tensorrt")
"""Engines with a file of their own; the others load what fastrec.save wrote."""


def files_of(built: Built, network: Path, folder: Path) -> tuple[Path, float]:
    """(path that the engine loads, its bytes / 10^6); those with an own format are saved first."""
    if built.spec.engine not in SAVED:
        return network, artifact_bytes(network) / 1e6
    assert built.engine is not None
    path = built.engine.save(folder)
    return path, sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6


def child_command(spec: Spec, source: Path, threads: int, requests: int) -> list[str]:
    """The command of :mod:`fastrec.runtime.child` that loads this engine and answers requests."""
    command = [sys.executable, "-m", "fastrec.runtime.child"]
    if spec.engine in SAVED:
        command += ["--artifact", str(source)]
    else:
        command += ["--model", str(source), "--backend", spec.engine]
        command += [] if spec.ask is None else ["--precision", spec.ask]
    command += ["--threads", str(threads), "--requests", str(requests)]
    return [*command, "--batch", "1", "--candidates", str(CANDIDATES)]


def peak_memory(
    commands: Mapping[str, Sequence[str]], done: Callable[[str, float | None, str | None], None]
) -> None:
    """Run the children two at a time (nothing is timed now); ``done(name, MB or None, why)``."""

    def one(name: str) -> None:
        peak, why = attempt("its process failed", peak_rss_mb, commands[name])
        done(name, peak, why)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(one, commands):
            pass

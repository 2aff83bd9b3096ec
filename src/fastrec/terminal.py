"""The terminal, as every command uses it: plain text, progress on standard error, JSON reports.

Text is never markup here: names, paths and messages come from outside, and ``[torch]`` is a word.
Styles are given beside the text.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastrec.errors import ArgumentError


class Tell:
    """``tell(stage, done, total, note="")`` shows how far a command is; a total of 0 is not known.

    ``console`` prints beside what is shown.
    """

    def __init__(self, console: Console, show: Callable[[str, int, int, str], None]) -> None:
        self.console, self._show = console, show

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        self._show(stage, done, total, note)


_SILENCE_S = 5.0  # a log gets a line at least this often
_BARS_A_SECOND = 2.0  # a bar that is drawn often takes time from what is measured


def stdout() -> Console:
    """A console for results."""
    return Console(markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """A console for everything else; lines are left to the terminal to wrap."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _writable(path: Path | None) -> Path | None:
    """Refuse, before any work, a file that could not be written."""
    if path is not None:
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ArgumentError("--json", "a file that can be written", path)
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the report as JSON.", callback=_writable
    ),
]


def write_json(path: Path | None, report: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a report as JSON, where a path is given; numbers that are not finite become null."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"
        try:
            path.write_text(text)
        except OSError as error:  # a full disk's does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def progress(*, enabled: bool = True) -> Iterator[Tell]:
    """Show how far a command is, on standard error: a bar for the stage at work on a terminal,
    lines elsewhere, one at least every five seconds."""
    if not enabled:
        yield Tell(stderr(), lambda stage, done, total, note: None)
        return
    with _own_stream() as stream:
        console = Console(file=stream, markup=False, highlight=False, emoji=False)
        with _bar(console) if console.is_terminal else _lines(console) as tell:
            yield tell


@contextlib.contextmanager
def _own_stream() -> Iterator[IO[str]]:
    """Standard error through a descriptor of its own: while engines are built, descriptors 1 and 2
    go to a log."""
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        yield sys.stderr
        return
    with os.fdopen(descriptor, "w") as stream:
        yield stream


class _Remaining(ProgressColumn):
    """Time left, where the total is known."""

    def __init__(self) -> None:
        self._column = TimeRemainingColumn(compact=True)
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else self._column.render(task)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Tell]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        _Remaining(),
    )
    bars = Progress(*columns, console=console, refresh_per_second=_BARS_A_SECOND, transient=True)
    with bars:
        task = bars.add_task("starting", total=None, note="")
        current = ""

        def show(stage: str, done: int, total: int, note: str) -> None:
            nonlocal current
            if stage != current:
                bars.reset(task, description=stage, total=total or None)
                current = stage
            bars.update(task, completed=done, total=total or None, note=note)

        yield Tell(console, show)


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Tell]:
    started = time.monotonic()
    lock, ended = threading.Lock(), threading.Event()
    stage, share, last = "starting", "", started

    def line() -> None:
        nonlocal last
        last = time.monotonic()
        console.print(f"{last - started:6.0f} s  {stage}{share}", soft_wrap=True)

    def show(now: str, done: int, total: int, note: str) -> None:
        nonlocal stage, share
        with lock:
            changed = now != stage
            stage = now
            share = f": {done / total:.0%}" if total and done else ""
            share += f", {note}" if note else ""
            if changed or time.monotonic() - last >= _SILENCE_S:
                line()

    def keep_talking() -> None:
        while not ended.wait(max(0.1, last + _SILENCE_S - time.monotonic())):
            with lock:
                if time.monotonic() - last >= _SILENCE_S:
                    line()

    talker = threading.Thread(target=keep_talking, daemon=True, name="fastrec-progress")
    talker.start()
    try:
        yield Tell(console, show)
    finally:
        ended.set()
        talker.join()

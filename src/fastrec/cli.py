"""The ``fastrec`` command: each room brings its own commands; heavy imports wait for the call."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from fastrec import __version__, env
from fastrec.errors import FastrecError, MissingDependencyError
from fastrec.measure.packages import extra_of
from fastrec.terminal import stderr, stdout

_ENOUGH = 1 << 20  # bytes: a file system with fewer is called full

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        stdout().print(f"fastrec {__version__}")
        raise typer.Exit


@app.callback()
def _fastrec(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Custom-kernel acceleration for real-time sequential recommenders."""


def _mount() -> None:
    from fastrec.compress.cli import compress
    from fastrec.data.cli import app as data_app
    from fastrec.info import explain, info
    from fastrec.report.cli import bench, table1
    from fastrec.report.load_cli import loadtest
    from fastrec.runtime.cli import compile, export, screen
    from fastrec.runtime.cuda.cli import tune
    from fastrec.search.cli import accelerate, autotune
    from fastrec.serving.cli import serve
    from fastrec.serving.simulate.cli import simulate
    from fastrec.train.cli import train

    app.command()(info)
    app.add_typer(data_app, name="data", help="Generate and prepare interaction logs.")
    commands = (
        accelerate, train, compress, autotune, compile, table1, export, bench, tune, explain, serve,
        loadtest, simulate, screen,
    )  # fmt: skip
    for command in commands:
        app.command()(command)


def main() -> None:
    """Entry point: an error that a user can act on becomes one line and exit status 2, never a
    traceback."""
    _mount()
    try:
        app()
    except FastrecError as error:
        _fail(error, str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = extra_of(package)
        if extra is None:
            raise
        missing = MissingDependencyError(package, extra, "this command")
        _fail(missing, str(missing))
    except OSError as error:
        _fail(error, _system_message(error))


def _fail(error: Exception, message: str) -> NoReturn:
    name = (type(error).__name__, "bold red")
    stderr().print(Text.assemble(name, f": {message}"))
    sys.exit(2)


def _system_message(error: OSError) -> str:
    """The system's words and the file; where a full disk names none, the disk is looked for."""
    what = error.strerror or str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {what}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        places = [*sys.argv[1:], ".", tempfile.gettempdir(), str(env.cache_dir())]
        folders = dict.fromkeys(_existing(Path(place)) for place in places)
        full = [str(folder) for folder in folders if _is_full(folder)]
        return f"{what}: " + (", ".join(full) or "a file system that this command writes to")
    return what


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not os.path.exists(path):  # False where it cannot be looked at
        path = path.parent
    return path


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _ENOUGH
    except OSError:
        return False

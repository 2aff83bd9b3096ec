"""The ``fastrec`` command: each room brings its own commands; heavy imports wait for the call."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from fastrec.errors import FastrecError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Custom-kernel acceleration for real-time sequential recommenders.",
)


def _mount() -> None:
    from fastrec.compress.cli import compress
    from fastrec.data.cli import app as data_app
    from fastrec.info import explain, info
    from fastrec.report.cli import bench, table1
    from fastrec.report.load_cli import loadtest
    from fastrec.runtime.cli import export, screen
    from fastrec.runtime.cuda.cli import tune
    from fastrec.search.cli import autotune
    from fastrec.serving.cli import serve
    from fastrec.serving.simulate.cli import simulate
    from fastrec.train.cli import train

    app.command()(info)
    app.add_typer(data_app, name="data", help="Generate and prepare interaction logs.")
    commands = (
        train, compress, autotune, table1, export, bench, tune, explain, serve, loadtest, simulate,
        screen,
    )  # fmt: skip
    for command in commands:
        app.command()(command)


def main() -> None:
    """Entry point: typed errors become one red line and exit status 2, never a traceback."""
    _mount()
    try:
        app()
    except FastrecError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
        sys.exit(2)

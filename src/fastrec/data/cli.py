"""``fastrec data``: generate, prepare and describe logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrec.terminal import JsonOption, progress, stderr, stdout, write_json

app = typer.Typer(no_args_is_help=True)


ColumnsOption = Annotated[
    str | None,
    typer.Option(
        metavar="ROLE=NAME|N,...",
        help="Columns of the log, where looking does not find them: user, item, category,"
        " behaviour, time = a name, a number (from 1) or none.",
    ),
]


class Container(str, Enum):
    """Values of ``--container``."""

    delimited = "delimited"
    json = "json"
    parquet = "parquet"
    user_lines = "user-lines"


class TimeUnit(str, Enum):
    """Values of ``--time-unit``."""

    s = "s"
    ms = "ms"
    us = "us"
    ns = "ns"


class IdKind(str, Enum):
    """Values of ``--ids``."""

    integer = "integer"
    text = "text"


class PresetName(str, Enum):
    """Sizes that ``generate`` knows."""

    demo = "demo"
    small = "small"
    medium = "medium"
    taobao = "taobao"


_STAGES = {"read": "Reading rows", "sort": "Sorting users", "generate": "Generating users"}


@contextmanager
def data_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that shows the stages of generating and preparing a log."""
    with progress() as tell:
        yield lambda stage, done, total: tell(_STAGES[stage], done, total)


def _table(title: str, rows: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        if isinstance(value, float):
            value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), str(value))
    stdout().print(table)


def say(line: str) -> None:
    """A line about the work, on standard error, as it is."""
    stderr().print(line)


@app.command()
def prepare(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="The log: files, folders, patterns, or - for standard input."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    columns: ColumnsOption = None,
    container: Annotated[
        Container | None, typer.Option(help="Kind of log, instead of looking.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="Text between fields, instead of looking; ' ' is any space.")
    ] = None,
    header: Annotated[
        bool | None,
        typer.Option("--header/--no-header", help="Whether the first line holds names."),
    ] = None,
    time_unit: Annotated[
        TimeUnit | None, typer.Option(help="Unit of times that are numbers.")
    ] = None,
    ids: Annotated[IdKind | None, typer.Option(help="How ids are taken.")] = None,
    behaviours: Annotated[
        str | None,
        typer.Option(
            metavar="WORD=NAME,...", help="Names of behaviours, e.g. 1=pv,2=cart,3=fav,4=buy."
        ),
    ] = None,
    max_history: Annotated[int, typer.Option(help="Events of history kept for each user.")] = 100,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first bad row, naming its line.")
    ] = False,
    window: Annotated[
        tuple[int, int] | None,
        typer.Option(help="First and last time to take (seconds since 1970).", metavar="T0 T1"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing data set at OUT.")
    ] = False,
    json_out: JsonOption = None,
) -> None:
    """Turn a log into memory-mapped per-user sequences with a train/valid/test split.

    Reads CSV, TSV, fields between :: or spaces, JSON lines, Parquet, RecBole's .inter and one line
    a user, compressed or not; says how it reads them.
    """
    from fastrec.data import ReadOptions
    from fastrec.data import prepare as run
    from fastrec.data.layout import parse_columns, parse_pairs

    options = ReadOptions(
        columns=parse_columns(columns),
        container=container and container.value,
        delimiter=delimiter and delimiter.replace("\\t", "\t"),
        header=header,
        time_unit=time_unit and time_unit.value,
        ids=ids and ids.value,
        behaviours=parse_pairs("behaviours", behaviours),
    )
    with data_progress() as tell:
        report = run(
            source,
            out,
            options=options,
            max_history=max_history,
            strict=strict,
            window=window,
            force=force,
            progress=tell,
            tell=say,
        )
    rows = report.to_dict()
    for name in ("rejected", "first_rejected", "notes", "behaviours", "read_as"):
        del rows[name]
    refused = {f"refused: {name}": n for name, n in report.rejected.items() if n}
    stored = {f"behaviour {name}": n for name, n in report.behaviours.items() if n}
    _table("Prepared", {**rows, **stored, **refused})
    for line in report.first_rejected.values():
        say(f"refused: {line}")
    for line in report.notes:
        say(f"note: {line}")
    write_json(json_out, report.to_dict())


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="CSV file to write (replaced if it exists).")],
    preset: Annotated[PresetName, typer.Option(help="Sizes to start from.")] = PresetName.demo,
    stress: Annotated[
        bool, typer.Option("--stress", help="Old history matters more than in the real log.")
    ] = False,
    users: Annotated[int | None, typer.Option(help="Number of users.")] = None,
    items: Annotated[int | None, typer.Option(help="Size of the catalogue.")] = None,
    categories: Annotated[int | None, typer.Option(help="Number of categories.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
    json_out: JsonOption = None,
) -> None:
    """Write a synthetic log with the statistics of Taobao's."""
    from fastrec.data import generate as run

    with data_progress() as tell:
        report = run(
            out,
            preset=preset.value,
            stress=stress,
            n_users=users,
            n_items=items,
            n_categories=categories,
            seed=seed,
            progress=tell,
        )
    _table("Generated", report.to_dict())
    write_json(json_out, report.to_dict())


@app.command()
def stats(
    source: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="A log of any layout, or a prepared folder."),
    ],
    columns: ColumnsOption = None,
    max_users: Annotated[int, typer.Option(help="Look at this many users at most.")] = 5000,
    json_out: JsonOption = None,
) -> None:
    """Describe how users come back: lengths, sessions, repeats, long-range returns."""
    from fastrec.data import ReadOptions, SequenceDataset
    from fastrec.data.layout import parse_columns
    from fastrec.data.statistics import read_log, statistics
    from fastrec.data.storage import is_prepared

    if len(source) == 1 and is_prepared(source[0]):
        values = statistics(SequenceDataset.open(source[0]), max_users=max_users)
    else:
        options = ReadOptions(columns=parse_columns(columns))
        values = statistics(read_log(source, options, say), max_users=max_users)
    _table("Statistics", values)
    write_json(json_out, values)

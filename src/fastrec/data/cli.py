"""``fastrec data``: generate, prepare and describe logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrec.terminal import JsonOption, progress, stdout, write_json

app = typer.Typer(no_args_is_help=True)


class LogFormat(str, Enum):
    """Layouts that ``prepare`` reads."""

    taobao = "taobao"
    user_item = "user-item"


class PresetName(str, Enum):
    """Sizes that ``generate`` knows."""

    demo = "demo"
    small = "small"
    medium = "medium"
    taobao = "taobao"


_STAGES = {"read": "Reading rows", "sort": "Sorting users", "generate": "Generating users"}


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
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


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="The log, e.g. UserBehavior.csv.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    format: Annotated[LogFormat, typer.Option(help="Layout of the log.")] = LogFormat.taobao,
    max_history: Annotated[int, typer.Option(help="Events of history kept for each user.")] = 100,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first bad row, naming its line.")
    ] = False,
    all_times: Annotated[
        bool, typer.Option("--all-times", help="Take rows outside 2017-11-25..12-03 too.")
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
    """Turn a log into memory-mapped per-user sequences with a train/valid/test split."""
    from fastrec.data import TAOBAO_WINDOW
    from fastrec.data import prepare as run
    from fastrec.errors import ArgumentError

    if all_times and window is not None:
        raise ArgumentError("--window", "not together with --all-times", window)
    with _progress() as tell:
        report = run(
            source,
            out,
            format=format.value,
            max_history=max_history,
            strict=strict,
            window=None if all_times else window or TAOBAO_WINDOW,
            force=force,
            progress=tell,
        )
    rows = report.to_dict()
    rejected = rows.pop("rejected")
    _table("Prepared", {**rows, **{f"refused: {name}": n for name, n in rejected.items()}})
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

    with _progress() as tell:
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
    source: Annotated[Path, typer.Argument(help="A five-column log or a prepared folder.")],
    max_users: Annotated[int, typer.Option(help="Look at this many users at most.")] = 5000,
    json_out: JsonOption = None,
) -> None:
    """Describe how users come back: lengths, sessions, repeats, long-range returns."""
    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.statistics import read_log, statistics

    log = SequenceDataset.open(source) if source.is_dir() else read_log(source)
    values = statistics(log, max_users=max_users)
    _table("Statistics", values)
    write_json(json_out, values)

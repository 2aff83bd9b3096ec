"""``fastrec table1`` and ``fastrec bench``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrec.errors import ArgumentError


class PresetName(str, Enum):
    """Sizes of the generated log."""

    demo = "demo"
    small = "small"
    medium = "medium"
    taobao = "taobao"


class ConfigName(str, Enum):
    """Sizes of the baseline."""

    demo = "demo"
    canonical = "canonical"


_JSON = typer.Option("--json", metavar="FILE", help="Also write the report as JSON here.")
_ENGINES = typer.Option(
    metavar="A,B",
    help="native, torch, torch_compile, onnxruntime, openvino (the default); litert, cuda, "
    "tensorrt; all.",
)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that draws one bar, the stage at work, on standard error.

    It writes to a copy of the descriptor: while engines are built, descriptors 1 and 2 go to a log.
    """
    import os
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with os.fdopen(os.dup(2), "w") as stream:
        console = Console(file=stream)
        started, current = time.monotonic(), ""
        if not console.is_terminal:  # a log file or CI: one line a stage

            def note(stage: str, done: int, total: int) -> None:
                nonlocal current
                if stage != current:
                    console.print(f"{time.monotonic() - started:6.0f} s  {stage}", highlight=False)
                    current = stage

            yield note
            return
        columns = (
            TextColumn("{task.description:52}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("starting", total=None)

            def tell(stage: str, done: int, total: int) -> None:
                nonlocal current
                if stage != current:
                    bar.reset(task, description=stage, total=total, completed=done)
                    current = stage
                bar.update(task, completed=done, total=total)

            yield tell


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(n.strip() for n in text.split(",") if n.strip())


def _sizes(argument: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ArgumentError(argument, "batch sizes like 1,8,64", text)
    return tuple(int(part) for part in parts)


def table1(
    preset: Annotated[
        PresetName, typer.Option(help="Size of the generated log, where there is no --data.")
    ] = PresetName.demo,
    data: Annotated[
        Path | None, typer.Option(help="A log (UserBehavior.csv) or a prepared folder.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Trained before: a saved model or folder of variants.")
    ] = None,
    config: Annotated[
        ConfigName, typer.Option(help="demo: tables sized to the data; canonical: 32 M parameters.")
    ] = ConfigName.demo,
    out: Annotated[
        Path, typer.Option(help="Folder for data, models and reports; finished stages are reused.")
    ] = Path("table1"),
    epochs: Annotated[int | None, typer.Option(help="Epochs of the baseline.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most steps of the baseline.")] = None,
    recipe_steps: Annotated[
        int | None, typer.Option(help="Steps of each stage of compression.")
    ] = None,
    seconds_per_engine: Annotated[
        float | None, typer.Option(help="Timing budget of an engine at one batch size.")
    ] = None,
    engines: Annotated[str | None, _ENGINES] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes, like 1,8,64.")] = None,
    users: Annotated[int | None, typer.Option(help="Users evaluated; default all.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each engine; default all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data, training and evaluation.")] = 0,
    json_out: Annotated[Path | None, _JSON] = None,
) -> None:
    """Make the paper's Table I on this machine: train, compress, check, measure, report."""
    from rich.console import Console

    from fastrec.report.schema import KNOWN_ENGINES
    from fastrec.report.settings import Table1Settings
    from fastrec.report.table import table1 as run
    from fastrec.report.terminal import render_terminal

    names = _names(engines)
    settings = Table1Settings.make(
        preset.value,
        data=data,
        model=model,
        config=config.value,
        epochs=epochs,
        steps=steps,
        recipe_steps=recipe_steps,
        seconds_per_engine=seconds_per_engine,
        engines=KNOWN_ENGINES if names == ("all",) else names,
        batches=_sizes("--batches", batches),
        users=users,
        threads=threads,
        seed=seed,
    )
    with _progress() as progress:
        report = run(settings, out, progress=progress)
    console = Console()
    render_terminal(report, console)
    seconds = report["run"]["seconds"]
    spent = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value >= 1)
    console.print(f"\nSeconds: {spent}", highlight=False)
    console.print(f"Report: {out / 'report.html'}; also table1.json, table1.md and plots there.")
    _write(json_out, report)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def bench(
    model: Annotated[
        Path | None,
        typer.Argument(help="What fastrec.save wrote; default: random canonical weights."),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Names of backends; default all that Table I has. `all` without a model: the five "
            "variants on every engine, agreement and speed.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, like 1,8,64.")] = "1,8",
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or int8 (rivals' own quantiser); default as is.")
    ] = None,
    seconds_per_engine: Annotated[float, typer.Option(help="Timing budget.")] = 2.0,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each engine; default all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and requests.")] = 0,
    requests: Annotated[
        int, typer.Option(help="With `all`: users whose top 10 is compared.")
    ] = 200,
    out: Annotated[
        Path | None, typer.Option(help="With `all`: folder for backends.md and backends.json.")
    ] = None,
    json_out: Annotated[Path | None, _JSON] = None,
) -> None:
    """Time engines on one model, interleaved, after their answers were checked against torch."""
    from rich.console import Console

    from fastrec.report.bench import bench as run
    from fastrec.report.bench import print_bench

    sizes = _sizes("--batch", batch)
    assert sizes is not None
    names = _names(engines)
    if names == ("all",):
        if model is None:
            _bench_all(requests, seconds_per_engine, threads, seed, out, json_out)
            return
        names = None
    with _progress() as progress:
        report = run(
            model,
            engines=names,
            batches=sizes,
            precision=precision,
            seconds_per_engine=seconds_per_engine,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    print_bench(report, Console())
    _write(json_out, report)


def _bench_all(
    requests: int,
    seconds_per_engine: float,
    threads: int | None,
    seed: int,
    out: Path | None,
    json_out: Path | None,
) -> None:
    """The matrix of variants and engines."""
    from rich.console import Console

    from fastrec.report.matrix import markdown, matrix, print_matrix

    with _progress() as progress:
        report = matrix(
            requests=requests,
            seconds_per_engine=seconds_per_engine,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "backends.md").write_text(markdown(report))
        _write(out / "backends.json", report)
    _write(json_out, report)
    print_matrix(report, Console())

"""``fastrec table1`` and ``fastrec bench``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastrec.data.cli import ColumnsOption
from fastrec.errors import ArgumentError
from fastrec.model_source import ExampleOption
from fastrec.terminal import JsonOption, progress, stdout, write_json


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


_ENGINES = typer.Option(
    metavar="A,B",
    help="native, torch, torch_compile, onnxruntime, openvino (the default); litert, cuda, "
    "tensorrt; all.",
)


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
    full: Annotated[
        bool, typer.Option("--full", help="The demo's log with everything measured: half an hour.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="A log (file or folder of parts) or a prepared folder.")
    ] = None,
    columns: ColumnsOption = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A checkpoint, or a folder of train or compress."),
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
    json_out: JsonOption = None,
) -> None:
    """Make the paper's Table I on this machine: train, compress, check, measure, report."""
    from fastrec.report.schema import KNOWN_ENGINES
    from fastrec.report.settings import Table1Settings
    from fastrec.report.table import table1 as run
    from fastrec.report.terminal import render_terminal, render_variant

    names = _names(engines)
    settings = Table1Settings.make(
        preset.value,
        full=full or None,
        data=data,
        columns=columns,
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
    with progress() as tell:
        report = run(
            settings, out, progress=tell,
            measured=lambda variant, found: render_variant(variant, found, tell.console),
        )  # fmt: skip
    console = stdout()
    render_terminal(report, console)
    seconds = report["run"]["seconds"]
    spent = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value >= 1)
    console.print(f"\nSeconds: {spent}")
    console.print(f"Report: {out / 'report.html'}; also table1.json, table1.md and plots there.")
    write_json(json_out, report)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint, an engine, a folder of train, compress or autotune, or "
            "module:attribute; default: the canonical ranker with random weights."
        ),
    ] = None,
    example: ExampleOption = None,
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
    json_out: JsonOption = None,
) -> None:
    """Time engines on one model, interleaved, after their answers were checked against torch."""
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
    with progress() as tell:
        report = run(
            model,
            example=example,
            engines=names,
            batches=sizes,
            precision=precision,
            seconds_per_engine=seconds_per_engine,
            threads=threads,
            seed=seed,
            progress=tell,
        )
    print_bench(report, stdout())
    write_json(json_out, report)


def _bench_all(
    requests: int,
    seconds_per_engine: float,
    threads: int | None,
    seed: int,
    out: Path | None,
    json_out: Path | None,
) -> None:
    """The matrix of variants and engines."""
    from fastrec.report.matrix import markdown, matrix, print_matrix

    with progress() as tell:
        report = matrix(
            requests=requests,
            seconds_per_engine=seconds_per_engine,
            threads=threads,
            seed=seed,
            progress=tell,
        )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "backends.md").write_text(markdown(report))
        write_json(out / "backends.json", report)
    write_json(json_out, report)
    print_matrix(report, stdout())

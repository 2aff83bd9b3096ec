"""``fastrec accelerate`` and ``autotune``: a trained model in, a faster one out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastrec.errors import ArgumentError, DataError
from fastrec.model_source import (
    ExampleOption,
    ModelArgument,
    calibration_batches,
    example_inputs,
    find_model,
)
from fastrec.plotting import check_png
from fastrec.terminal import JsonOption, progress, stdout, write_json

if TYPE_CHECKING:
    from torch import nn

    from fastrec.search.space import Space


def accelerate(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Argument(help="Where to write the engine: a file (native) or a folder.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="For INT8: a prepared data set or a .npz; the example inputs by default.",
        ),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the answers that INT8 has to keep.")] = 0.99,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads a call; default all.")] = None,
    rivals: Annotated[
        str, typer.Option(help="Other backends to build and time, comma-separated.")
    ] = "onnxruntime,openvino",
    batch: Annotated[int, typer.Option(min=1, help="Users a call, of the examples.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of timing.")] = 5.0,
    example: ExampleOption = None,
    json_out: JsonOption = None,
) -> None:
    """Make what keeps the answers INT8, compile, and compare with torch and others.

    Prints a table of before and after; the fastest engine that keeps the answers goes to OUT.
    """
    import dataclasses

    from fastrec.exporters.model_spec import spec_of
    from fastrec.measure.machine import machine_card
    from fastrec.search.acceleration import accelerate as run

    source = find_model(model).announce()
    network = source.model()
    examples = example_inputs(spec_of(network, ()), example, {"B": batch, "m": 50}, full=True)
    with progress() as tell:
        result = run(
            network, examples,
            calibration=None if calibration is None else calibration_batches(network, calibration),
            keep=keep, threads=threads, rivals=[name for name in rivals.split(",") if name],
            seconds=seconds, show=False, progress=tell,
        )  # fmt: skip
    stdout().print(result.table())
    if out is not None:
        stdout().print(f"saved: {result.engine.save(out)}")
    result.engine.close()
    ways = [dataclasses.asdict(way) for way in result.ways]
    write_json(json_out, {"machine": machine_card(), "model": source.given, "ways": ways})


def autotune(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(help="Prepared data set (fastrec data prepare).")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder for the journal and the best model; a later run goes on."),
    ],
    latency_ms: Annotated[float | None, typer.Option(help="Most milliseconds of a call.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Most MB (10^6 bytes) on disk.")] = None,
    batch: Annotated[int, typer.Option(help="Users a call.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads a call; default all.")] = None,
    metric: Annotated[
        str, typer.Option(help="What to keep high, on the validation events: ndcg_10, mrr, ...")
    ] = "ndcg_10",
    users: Annotated[int, typer.Option(help="Users that each choice is evaluated on.")] = 500,
    finetune_steps: Annotated[
        int, typer.Option(help="Steps of fine-tuning a trial and round; 0 = none.")
    ] = 60,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the fine-tuning.")] = 1e-3,
    trials: Annotated[int, typer.Option(help="Models that are made and measured.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds of fine-tuning at most.")] = 3,
    space: Annotated[
        Path | None, typer.Option(help="JSON file with the fields of fastrec.search.Space.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of batches and negatives.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the front to this .png file.")] = None,
    markdown_out: Annotated[
        Path | None, typer.Option("--markdown", help="Write a report to this file.")
    ] = None,
    json_out: JsonOption = None,
) -> None:
    """Search precision, sparsity, rank, groups and attention pattern of each layer under a budget.

    The best model is saved to OUT/best. It is judged on validation events while searching, and on
    test events at the end.
    """
    from fastrec.data import SequenceDataset
    from fastrec.measure.machine import machine_card, usable_cpus
    from fastrec.search.budget import Budget
    from fastrec.search.markdown import markdown
    from fastrec.search.search import autotune as search

    budget = Budget(latency_ms, size_mb, batch, threads)
    check_png("--plot", plot)
    found_space = _space(space)
    network, dataset = find_model(model).announce().model(), SequenceDataset.open(data)
    console = stdout()
    with progress() as tell:
        result = search(
            network,
            budget,
            evaluate=quality(dataset, metric, users, seed),
            calibration=calibration_batches(network, data, seed=seed),
            finetune=finetuning(dataset, finetune_steps, lr, seed) if finetune_steps else None,
            space=found_space,
            trials=trials,
            rounds=rounds,
            out=out,
            progress=tell,
        )
        tests = _tests(network, result.best, dataset, metric, seed, tell)
    result.save(out / "best")
    console.print(result.table())
    if result.cost_model is not None:
        console.print(result.cost_model.verdict)
    for name, why in result.left.items():
        console.print(f"no choice for {name}: {why}", style="dim")
    difference = tests["difference"]
    console.print(
        f"test {metric}: {tests['best']:.4f}, the model as it came {tests['baseline']:.4f}, "
        f"difference {difference['mean']:+.4f} ({difference['low']:+.4f} to "
        f"{difference['high']:+.4f})",
    )
    console.print(f"saved: {out / 'best'}")
    if plot is not None:
        result.plot(plot)
    about = {"machine": machine_card(), "metric": metric, "test": tests}
    report = about | {"threads": threads or usable_cpus(), **result.to_dict()}
    if markdown_out is not None:
        markdown_out.write_text(markdown(report))
    write_json(json_out, report)


def quality(dataset: Any, metric: str, users: int, seed: int) -> Callable[[nn.Module], float]:
    """A metric on the validation events of the first ``users``, candidates protocol."""
    from fastrec.train import evaluate

    def measured(model: nn.Module) -> float:
        found = evaluate(model, dataset, split="valid", limit=users, seed=seed, intervals=False)
        if metric not in found.metrics:
            raise ArgumentError("--metric", f"one of {', '.join(found.metrics)}", metric)
        return float(found.metrics[metric])

    return measured


def finetuning(dataset: Any, steps: int, lr: float, seed: int) -> Callable[[nn.Module, int], None]:
    """``steps`` steps on batches of each round's own."""
    from fastrec.train import TrainConfig, fit

    def train(model: nn.Module, round_: int) -> None:
        config = TrainConfig(
            epochs=steps,  # more than enough: max_steps ends it
            max_steps=steps,
            lr=lr,
            seed=seed * 1000 + round_,
            valid_users=0,
            patience=None,
        )
        fit(model, dataset, config, progress=False)

    return train


def _tests(
    before: nn.Module, after: nn.Module, dataset: Any, metric: str, seed: int, tell: Any
) -> dict[str, Any]:
    """The metric on all test events, before and after, and their paired difference."""
    from fastrec.train import evaluate, paired_difference

    found = []
    for number, model in enumerate((before, after)):
        tell("test events", number, 2)
        found.append(evaluate(model, dataset, split="test", seed=seed))
    tell("test events", 2, 2)
    mean, low, high = paired_difference(found[1], found[0], metric)
    return {
        "users": found[0].n_users,
        "baseline": found[0].metrics[metric],
        "best": found[1].metrics[metric],
        "difference": {"mean": mean, "low": low, "high": high},
    }


def _space(file: Path | None) -> Space | None:
    from fastrec.search.space import Space

    if file is None:
        return None
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: no JSON ({error})") from error
    return Space.from_dict(values)

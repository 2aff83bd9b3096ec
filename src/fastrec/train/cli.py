"""``fastrec train``: a log or data set in, a trained model and its test metrics out."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastrec.data.cli import ColumnsOption, data_progress, say
from fastrec.terminal import JsonOption, progress, stdout, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from fastrec.train.metrics import Evaluation


class ModelName(str, Enum):
    """Models that can be trained."""

    ranker = "ranker"
    sasrec = "sasrec"


class NegativesName(str, Enum):
    """How training negatives are drawn."""

    popularity = "popularity"
    uniform = "uniform"


def train(
    data: Annotated[str, typer.Argument(help="A log, or a folder of `fastrec data prepare`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint and the trained model.")],
    model: Annotated[ModelName, typer.Option(help="Model to train.")] = ModelName.ranker,
    columns: ColumnsOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the users.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Users a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Positive + training negatives (ranker).")
    ] = None,
    negatives: Annotated[
        NegativesName | None, typer.Option(help="How training negatives are drawn (ranker).")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without improvement before stopping; 0 = never stop.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and negatives.")] = 0,
    amp: Annotated[bool, typer.Option(help="Mixed precision where it is faster.")] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from OUT's checkpoint.")
    ] = False,
    full_users: Annotated[
        int, typer.Option(help="Test users ranked over the full catalogue; 0 = skip.")
    ] = 1000,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen", help="Leave items of the history out of the ranking.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    json_out: JsonOption = None,
) -> None:
    """Train a model, keep its best weights, and test them on the held-out last events."""
    import torch

    from fastrec.data import ReadOptions, open_or_prepare
    from fastrec.data.layout import parse_columns
    from fastrec.train.config import TrainConfig
    from fastrec.train.evaluation import evaluate
    from fastrec.train.loop import fit
    from fastrec.train.precision import autocast_dtype

    if threads is not None:
        torch.set_num_threads(threads)
    with data_progress() as tell:
        options = ReadOptions(columns=parse_columns(columns))
        dataset = open_or_prepare(data, out / "data", options=options, progress=tell, tell=say)
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "n_candidates": candidates,
        "negatives": None if negatives is None else negatives.value,
        "max_steps": max_steps,
        "patience": patience,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if patience == 0:
        chosen["patience"] = None
    recipe = TrainConfig.sasrec if model is ModelName.sasrec else TrainConfig
    config = recipe(seed=seed, amp=amp, **chosen)
    torch.manual_seed(seed)
    network = _build(model, dataset)
    report = fit(network, dataset, config, out=out, resume=resume, progress=not quiet)

    console = stdout()
    autocast = autocast_dtype(torch.device("cpu")) if amp else None
    tests: list[Evaluation] = []
    for protocol, limit in (("candidates", None), ("full", full_users)):
        if limit == 0:
            continue
        with progress(enabled=not quiet) as tell:
            tell(f"testing ({protocol})", 0, 0)
            tests.append(
                evaluate(
                    network,
                    dataset,
                    protocol=protocol,
                    limit=limit,
                    exclude_seen=exclude_seen,
                    autocast=autocast,
                )
            )
    result = {
        "model": model.value,
        "parameters": sum(p.numel() for p in network.parameters()),
        "config": config.to_dict(),
        "train": report.to_dict(),
        "test": [evaluation.to_dict() for evaluation in tests],
    }
    _show(console, result, tests)
    console.print(f"Trained model: {out / 'model.safetensors'}")
    write_json(json_out, result)


def _build(model: ModelName, dataset: Any) -> Any:
    """The canonical ranker, or SASRec, with the data set's table sizes."""
    from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig

    if model is ModelName.sasrec:
        return SASRec(SASRecConfig(dataset.n_items, max_length=dataset.history_length))
    return Ranker(
        RankerConfig(
            n_items=dataset.n_items,
            n_categories=dataset.n_categories,
            n_behaviours=dataset.n_behaviours - 1,
            history_length=dataset.history_length,
        )
    )


def _show(console: Console, result: dict[str, Any], tests: list[Evaluation]) -> None:
    from rich.table import Table

    done = result["train"]
    console.print(
        f"{result['model']}, {result['parameters'] / 1e6:.2f} M parameters: {done['epochs']} epochs"
        f" ({done['stopped']}), {done['seconds']:.0f} s,"
        f" {done['examples_per_second']:.0f} examples/s, {done['amp'] or 'float32'}"
    )
    for test in tests:
        what = "all items" if test.protocol == "full" else f"{test.n_candidates} candidates"
        table = Table(title=f"Test, {what}, {test.n_users:,} users")
        for column in ("metric", "value", "95 % interval"):
            table.add_column(column)
        for name, value in test.metrics.items():
            low, high = test.ci95[name]
            table.add_row(name, f"{value:.4f}", f"{low:.4f} to {high:.4f}")
        console.print(table)

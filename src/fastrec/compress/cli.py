"""``fastrec compress``: the five variants of Table I from one trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastrec.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from torch import nn

    from fastrec.compress.recipe import Recipe


def compress(
    model: Annotated[
        Path, typer.Argument(help="Trained model: a saved folder, or the output of fastrec train.")
    ],
    data: Annotated[Path, typer.Argument(help="Prepared data set (fastrec data prepare).")],
    out: Annotated[Path, typer.Argument(help="Folder for the variants, one sub-folder each.")],
    variants: Annotated[
        str | None, typer.Option(help="Comma-separated names; default all five.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="JSON file with a Recipe's fields; absent ones default.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share to prune, in [0, 1).")] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(help="Steps after each pruning round.")
    ] = None,
    qat_steps: Annotated[
        int | None, typer.Option(help="Steps of quantisation-aware training; 0 = calibrate only.")
    ] = None,
    distill_steps: Annotated[int | None, typer.Option(help="Steps of the student.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of batches and student.")] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write what was made to this file.")
    ] = None,
) -> None:
    """Prune, quantise and distil a trained ranker; finished variants in OUT are not made again."""
    from rich.console import Console

    from fastrec.compress.recipe import VARIANTS
    from fastrec.data import SequenceDataset

    plan = _recipe(recipe, sparsity, finetune_steps, qat_steps, distill_steps, seed)
    names = VARIANTS if variants is None else tuple(v.strip() for v in variants.split(","))
    baseline = _load(model)
    dataset = SequenceDataset.open(data)
    rows = _run(plan, baseline, dataset, out, names)
    _table(rows, Console())
    if json_out is not None:
        report = {"recipe": plan.to_dict(), "variants": rows}
        json_out.write_text(json.dumps(report, indent=1) + "\n")


def _recipe(
    file: Path | None,
    sparsity: float | None,
    finetune_steps: int | None,
    qat_steps: int | None,
    distill_steps: int | None,
    seed: int | None,
) -> Recipe:
    import dataclasses

    from fastrec.compress.recipe import FineTune, Recipe

    plan = Recipe()
    if file is not None:
        try:
            plan = Recipe.from_dict(json.loads(file.read_text()))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: no JSON ({error})") from error
    changes: dict[str, Any] = {}
    if sparsity is not None:
        changes["prune"] = dataclasses.replace(plan.prune, sparsity=sparsity)
    if finetune_steps is not None:
        changes["finetune"] = dataclasses.replace(plan.finetune, steps=finetune_steps)
    if qat_steps is not None:
        qat = plan.qat or FineTune(lr=1e-4)
        changes["qat"] = dataclasses.replace(qat, steps=qat_steps)
    if distill_steps is not None:
        changes["distill"] = dataclasses.replace(plan.distill, steps=distill_steps)
    if seed is not None:
        changes["seed"] = seed
    return dataclasses.replace(plan, **changes)


def _load(path: Path) -> nn.Module:
    """A folder of ``fastrec.save``, or what ``fastrec train`` wrote."""
    from fastrec.compress.artifact import MANIFEST, load
    from fastrec.train import load_model

    if not path.exists():
        raise ArgumentError("MODEL", "a saved model", f"{path}, which does not exist")
    return load(path) if (path / MANIFEST).is_file() else load_model(path)


def _run(
    plan: Recipe, baseline: nn.Module, dataset: Any, out: Path, names: tuple[str, ...]
) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastrec.compress.artifact import artifact_bytes

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        made = plan.run(baseline, dataset, out=out, progress=tell, variants=names)
    return [
        {
            "variant": name,
            "path": str(out / name),
            "bytes": artifact_bytes(out / name),
            "modules": _quantised(module),
        }
        for name, module in made.items()
    ]


def _quantised(module: nn.Module) -> int:
    """How many modules of a variant are INT8."""
    from fastrec.nn import Int8Embedding, SparseInt8Linear

    return sum(isinstance(m, SparseInt8Linear | Int8Embedding) for m in module.modules())


def _table(rows: list[dict[str, Any]], console: Any) -> None:
    from rich.table import Table

    full = next((row["bytes"] for row in rows if row["variant"] == "baseline"), None)
    table = Table("variant", "MB", "% of baseline", "INT8 modules", "folder")
    for row in rows:
        share = f"{100 * row['bytes'] / full:.1f}" if full else ""
        size = f"{row['bytes'] / 1e6:.2f}"
        table.add_row(row["variant"], size, share, str(row["modules"]), row["path"])
    console.print(table)

"""``fastrec compress``: the five variants of Table I from one trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastrec.errors import ArgumentError, DataError
from fastrec.model_source import ModelArgument, find_model
from fastrec.terminal import JsonOption, progress, stdout, write_json

if TYPE_CHECKING:
    from torch import nn

    from fastrec.compress.recipe import Recipe


def compress(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(help="Prepared data set (fastrec data prepare).")],
    out: Annotated[Path, typer.Argument(help="Folder for the variants, one sub-folder each.")],
    variants: Annotated[
        str | None, typer.Option(help="Comma-separated names; default all five.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="JSON file with a Recipe's fields; absent ones default.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share to prune, in [0, 1).")] = None,
    nm: Annotated[
        str | None, typer.Option(metavar="N:M", help="Prune N:M, such as 2:4, and not in blocks.")
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="Before all else: low_rank:32, grouped:4, window:16; may be repeated."),
    ] = None,
    hidden: Annotated[
        float | None, typer.Option(help="Weight of the hidden states in the distillation.")
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(help="Largest INT8 code of a weight: 31 makes smaller files than 127."),
    ] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(help="Steps after each pruning round and replacement.")
    ] = None,
    qat_steps: Annotated[
        int | None, typer.Option(help="Steps of quantisation-aware training; 0 = calibrate only.")
    ] = None,
    distill_steps: Annotated[int | None, typer.Option(help="Steps of the student.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of batches and student.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Prune, quantise and distil a trained ranker; finished variants in OUT are not made again."""
    from fastrec.compress.recipe import VARIANTS
    from fastrec.data import SequenceDataset

    plan = _recipe(recipe, sparsity, finetune_steps, qat_steps, distill_steps, seed)
    plan = _with_options(plan, sparsity, nm, replace or [], hidden, levels)
    names = VARIANTS if variants is None else tuple(v.strip() for v in variants.split(","))
    baseline = find_model(model).announce().model()
    dataset = SequenceDataset.open(data)
    rows = _run(plan, baseline, dataset, out, names)
    _table(rows, stdout())
    write_json(json_out, {"recipe": plan.to_dict(), "variants": rows})


def _recipe(
    file: Path | None,
    sparsity: float | None,
    finetune_steps: int | None,
    qat_steps: int | None,
    distill_steps: int | None,
    seed: int | None,
) -> Recipe:
    import dataclasses

    from fastrec.compress.patterns import BlockPruning
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
    if sparsity is not None and isinstance(plan.prune, BlockPruning):
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


def _with_options(
    plan: Recipe,
    sparsity: float | None,
    nm: str | None,
    replace: list[str],
    hidden: float | None,
    levels: int | None,
) -> Recipe:
    import dataclasses
    import re

    from fastrec.compress.patterns import NMPruning
    from fastrec.compress.replacement import Grouped, LowRank, WindowSparse
    from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

    changes: dict[str, Any] = {}
    if nm is not None:
        found = re.fullmatch(r"(\d+):(\d+)", nm)
        if found is None:
            raise ArgumentError("--nm", "two numbers like 2:4", repr(nm))
        changes["prune"] = NMPruning(int(found[1]), int(found[2]))
    if sparsity is not None and isinstance(changes.get("prune", plan.prune), NMPruning):
        raise ArgumentError("--sparsity", "none beside an N:M pattern, which says it", sparsity)
    makers: dict[str, Callable[[int], Any]] = {
        "low_rank": LowRank,
        "grouped": Grouped,
        "window": lambda size: WindowSparse(AttentionPattern(window=size)),
    }
    parts = []
    for text in replace:
        name, _, number = text.partition(":")
        if name not in makers or not number.isdecimal():
            raise ArgumentError("--replace", "low_rank:N, grouped:N or window:N", repr(text))
        parts.append(makers[name](int(number)))
    if parts:
        changes["replace"] = tuple(parts)
    if levels is not None:
        changes["quantize"] = dataclasses.replace(plan.quantize, levels=levels)
    if hidden is not None:
        changes["distill"] = dataclasses.replace(plan.distill, hidden=hidden)
    return dataclasses.replace(plan, **changes)


def _run(
    plan: Recipe, baseline: nn.Module, dataset: Any, out: Path, names: tuple[str, ...]
) -> list[dict[str, Any]]:
    from fastrec.compress.artifact import artifact_bytes

    with progress() as tell:
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

"""From settings to data set, trained baseline and the five variants, each stage resumable."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastrec.compress import Recipe, load, save
from fastrec.compress.artifact import MANIFEST
from fastrec.compress.recipe import FineTune
from fastrec.data import ReadOptions, SequenceDataset, generate, prepare
from fastrec.data.layout import parse_columns
from fastrec.data.opening import log_identity
from fastrec.data.storage import is_prepared
from fastrec.errors import ArgumentError, ArtifactError, DataError
from fastrec.model_source import find_model
from fastrec.models import Ranker, RankerConfig
from fastrec.report.schema import VARIANTS
from fastrec.report.settings import Progress, Table1Settings
from fastrec.report.store import Store, fingerprint
from fastrec.train import TrainConfig, fit


def dataset_of(
    settings: Table1Settings, store: Store, progress: Progress
) -> tuple[SequenceDataset, dict[str, Any]]:
    """The data set (opened) and what the report says about it."""
    source = settings.data
    if source is not None and is_prepared(source):
        return _opened(source, {"source": source.name, "generated": False})
    folder = store.out / "data"
    options = ReadOptions(columns=parse_columns(settings.columns))
    if source is None:
        key = fingerprint("generated", settings.preset, settings.seed)
    else:
        key = fingerprint("log", str(source.resolve()), log_identity(source, options))

    def make() -> dict[str, Any]:
        def tell(stage: str, done: int, total: int) -> None:
            progress(f"data: {stage}", done, total)

        about: dict[str, Any] = {"generated": source is None}
        log = source
        if log is None:
            log = store.out / "log.csv"
            report = generate(log, preset=settings.preset, seed=settings.seed, progress=tell)
            about |= {"source": f"fastrec.data.generate, preset {settings.preset}"}
            about |= {"generated_events": report.events}
        else:
            about |= {"source": log.name}
        read = prepare(log, folder, options=options, force=True, progress=tell)
        rejected = {reason: rows for reason, rows in read.rejected.items() if rows}
        about |= {"read_as": read.read_as, "rows": read.rows, "rows_kept": read.kept}
        return about | {"rejected": rejected}

    kept = store.read("data", key)
    if kept is not None:
        try:
            SequenceDataset.open(folder)
        except (DataError, ArtifactError):
            store.write("data", "damaged", None)  # made again below
    return _opened(folder, store.stage("data", key, make))


def _opened(folder: Path, about: dict[str, Any]) -> tuple[SequenceDataset, dict[str, Any]]:
    dataset = SequenceDataset.open(folder)
    sizes = {
        "users": dataset.n_users,
        "items": dataset.n_items - 1,
        "categories": dataset.n_categories - 1,
        "history_length": dataset.history_length,
        "stored_events": len(dataset.items),
        "test_users": dataset.num_examples("test"),
    }
    if not sizes["test_users"]:
        raise DataError(f"{folder}: no user has the three events that a test example needs")
    return dataset, {**about, **sizes}


def model_config(settings: Table1Settings, dataset: SequenceDataset) -> RankerConfig:
    """The ranker's sizes.

    Raises:
        ArgumentError: the data holds more items or categories than the canonical tables.
    """
    canonical = RankerConfig.taobao()
    if settings.config == "demo":
        return dataclasses.replace(
            canonical,
            n_items=dataset.n_items,
            n_categories=dataset.n_categories,
            n_behaviours=max(canonical.n_behaviours, dataset.n_behaviours - 1),
            history_length=dataset.history_length,
        )
    _check_fits(canonical, dataset, "config")
    return canonical


def _check_fits(config: RankerConfig, dataset: SequenceDataset, argument: str) -> None:
    for name, needed in (
        ("n_items", dataset.n_items),
        ("n_categories", dataset.n_categories),
        ("n_behaviours", dataset.n_behaviours - 1),
        ("history_length", dataset.history_length),
    ):
        if getattr(config, name) < needed:
            raise ArgumentError(
                argument,
                f"a model with {name} of at least {needed}, as the data has",
                getattr(config, name),
            )


def train_config(settings: Table1Settings) -> TrainConfig:
    """The baseline's training: the measured recipe of fastrec.train within the budget."""
    changes: dict[str, Any] = {"seed": settings.seed}
    if settings.quick:
        changes |= {"epochs": 5, "valid_users": 256}
    if settings.epochs is not None:
        changes["epochs"] = settings.epochs
    if settings.steps is not None:
        changes["max_steps"] = settings.steps
    return dataclasses.replace(TrainConfig(), **changes)


def recipe_of(settings: Table1Settings) -> Recipe:
    """The compression schedule."""
    recipe = Recipe.quick(settings.seed) if settings.quick else Recipe(seed=settings.seed)
    if settings.recipe_steps is None:
        return recipe
    steps = settings.recipe_steps
    return dataclasses.replace(
        recipe,
        finetune=dataclasses.replace(recipe.finetune, steps=steps),
        qat=dataclasses.replace(recipe.qat or FineTune(), steps=steps),
        distill=dataclasses.replace(recipe.distill, steps=steps),
    )


def baseline_of(
    settings: Table1Settings,
    dataset: SequenceDataset,
    store: Store,
    progress: Progress,
    config: RankerConfig | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained baseline and what the report says about it."""
    if settings.model is not None:
        model = _given(settings.model)
        _check_fits(model.config, dataset, "model")
        return model, {"trained": "before", "model": settings.model.name}
    if config is None:
        config = model_config(settings, dataset)
    else:
        _check_fits(config, dataset, "model_config")
    plan = train_config(settings)
    folder = store.out / "baseline"
    key = fingerprint(config.to_dict(), plan.to_dict(), dataset.manifest)

    def make() -> dict[str, Any]:
        return _train(config, plan, dataset, folder, key, progress)

    if store.read("train", key) is not None:
        try:
            model = load(folder / "model")
        except ArtifactError:
            store.write("train", "damaged", None)
        else:
            return model, store.stage("train", key, make)
    about = store.stage("train", key, make)
    return load(folder / "model"), about


def _train(
    config: RankerConfig,
    plan: TrainConfig,
    dataset: SequenceDataset,
    folder: Path,
    key: str,
    progress: Progress,
) -> dict[str, Any]:
    """Train into ``folder``; an interrupted training of the same key goes on."""
    import torch

    note, work = folder / "key", folder / "training"
    if not note.is_file() or note.read_text() != key:
        shutil.rmtree(work, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = Ranker(config)
    total = plan.epochs * math.ceil(dataset.num_examples("train") / plan.batch_size)
    total = min(total, plan.max_steps or total)

    def on_step(step: int, loss: float) -> None:
        progress("training the baseline", step, total)

    resume = (work / "checkpoint.safetensors").is_file()
    report = fit(model, dataset, plan, out=work, resume=resume, progress=False, on_step=on_step)
    save(model.eval(), folder / "model", info={"variant": "baseline"})
    # Optimiser state is three times the model: of no use once the training is done.
    shutil.rmtree(work, ignore_errors=True)
    about = report.to_dict()
    best = about["history"][-1] if about["history"] else {}
    return {
        "trained": "in this run",
        **{name: about[name] for name in ("steps", "epochs", "seconds", "stopped", "amp")},
        "best_epoch": about["best_epoch"],
        "best_valid_ndcg_10": about["best_metric"],
        "last_loss": best.get("loss"),
    }


def _given(path: Path) -> Any:
    """A baseline from ``--model``: an artifact, a folder of variants, or a training's output.

    Raises:
        ArgumentError: it holds no ranker.
    """
    inner = path / "baseline"
    model = find_model(inner if (inner / MANIFEST).is_file() else path).model()
    if not isinstance(model, Ranker) or any(True for _ in model.buffers()):
        raise ArgumentError("model", "a float fastrec.models.Ranker", type(model).__name__)
    return model


def variants_of(
    settings: Table1Settings,
    baseline: nn.Module,
    dataset: SequenceDataset,
    store: Store,
    progress: Progress,
    names: Sequence[str] = VARIANTS,
) -> dict[str, nn.Module]:
    """The variants named, saved under ``OUT/variants``; :class:`Recipe` resumes by itself.

    Variants that ``--model`` holds already are taken from there.
    """
    start = time.perf_counter()
    given = {}
    if settings.model is not None:
        given = {v: load(settings.model / v) for v in names
                 if (settings.model / v / MANIFEST).is_file()}  # fmt: skip
    folder = store.out / "variants"
    for name, model in given.items():
        save(model, folder / name, info={"variant": name})
    missing = [name for name in names if name not in given]
    made = {}
    if missing:

        def tell(stage: str, done: int, total: int) -> None:
            progress(f"compressing: {stage}", done, total)

        recipe = recipe_of(settings)
        made = recipe.run(baseline, dataset, out=folder, progress=tell, variants=missing)
    store.add_seconds("variants", time.perf_counter() - start)
    return {name: given[name] if name in given else made[name] for name in names}

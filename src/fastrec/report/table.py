"""``table1``: a log in, the measured Table I out."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastrec.measure.machine import machine_card
from fastrec.models import RankerConfig
from fastrec.report import accuracy, pipeline
from fastrec.report.accuracy import Catalogue
from fastrec.report.engines import EngineBuilder, Request, Spec, specs_of
from fastrec.report.html import render_html
from fastrec.report.markdown import render_markdown
from fastrec.report.memory import child_command, peak_memory
from fastrec.report.networks import count_parameters
from fastrec.report.paper import paper_table
from fastrec.report.plots import write_plots
from fastrec.report.schema import (
    ACCURACY,
    FORMAT,
    FORMAT_VERSION,
    GPU_ENGINES,
    NULLABLE,
    VARIANTS,
    Row,
    validate,
)
from fastrec.report.settings import CANDIDATES, Progress, Table1Settings
from fastrec.report.store import Store, fingerprint
from fastrec.report.variant import VariantRun

_DISTINCT = {1: 16, 8: 8}
_BUSY_CORES = 0.2
# The demo makes and measures these first, so that the first figures come early.
_FIRST = ("baseline", "quantized")
_NO_MEMORY = "peak memory takes a process for each engine, a minute of the demo: --full has it"
_NOT_ON_RIVALS = (
    "top-50 retrieval is evaluated on the native engine only: rivals run the same network, and the "
    "catalogue is many times the work"
)


def table1(
    settings: Table1Settings | None = None,
    out: str | Path = "table1",
    *,
    model_config: RankerConfig | None = None,
    progress: Progress | None = None,
    measured: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Make the paper's Table I on this machine: train or load, compress, check, measure, write.

    Args:
        settings: what to do; the demo by default.
        out: folder for everything. Stages finished there by an earlier call with the same settings
            are not done again.
        model_config: the baseline's sizes in place of those that ``settings.config`` names.
        progress: called with (stage, done, total).
        measured: called with each variant and what :class:`VariantRun` found, as soon as it is
            there.

    Returns:
        The object of ``out/table1.json`` (DESIGN of the schema: :mod:`fastrec.report.schema`);
        ``table1.md``, ``report.html`` and four PNG plots are written beside it.

    Raises:
        ArgumentError: a bad setting, or data that the model's tables cannot hold.
        DataError, ArtifactError: a log or model that cannot be used.
    """
    started = time.perf_counter()
    settings = settings or Table1Settings.make()
    tell: Progress = progress or (lambda stage, done, total: None)
    store = Store(Path(out))
    dataset, about_data = pipeline.dataset_of(settings, store, tell)
    baseline, about_model = pipeline.baseline_of(settings, dataset, store, tell, model_config)
    builder = EngineBuilder(
        {},
        requests_of(dataset, (*settings.batches, *settings.throughput_batches), settings.seed),
        calibration_of(settings, dataset),
        settings.threads,
        store.out / "third_party.log",
    )
    variants: dict[str, nn.Module] = {}
    found: dict[str, dict[str, Any]] = {}
    rest = tuple(name for name in VARIANTS if name not in _FIRST)
    for names in (_FIRST, rest) if settings.quick else (VARIANTS,):
        made = pipeline.variants_of(settings, baseline, dataset, store, tell, names)
        variants |= made
        _measure(settings, made, builder, dataset, store, tell, found, measured)
    builder.close_shared()
    peaks = _memory(settings, found, store, tell)
    rows = _rows(settings, found, peaks, variants)
    recipe = pipeline.recipe_of(settings)
    report = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "summary": _summary(rows, settings, found),
        "machine": machine_card(),
        "dataset": about_data,
        "run": {
            "settings": settings.to_dict(),
            "model": getattr(baseline, "config", None) and baseline.config.to_dict(),
            "training": about_model,
            "recipe": recipe.to_dict(),
            "stages_reused": store.reused,
            "cores_used_by_others": {v: found[v]["others"] for v in VARIANTS},
            "seconds": {**store.seconds, "all": time.perf_counter() - started},
        },
        "paper": paper_table(),
        "ratios": [line for variant in VARIANTS for line in found[variant]["ratios"]],
        "rows": [row.to_dict() for row in rows],
    }
    validate(report)
    write_report(report, store.out)
    plain: dict[str, Any] = json.loads(json.dumps(report))  # as the file has it: lists, no tuples
    return plain


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write ``table1.json``, ``table1.md``, ``report.html`` and the plots into ``out``."""
    images = write_plots(report["rows"], out)
    (out / "table1.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (out / "table1.md").write_text(render_markdown(report))
    (out / "report.html").write_text(render_html(report, images))


def requests_of(
    dataset: Any, batches: Sequence[int], seed: int, *, split: str = "test"
) -> dict[int, list[Request]]:
    """Real requests of 50 candidates: batch size -> tuples of int64 arrays, users repeated where
    there are too few."""
    found: dict[int, list[Request]] = {}
    for size in sorted(set(batches)):
        wanted = size * _DISTINCT.get(size, 3)
        parts = dataset.batches(
            split, batch_size=256, n_candidates=CANDIDATES, seed=seed, shuffle=False, limit=wanted
        )
        columns = [np.concatenate(c) for c in zip(*(p.inputs() for p in parts), strict=True)]
        index = np.arange(max(size, len(columns[0]) // size * size)) % len(columns[0])
        found[size] = [
            tuple(column[index[start : start + size]] for column in columns)
            for start in range(0, len(index), size)
        ]
    return found


def calibration_of(settings: Table1Settings, dataset: Any) -> list[Request]:
    """The recipe's calibration examples for the rivals' quantisers, with 50 candidates each."""
    recipe = pipeline.recipe_of(settings)
    limit = min(recipe.calibration_examples, 64 if settings.quick else recipe.calibration_examples)
    batches = dataset.batches(
        "train", batch_size=16, n_candidates=CANDIDATES, seed=recipe.seed, limit=limit
    )
    return [batch.inputs() for batch in batches]


def _measure(
    settings: Table1Settings,
    variants: Mapping[str, nn.Module],
    builder: EngineBuilder,
    dataset: Any,
    store: Store,
    progress: Progress,
    found: dict[str, dict[str, Any]],
    measured: Callable[[str, Mapping[str, Any]], None] | None,
) -> None:
    """Add to ``found``: variant -> what :class:`VariantRun` found."""
    builder.networks |= variants
    if "distilled" in variants:
        student = copy.deepcopy(variants["distilled"]).float().eval()
        builder.networks["distilled_fp32"] = student
    asked = settings.to_dict()
    for variant in variants:
        catalogue = next(
            (Catalogue(*f["catalogue"]) for f in found.values() if f["catalogue"]), None
        )
        weights = _weights_key(store.out, [spec.network for spec in specs_of(variant, settings)])
        key = fingerprint(variant, asked, weights, dataset.manifest, catalogue and vars(catalogue))
        run = VariantRun(variant, settings, builder, dataset, store.out, progress)
        found[variant] = store.stage(f"measure-{variant}", key, partial(run.run, catalogue))
        if measured is not None:
            measured(variant, found[variant])


def _weights_key(out: Path, networks: Iterable[str] = VARIANTS) -> str:
    """Changes with any byte of these networks: the artifacts hold their own checksums."""
    names = sorted({network.removesuffix("_fp32") for network in networks})
    files = [out / "variants" / name / "model.json" for name in names]
    return fingerprint(*(json.loads(file.read_text())["sha256"] for file in files))


def _rss_key(spec: Spec) -> str:
    return f"rss-{spec.engine}-{spec.ask or 'as_is'}-{spec.network}"


def _memory(
    settings: Table1Settings, found: Mapping[str, Any], store: Store, progress: Progress
) -> dict[str, dict[str, Any]]:
    """stage name -> {"peak_mb", "why"}; engines that several variants share run once."""
    start = time.perf_counter()
    weights = _weights_key(store.out)
    peaks: dict[str, dict[str, Any]] = {}
    commands: dict[str, Sequence[str]] = {}
    for variant in VARIANTS:
        for spec in specs_of(variant, settings):
            source = found[variant]["engines"][spec.name]["source"]
            name = _rss_key(spec)
            kept = store.read(name, weights)
            if kept is not None:
                peaks[name] = kept
            elif settings.quick:
                peaks[name] = {"peak_mb": None, "why": _NO_MEMORY}
            elif source is None:
                peaks[name] = {"peak_mb": None, "why": "there is no file that a process could load"}
            else:
                commands[name] = child_command(
                    spec, store.out / source, settings.threads, settings.rss_requests
                )
    done: list[str] = []
    progress("peak memory of each engine", 0, len(commands))

    def keep(name: str, peak: float | None, why: str | None) -> None:
        peaks[name] = {"peak_mb": peak, "why": why}
        if peak is not None:
            store.write(name, weights, peaks[name])
        done.append(name)
        progress("peak memory of each engine", len(done), len(commands))

    peak_memory(commands, keep)
    store.add_seconds("peak memory", time.perf_counter() - start)
    return peaks


def _rows(
    settings: Table1Settings,
    found: Mapping[str, Any],
    peaks: Mapping[str, Any],
    variants: Mapping[str, nn.Module],
) -> list[Row]:
    counts = {name: count_parameters(model) for name, model in variants.items()}
    counts["distilled_fp32"] = counts["distilled"]
    baseline = found["baseline"]["engines"].get("native-fp32", {}).get("accuracy")
    rows = []
    for variant in VARIANTS:
        for spec in specs_of(variant, settings):
            facts = found[variant]["engines"][spec.name]
            quality = None
            if facts["accuracy"] is not None:
                against = baseline if variant != "baseline" and spec.engine == "native" else None
                quality = accuracy.row_fields(facts["accuracy"], against, settings.seed)
            for batch in settings.batches:
                row = Row(variant, spec.engine, spec.precision, batch, settings.threads)
                row.device = "cuda" if spec.engine in GPU_ENGINES else "cpu"
                every, kept = counts[spec.network]
                row.params_m, row.nonzero_params_m = every / 1e6, kept / 1e6
                _fill_speed(row, facts, peaks[_rss_key(spec)])
                _fill_quality(row, facts, quality)
                rows.append(row)
    return rows


def _fill_speed(row: Row, facts: Mapping[str, Any], peak: Mapping[str, Any]) -> None:
    batch = str(row.batch)
    row.settings, row.gate = facts["settings"][batch], facts["gate"][batch]
    if batch in facts["latency"]:
        row.latency_ms = dict(facts["latency"][batch])
        row.calls = facts["calls"][batch]
    if facts["throughput"] is not None:
        row.throughput_rps = facts["throughput"]["rps"]
        row.throughput_at = {k: facts["throughput"][k] for k in ("batch", "all")}
    row.size_mb, row.rss_mb = facts["size_mb"], peak["peak_mb"]
    row.explain(["latency_ms"], facts["why"][batch] or "it was not timed")
    row.explain(["throughput_rps"], facts["throughput_why"] or "it was not timed")
    row.explain(["size_mb"], facts["size_why"] or "it has no file")
    row.explain(["rss_mb"], peak["why"] or "its process reported nothing")


def _fill_quality(
    row: Row, facts: Mapping[str, Any], quality: Mapping[str, Mapping[str, Any]] | None
) -> None:
    if quality is not None:
        for name, value in quality["values"].items():
            setattr(row, name, value)
        row.ci95, row.difference = dict(quality["ci95"]), dict(quality["difference"])
        row.protocol = dict(quality["protocol"])
        if row.engine != "native":
            row.explain(accuracy.CATALOGUE_METRICS, _NOT_ON_RIVALS)
        few = "the candidate set is no larger than the cut-off, where it is 1 by construction"
        row.explain(ACCURACY, few)
    row.explain(ACCURACY, facts["accuracy_why"] or "it was not evaluated")
    row.explain(NULLABLE, "it was not measured")


def _summary(rows: Sequence[Row], settings: Table1Settings, found: Mapping[str, Any]) -> str:
    measured = sum(not row.is_null("latency_ms") for row in rows)
    busiest = max((n or 0.0 for v in VARIANTS for n in found[v]["others"].values()), default=0.0)
    noise = ""
    if busiest > _BUSY_CORES:
        noise = (
            f" NOISY: other processes kept up to {busiest:.1f} cores busy while engines were timed,"
            " which slows some engines far more than others; run it again on an idle machine."
        )
    return (
        f"The five variants of the paper's Table I on {len(settings.engines)} engines, CPU, "
        f"{settings.threads} threads, {CANDIDATES} candidates a request; {measured} of {len(rows)} "
        "rows timed. All engines of a variant were timed in turn in one process, after their "
        "answers were checked against fp32 torch. Every number was measured in this run." + noise
    )

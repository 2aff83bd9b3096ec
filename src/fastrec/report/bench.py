"""``fastrec bench``: engines on one model, by the same gate and timing as Table I."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from fastrec.errors import ArgumentError
from fastrec.exporters.model_spec import quantised_module, spec_of
from fastrec.measure.machine import machine_card, usable_cpus
from fastrec.measure.timing import Samples
from fastrec.model_source import ModelSource, example_inputs, find_model
from fastrec.models import Ranker, RankerConfig
from fastrec.report.engines import Built, EngineBuilder, Request, Spec
from fastrec.report.layout import ENGINE_TITLES, NULL, number
from fastrec.report.measuring import latency_of, time_engines
from fastrec.report.schema import ENGINES, PRECISIONS
from fastrec.report.settings import CANDIDATES, Progress
from fastrec.spec import InputSpec

_DISTINCT = 8


def bench(
    model: str | Path | nn.Module | None = None,
    *,
    example: str | None = None,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    precision: str | None = None,
    seconds_per_engine: float = 2.0,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time engines on one model with random requests.

    Args:
        model: a model, or what :func:`fastrec.model_source.find_model` finds (an engine is timed
            as it is); None = the canonical ranker with random weights.
        example: one batch of inputs of a model that is not fastrec's: see ``--example``.
        engines: default all for a float model, native and torch for a quantised one.
        batches: batch sizes.
        precision: asked of the engines that have it; None = the model as it is.
        seconds_per_engine: timing budget at one batch size.
        threads: of each engine; None = all CPUs of this process.
        seed: of weights and requests.
        progress: called with (stage, done, total).

    Returns:
        ``{"machine", "model", "rows": [{"engine", "precision", "batch", "latency_ms", "calls",
        "gate", "settings", "why"}]}``; latency null where ``why`` says so.

    Raises:
        ArgumentError: an unknown engine, precision or batch size.
    """
    if not batches or min(batches) < 1:
        raise ArgumentError("batches", "positive integers", batches)
    if precision not in (None, *PRECISIONS):
        raise ArgumentError("precision", f"one of {PRECISIONS} or None", repr(precision))
    source = None if model is None or isinstance(model, nn.Module) else find_model(model)
    if source is not None and source.kind == "engine":
        return _bench_engine(source, example, batches, seconds_per_engine, threads, seed)
    network = _network(model, source, seed)
    quantised = quantised_module(network) is not None
    names = tuple(engines or (("native", "torch") if quantised else ENGINES))
    if set(names) - set(ENGINES):
        raise ArgumentError("engines", f"names among {', '.join(ENGINES)}", names)
    requests = _requests(spec_of(network, ()), example, batches, seed)
    label = precision or ("int8" if quantised else "fp32")
    specs = [Spec(name, label, "model", _ask(name, precision)) for name in names]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastrec-bench-") as scratch:
        builder = EngineBuilder(
            {"model": network},
            requests,
            requests[max(batches)],
            threads or usable_cpus(),
            Path(scratch) / "third_party.log",
        )
        for size in batches:
            built: dict[str, Built] = {}
            for i, wanted in enumerate(specs):
                if progress is not None:
                    progress(f"batch {size}: building and checking {wanted.engine}", i, len(specs))
                built[wanted.name] = builder.built(wanted, size, (size,))
            if progress is not None:
                progress(f"batch {size}: timing", 0, 1)
            samples = time_engines(
                built,
                requests[size],
                batch=size,
                seconds_per_engine=seconds_per_engine,
                seed=seed,
            )
            for name, one in built.items():
                rows.append(_row(one, size, builder.threads, samples.get(name)))
            builder.close(list(built.values()))
    config = network.config.to_dict() if isinstance(network, Ranker) else None
    about = {"source": _source(model), "quantised": quantised, "config": config}
    return {"machine": machine_card(), "model": about, "rows": rows}


def _requests(
    spec: InputSpec, example: str | None, batches: Sequence[int], seed: int
) -> dict[int, list[Request]]:
    """Batch size -> requests: drawn where the spec says how, else of the example's rows."""
    first = example_inputs(spec, example, {"B": 1, "m": CANDIDATES})
    if example is None:
        return {
            size: [spec.sample({"B": size, "m": CANDIDATES}, seed=seed + i)
                   for i in range(_DISTINCT)]
            for size in batches
        }  # fmt: skip
    rng = np.random.default_rng(seed)
    rows = {size: rng.integers(0, len(first[0]), (_DISTINCT, size)) for size in batches}
    return {size: [tuple(a[r] for a in first) for r in drawn] for size, drawn in rows.items()}


def _bench_engine(
    source: ModelSource,
    example: str | None,
    batches: Sequence[int],
    seconds: float,
    threads: int | None,
    seed: int,
) -> dict[str, Any]:
    """An engine is timed as it is: there is no torch model to hold its answers against."""
    with source.engine(threads) as engine:
        requests = _requests(engine.spec, example, batches, seed)
        built = Built(Spec(engine.backend, engine.precision, "model", None), engine)
        rows = []
        for size in batches:
            taken = time_engines(
                {"it": built}, requests[size], batch=size, seconds_per_engine=seconds, seed=seed
            )["it"]
            rows.append(_row(built, size, engine.threads, taken))
        precision = engine.precision
    about = {"source": source.name, "quantised": precision == "int8", "config": None}
    return {"machine": machine_card(), "model": about, "rows": rows}


def _row(built: Built, batch: int, threads: int, taken: Samples | None) -> dict[str, Any]:
    return {
        "engine": built.spec.engine,
        "precision": built.engine.precision if built.engine else built.spec.precision,
        "batch": batch,
        "threads": threads,
        "latency_ms": None if taken is None else latency_of(taken),
        "calls": 0 if taken is None else taken.n,
        "gate": built.gate,
        "settings": built.settings(),
        "why": built.why,
    }


def _ask(engine: str, precision: str | None) -> str | None:
    """Native runs a model as it is."""
    return None if engine == "native" else precision


def _network(model: Any, source: ModelSource | None, seed: int) -> nn.Module:
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Ranker(RankerConfig.taobao()).eval()
    network: nn.Module = model if source is None else source.model()
    return network


def _source(model: str | Path | nn.Module | None) -> str:
    if model is None:
        return "random weights, canonical sizes"
    return type(model).__name__ if isinstance(model, nn.Module) else Path(model).name


def print_bench(report: dict[str, Any], console: Console) -> None:
    """The rows as a table, fastest first within a batch size; reasons below."""
    table = Table(title=f"Latency of one call: {report['model']['source']}", box=box.SIMPLE_HEAD)
    for title in ("batch", "engine"):
        table.add_column(title)
    for title in ("p50 ms", "p95 ms", "p99 ms", "calls"):
        table.add_column(title, justify="right")
    far = float("inf")

    def order(row: dict[str, Any]) -> tuple[int, float]:
        return row["batch"], far if row["latency_ms"] is None else row["latency_ms"]["p50"]

    for row in sorted(report["rows"], key=order):
        latency = row["latency_ms"]
        cells = [NULL] * 3 if latency is None else [number(v) for v in latency.values()]
        name = f"{ENGINE_TITLES[row['engine']]} {row['precision']}"
        table.add_row(str(row["batch"]), name, *cells, str(row["calls"]))
    console.print(table)
    for row in report["rows"]:
        if row["why"]:
            console.print(f"  - {row['engine']}, batch {row['batch']}: {row['why']}", style="dim")
